"""docs/hooks.md from the catalogue.

python -m elasticmoe_patches.hookdocs docs/hooks.md           write it
python -m elasticmoe_patches.hookdocs --check docs/hooks.md   exit status 1 where it differs
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from elasticmoe_patches.catalogue import all_hooks
from elasticmoe_patches.spec import HookSpec
from elasticmoe_sglang import SUPPORTED_SGLANG

_HEAD = f"""# Hooks into SGLang

Generated from the declarations under `patches/elasticmoe_patches/srt/` by `make hooks-doc`; do not edit.

Supported: SGLang {SUPPORTED_SGLANG}. Every hook is checked before it is installed (version, target, signature) and
again once the server stands; a mismatch ends the launch. Scope `flags` is always installed, `platform` on the CPU
platform of this package, `elastic` only with `--elasticmoe-*` flags. Without flags, and where nothing fits, SGLang runs
untouched.

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
    parser = argparse.ArgumentParser(prog="python -m elasticmoe_patches.hookdocs", description="Write docs/hooks.md.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("path", type=Path)
    args = parser.parse_args(argv)
    wanted = render(all_hooks())
    if not args.check:
        args.path.write_text(wanted, encoding="utf-8")
        return 0
    found = args.path.read_text(encoding="utf-8") if args.path.exists() else ""
    if found == wanted:
        return 0
    difference = difflib.unified_diff(found.splitlines(), wanted.splitlines(), str(args.path), "catalogue", lineterm="")
    print("\n".join(difference))
    print(f"{args.path} differs from the declared hooks: run `make hooks-doc`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
