"""`elasticmoe bench`: benchmarks of changing the size, from `benchmarks/` beside this package in a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from elasticmoe_sglang.errors import UserInputError

_TEXT = "Measure what changing the size costs, beside the ways users have today (needs a checkout)."
_CHECKOUT = Path(__file__).parents[2]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench` command; its namespace carries `run`."""
    parser = subparsers.add_parser("bench", help=_TEXT, description=_TEXT, add_help=False)
    parser.set_defaults(run=run)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Everything is for the benchmarks' own parser, --help too."""
    return [], list(argv)


def run(args: argparse.Namespace) -> int:
    """Hand over to the benchmarks of this checkout, or else of the current folder.

    Raises:
        UserInputError: there are none. They are no part of the installed package: they need the tiny model, a folder
            for results and SGLang's own baselines, and their name is too common to be installed.
    """
    for root in (_CHECKOUT, Path.cwd()):
        if (root / "benchmarks" / "scaling" / "main.py").is_file():
            sys.path.insert(0, str(root))
            return int(importlib.import_module("benchmarks.scaling.main").main(args.rest))
    raise UserInputError(
        "the benchmarks are not installed with the package",
        hint="Run this in a checkout of the repository, where `make venv` puts the command",
    )
