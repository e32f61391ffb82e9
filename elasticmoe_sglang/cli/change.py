"""What the commands have in common that start an operation: their flags, following it, and its exit status."""

from __future__ import annotations

import argparse
import sys

from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import FAILED, OK
from elasticmoe_sglang.coordinator.status import Operation, Phase


def add_change_arguments(parser: argparse.ArgumentParser, *, prints: str) -> None:
    """Add --wait, --timeout, --operation-id, --json and those of the server.

    Args:
        prints: what --json prints.
    """
    parser.add_argument("--wait", action="store_true", help="show the progress and return when the operation has ended")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="limit of --wait (default: %(default)g)"
    )
    parser.add_argument(
        "--operation-id",
        metavar="ID",
        help="id of the operation; repeating a command with the same id starts no new change",
    )
    parser.add_argument("--json", action="store_true", help=f"print the {prints} as JSON")
    add_server_arguments(parser)


def followed(client: ServerClient, operation: Operation, args: argparse.Namespace) -> Operation:
    """The operation as it is now or, with --wait, once it has ended or the limit is over."""
    if not args.wait:
        return operation
    from elasticmoe_sglang.cli.progress import OperationProgress

    # On stderr, so that --json prints only JSON on stdout.
    with OperationProgress() as progress:
        return client.follow(operation, args.timeout, progress.show)


def exit_status(operation: Operation, args: argparse.Namespace) -> int:
    """0 when it is done or, without --wait, has not failed; says on stderr when the limit of --wait is over."""
    if operation.phase is Phase.DONE or not args.wait:
        return FAILED if operation.phase in (Phase.FAILED, Phase.ROLLED_BACK) else OK
    if not operation.phase.ended:
        print(f"elasticmoe: still {operation.phase.value} after {args.timeout:g} s", file=sys.stderr)
    return FAILED
