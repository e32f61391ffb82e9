"""`elasticmoe scale`: change the number of active ranks, or retire or restore some."""

from __future__ import annotations

import argparse
import uuid

import msgspec

from elasticmoe_sglang.api.types import ScaleRequest
from elasticmoe_sglang.cli.change import add_change_arguments, exit_status, followed
from elasticmoe_sglang.cli.client import ServerClient

_TEXT = "Change the expert-parallel size of a running server, or retire or restore ranks."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `scale` command; its namespace carries `run`."""
    parser = subparsers.add_parser("scale", help=_TEXT, description=_TEXT)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("size", metavar="N", type=int, nargs="?", help="number of active ranks")
    target.add_argument(
        "--retire", metavar="RANKS", type=_ranks, help="ranks to retire, like 1 or 1,3; rank 0 cannot be"
    )
    target.add_argument("--restore", metavar="RANKS", type=_ranks, help="inactive ranks to activate, like 2 or 2,3")
    add_change_arguments(parser, prints="operation")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Request the change; 0 when it was accepted, or with --wait when it is done."""
    client = ServerClient.from_args(args)
    request = ScaleRequest(
        new_ep_size=msgspec.UNSET if args.size is None else args.size,
        retire_ranks=msgspec.UNSET if args.retire is None else args.retire,
        restore_ranks=msgspec.UNSET if args.restore is None else args.restore,
        operation_id=args.operation_id or uuid.uuid4().hex,
    )
    operation = followed(client, client.scale(request), args)
    if args.json:
        print(msgspec.json.encode(operation).decode())
    else:
        from rich.console import Console

        from elasticmoe_sglang.cli.render import operation_panel

        Console().print(operation_panel(operation))
    return exit_status(operation, args)


def _ranks(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ranks like 1 or 1,3") from error
