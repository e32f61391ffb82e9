"""`elasticmoe hmm`: a memory sidecar that outlives the servers that use it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_TEXT = "Run the memory sidecar on its own, so that weights outlive the server."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `hmm` command; its namespace carries `run`. The sidecar's own program reads the flags."""
    parser = subparsers.add_parser("hmm", help=_TEXT, add_help=False)
    parser.set_defaults(run=run)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Nothing is ours."""
    return [], list(argv)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    from elasticmoe_sglang.hmm.__main__ import main

    return main(args.rest, prog="elasticmoe hmm")
