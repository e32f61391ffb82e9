"""Pages that are generated from declarations: writing one, and checking that the committed one is up to date."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def write_or_check(
    argv: Sequence[str] | None, *, module: str, source: str, make: str, render: Callable[[], str]
) -> int:
    """Write the page that the arguments name or, with --check, print how it differs; returns the exit status.

    Args:
        argv: `[--check] PATH`; None: the process's own.
        module: what `python -m` runs. source: what the page is made from, in words. make: the target that writes it.
        render: returns the whole page.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Write a page from {source}.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("path", type=Path)
    args = parser.parse_args(argv)
    wanted = render()
    if not args.check:
        args.path.write_text(wanted, encoding="utf-8")
        return 0
    found = args.path.read_text(encoding="utf-8") if args.path.exists() else ""
    if found == wanted:
        return 0
    difference = difflib.unified_diff(found.splitlines(), wanted.splitlines(), str(args.path), source, lineterm="")
    print("\n".join(difference))
    print(f"{args.path} differs from {source}: run `make {make}`", file=sys.stderr)
    return 1
