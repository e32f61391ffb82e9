"""`elasticmoe bench`: benchmarks of changing the EP size, from `benchmarks/` in a checkout of the repository."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from elasticmoe_sglang.errors import UserInputError

_TEXT = "Compare changing the EP size with a restart and other methods (needs a checkout)."
_CHECKOUT = Path(__file__).parents[2]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench` command; its namespace carries `run`."""
    parser = subparsers.add_parser("bench", help=_TEXT, description=_TEXT, add_help=False)
    parser.set_defaults(run=run)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """All flags belong to the benchmarks' own parser, also --help."""
    return [], list(argv)


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks of this checkout, or else of the current folder.

    Raises:
        UserInputError: there are none. They are not part of the installed package.
    """
    for root in (_CHECKOUT, Path.cwd()):
        if (root / "benchmarks" / "scaling" / "main.py").is_file():
            sys.path.insert(0, str(root))
            return int(importlib.import_module("benchmarks.scaling.main").main(args.rest))
    raise UserInputError(
        "the benchmarks are not installed with the package",
        hint="Run this in a checkout of the repository, where `make venv` puts the command",
    )
