"""Which source of every hooked function was read, as a hash, for each supported version of SGLang.

A hook depends on more than its target's signature. A body that is not the one that was read is a warning in `elasticmoe
doctor`, and a failing test until somebody has read it and recorded the new hash:

    python -m elasticmoe_patches.bodies    compare with the installed SGLang; exit status 1 where a body differs
    python -m elasticmoe_patches.bodies --read    record the bodies of the installed SGLang as read
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from elasticmoe_patches.spec import HookSpec
from elasticmoe_patches.targets import resolve, sglang_version

RECORD = Path(__file__).with_name("bodies.json")
"""SGLang's version -> hooked target -> the first 16 hexadecimal digits of its source's SHA-256."""


def body_hash(target: str) -> str | None:
    """The hash of a function's source, comments included; None of what is no function.

    Raises:
        Exception: whatever importing its module raised; AttributeError where the name is not in it.
    """
    function = resolve(target).function
    if not inspect.isroutine(function):
        return None
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def hashes(specs: Iterable[HookSpec]) -> dict[str, str]:
    """Target -> hash, of the hooked functions that the installed SGLang has. No hook may be installed."""
    found: dict[str, str] = {}
    for spec in specs:
        try:
            value = body_hash(spec.target)
        except Exception:  # importing SGLang's module runs its code, which may raise anything; preflight reports it
            continue
        if value is not None:
            found[spec.target] = value
    return found


def changed(specs: Iterable[HookSpec], version: str | None) -> list[str]:
    """The hooked functions whose body is not the one that was read for this version."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8")).get(version or "", {})
    return sorted(target for target, value in hashes(specs).items() if recorded.get(target) != value)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare or record; returns the exit status."""
    from elasticmoe_patches.catalogue import all_hooks

    parser = argparse.ArgumentParser(prog="python -m elasticmoe_patches.bodies")
    parser.add_argument("--read", action="store_true", help="record the bodies of the installed SGLang as read")
    version = sglang_version()
    if parser.parse_args(argv).read:
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
        record[version] = dict(sorted(hashes(all_hooks()).items()))
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    different = changed(all_hooks(), version)
    for target in different:
        print(f"SGLang {version}: the body of {target} is not the one that was read for its hook")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
