"""`elasticmoe hmm`: an HMM that outlives the servers that use it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_TEXT = "Run the HMM as a process of its own, so that weights outlive the server."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `hmm` command; its namespace carries `run`. The HMM's own program parses the flags."""
    parser = subparsers.add_parser("hmm", help=_TEXT, add_help=False)
    parser.set_defaults(run=run)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """All flags belong to the HMM's program."""
    return [], list(argv)


def run(args: argparse.Namespace) -> int:
    """Run until a signal ends it."""
    from elasticmoe_sglang.hmm.__main__ import main

    return main(args.rest, prog="elasticmoe hmm")
