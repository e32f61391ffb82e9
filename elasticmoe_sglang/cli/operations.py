"""`elasticmoe operations`: the latest changes of a running server, or one of them."""

from __future__ import annotations

import argparse

import msgspec

from elasticmoe_sglang.api.types import OperationList
from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import OK
from elasticmoe_sglang.coordinator.status import Operation

_TEXT = "List the latest changes of a running server, or show one of them."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `operations` command; its namespace carries `run`."""
    parser = subparsers.add_parser("operations", help=_TEXT, description=_TEXT)
    parser.add_argument("operation_id", metavar="ID", nargs="?", help="show all details of this operation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the operations, newest first, or the one that was asked for."""
    client = ServerClient.from_args(args)
    payload: Operation | OperationList
    if args.operation_id is not None:
        payload = client.operation(args.operation_id)
    else:
        payload = OperationList(operations=client.operations())
    if args.json:
        print(msgspec.json.encode(payload).decode())
        return OK
    from rich.console import Console

    from elasticmoe_sglang.cli.render import operation_panel, operations_table

    Console().print(
        operation_panel(payload) if isinstance(payload, Operation) else operations_table(payload.operations)
    )
    return OK
