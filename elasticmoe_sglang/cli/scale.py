"""`elasticmoe scale`: change the number of active ranks, or retire or restore some."""

from __future__ import annotations

import argparse
import sys
import uuid

import msgspec

from elasticmoe_sglang.api.types import ScaleRequest
from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import FAILED, OK
from elasticmoe_sglang.coordinator.status import Operation, Phase

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
    parser.add_argument("--wait", action="store_true", help="show the progress and return when the operation has ended")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="limit of --wait (default: %(default)g)"
    )
    parser.add_argument(
        "--operation-id",
        metavar="ID",
        help="id of the operation; repeating a command with the same id starts no new change",
    )
    parser.add_argument("--json", action="store_true", help="print the operation as JSON")
    add_server_arguments(parser)
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
    operation: Operation = client.scale(request)
    if args.wait:
        operation = _follow(client, operation, args.timeout)
    if args.json:
        print(msgspec.json.encode(operation).decode())
    else:
        from rich.console import Console

        from elasticmoe_sglang.cli.render import operation_panel

        Console().print(operation_panel(operation))
    if operation.phase is Phase.DONE or not args.wait:
        return FAILED if operation.phase in (Phase.FAILED, Phase.ROLLED_BACK) else OK
    if not operation.phase.ended:
        print(f"elasticmoe: still {operation.phase.value} after {args.timeout:g} s", file=sys.stderr)
    return FAILED


def _follow(client: ServerClient, operation: Operation, timeout_s: float) -> Operation:
    from elasticmoe_sglang.cli.progress import OperationProgress

    # On stderr, so that --json prints only JSON on stdout.
    with OperationProgress() as progress:
        return client.follow(operation, timeout_s, progress.show)


def _ranks(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ranks like 1 or 1,3") from error
