"""`elasticmoe serve`: SGLang's own launcher with the elastic settings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import UserInputError

_TEXT = "Serve a model whose number of active ranks can change while it decodes."
_EPILOG = """Every other flag goes to SGLang as it is (`python -m sglang.launch_server --help` lists them); tp, dp and
ep are set to the number of ranks. The same server starts with `python -m sglang.launch_server --elasticmoe-ep-size 2
--elasticmoe-max-ep-size 4 ...`. Example: elasticmoe serve --model-path DIR --ep-size 2 --max-ep-size 4 --port 30000"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `serve` command; its namespace carries `run`."""
    usage = "elasticmoe serve --model-path DIR --ep-size N --max-ep-size N [any SGLang flag]"
    parser = subparsers.add_parser(
        "serve", help=_TEXT, description=_TEXT, epilog=_EPILOG, usage=usage, allow_abbrev=False
    )
    _add_own_arguments(parser)
    parser.set_defaults(run=run)


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    text = "A launch configuration (configs/README.md); flags override it. A YAML file goes to SGLang, as its --config."
    parser.add_argument("--config", metavar="FILE.json", help=text)
    add_arguments(parser, short=True)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The elastic flags with their values, and all other arguments in their order, for SGLang."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_own_arguments(parser)
    names = set(parser._option_string_actions)
    ours: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        taken = 2 if words[0] in names and len(words) > 1 else 1
        piece, words = words[:taken], words[taken:]
        name, _, value = piece[0].partition("=")
        theirs = name == "--config" and not (value or piece[-1]).endswith(".json")
        known = name in names or name in ("-h", "--help")
        (ours if known and not theirs else rest).extend(piece)
    return ours, rest


def launch_argv(config: ElasticConfig, rest: Sequence[str]) -> list[str]:
    """The command that replaces this process."""
    return [sys.executable, "-m", "sglang.launch_server", *config.to_flags(), *rest]


def run(args: argparse.Namespace) -> int:
    """Check the elastic flags, then replace this process by SGLang's launcher; returns only by an error."""
    base, rest = (None, list(args.rest)) if args.config is None else _read(args.config, args.rest)
    config = ElasticConfig.from_namespace(args, base)
    if config is None:
        raise UserInputError(
            "no size was given", hint="Add --ep-size (active ranks at the start) and --max-ep-size (all ranks)"
        )
    argv = launch_argv(config, rest)
    sys.stdout.flush()
    os.execv(argv[0], argv)


def _read(path: str, rest: Sequence[str]) -> tuple[ElasticConfig, list[str]]:
    """The file's elastic settings, and SGLang's flags: the file's first, so that the command line overrides them.

    Sets the file's environment variables, except those that are set already.
    """
    from elasticmoe_sglang.launch_config import load_launch_config

    launch = load_launch_config(path)
    if launch.missing:
        raise UserInputError(f"{path} cannot be served by this version: {'; '.join(launch.missing)}")
    for name, value in launch.environment.items():
        os.environ.setdefault(name, value)
    _, flags = split(launch.to_argv())
    return launch.elastic, [*flags, *rest]
