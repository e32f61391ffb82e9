"""docs/hooks.md from the catalogue.

python -m elasticmoe_patches.hookdocs docs/hooks.md           write it
python -m elasticmoe_patches.hookdocs --check docs/hooks.md   exit status 1 where it differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from elasticmoe_patches.catalogue import all_hooks
from elasticmoe_patches.spec import HookSpec
from elasticmoe_sglang import SUPPORTED_SGLANG, SUPPORTED_SGLANGS
from elasticmoe_sglang.generated_page import write_or_check

_HEAD = f"""# Hooks into SGLang

Generated from the declarations under `patches/elasticmoe_patches/srt/` by `make hooks-doc`; do not edit.

Supported: SGLang {" and ".join(SUPPORTED_SGLANGS)}; `make venv` installs {SUPPORTED_SGLANG}. Every hook is checked
before it is installed (version, target, signature) and again once the server stands; a mismatch ends the launch. Scope
`flags` is always installed, `platform` on the CPU platform of this package, `elastic` only with `--elasticmoe-*` flags.
Without flags, and where nothing fits, SGLang runs untouched.

Also checked at an elastic launch: every attribute of SGLang's that this package uses besides (`uses.py`). The body of
every hooked function was read in each version; `elasticmoe doctor` warns where the installed one is another
(`bodies.json`). What SGLang would have to offer so that most hooks can go is written out in
[upstream/](upstream/README.md).

"""


def render(specs: Iterable[HookSpec]) -> str:
    """The whole page as Markdown: a table of all hooks, then each with its reason."""
    ordered = sorted(specs, key=lambda spec: (spec.target, spec.hook))
    rows = "".join(f"| `{spec.target}` | {spec.kind} | {spec.scope} | {_processes(spec)} |\n" for spec in ordered)
    table = f"| Target | Kind | Scope | Processes |\n|---|---|---|---|\n{rows}"
    return _HEAD + table + "".join(_section(spec) for spec in ordered)


def _section(spec: HookSpec) -> str:
    lines = [
        f"\n## `{spec.target}`\n",
        spec.reason,
        "",
        f"- Hook: `{spec.hook}`, {spec.kind}, scope {spec.scope}, processes {_processes(spec)}",
        f"- Signature: `{spec.signature}`",
        *(f"- In {version}: `{signature}`" for version, signature in spec.signatures),
        f"- SGLang: {', '.join(spec.versions)}",
        f"- Can go: {spec.expires}",
    ]
    if spec.rebind:
        lines.append(f"- Also held as: {', '.join(f'`{path}`' for path in spec.rebind)}")
    return "\n".join(lines) + "\n"


def _processes(spec: HookSpec) -> str:
    return ", ".join(sorted(spec.processes))


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    return write_or_check(
        argv,
        module="elasticmoe_patches.hookdocs",
        source="the declared hooks",
        make="hooks-doc",
        render=lambda: render(all_hooks()),
    )


if __name__ == "__main__":
    sys.exit(main())
