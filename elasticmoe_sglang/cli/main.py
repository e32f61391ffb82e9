"""`elasticmoe`: the command, with one module per subcommand.

A subcommand's module has `add_parser(subparsers)` and `run(args) -> int`; one that takes flags for another program also
has `split(argv) -> (ours, theirs)` and finds `theirs` in `args.rest`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from elasticmoe_sglang import SUPPORTED_SGLANGS, __version__
from elasticmoe_sglang.cli import (
    bench,
    doctor,
    hmm,
    operations,
    policy,
    rebalance,
    scale,
    serve,
    status,
    tiny_model,
    top,
)
from elasticmoe_sglang.cli.exits import FAILED, REFUSED, UNREACHABLE, ServerUnreachable
from elasticmoe_sglang.errors import ElasticMoEError, UserInputError

_COMMANDS = (serve, scale, rebalance, status, top, operations, policy, hmm, tiny_model, bench, doctor)
_SPLITTING = {"serve": serve.split, "hmm": hmm.split, "bench": bench.split}
_EPILOG = """exit status: 0 done; 1 the operation failed, was rolled back or did not end in time; 2 usage, or the server
refused; 3 the server cannot be reached"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Does not import torch: only subcommands that work with weights do."""
    parser = argparse.ArgumentParser(
        prog="elasticmoe",
        description="Serve a Mixture-of-Experts model with SGLang; change its expert-parallel size while it decodes.",
        epilog=_EPILOG,
    )
    versions = f"elasticmoe {__version__}, for SGLang {' and '.join(SUPPORTED_SGLANGS)}"
    parser.add_argument("--version", action="version", version=versions)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (see `cli/exits.py`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    if words and words[0] in _SPLITTING:
        ours, rest = _SPLITTING[words[0]](words[1:])
        words = [words[0], *ours]
    args = build_parser().parse_args(words)
    args.rest = rest
    try:
        return int(args.run(args))
    except ServerUnreachable as error:
        return _complain(error, UNREACHABLE)
    except UserInputError as error:
        return _complain(error, REFUSED)
    except ElasticMoEError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return 130


def _complain(error: Exception, status: int) -> int:
    print(f"elasticmoe: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
