"""`elasticmoe serve`: SGLang's own launcher with our flags in front."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import UserInputError

_TEXT = "Serve a model with seats that can be occupied and left while it decodes."
_EPILOG = """Every other flag goes to SGLang as it is (`python -m sglang.launch_server --help` lists them); tp, dp and
ep are set to the number of seats. The same server starts with `python -m sglang.launch_server --elasticmoe-ep-size 2
--elasticmoe-max-ep-size 4 ...`. Example: elasticmoe serve --model-path DIR --ep-size 2 --max-ep-size 4 --port 30000"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `serve` command; its namespace carries `run`."""
    usage = "elasticmoe serve --model-path DIR --ep-size N --max-ep-size N [any SGLang flag]"
    parser = subparsers.add_parser(
        "serve", help=_TEXT, description=_TEXT, epilog=_EPILOG, usage=usage, allow_abbrev=False
    )
    add_arguments(parser, short=True)
    parser.set_defaults(run=run)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our flags with their values, and everything else in its order, for SGLang."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser, short=True)
    names = set(parser._option_string_actions)
    ours: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help") or word.partition("=")[0] in names:
            ours.append(word)
            if word in names:
                ours.extend(value for value in [next(words, None)] if value is not None)
        else:
            rest.append(word)
    return ours, rest


def launch_argv(config: ElasticConfig, rest: Sequence[str]) -> list[str]:
    """The command that replaces this process."""
    return [sys.executable, "-m", "sglang.launch_server", *config.to_flags(), *rest]


def run(args: argparse.Namespace) -> int:
    """Check our flags, then become SGLang's launcher; returns only by an error."""
    config = ElasticConfig.from_namespace(args)
    if config is None:
        raise UserInputError("no size was given", hint="Add --ep-size (at the start) and --max-ep-size (seats)")
    argv = launch_argv(config, args.rest)
    sys.stdout.flush()
    os.execv(argv[0], argv)
