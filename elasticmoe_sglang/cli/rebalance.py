"""`elasticmoe rebalance`: place expert columns by how many tokens are routed to them, on the ranks that are active."""

from __future__ import annotations

import argparse

import msgspec

from elasticmoe_sglang.api.types import RebalanceAnswer, RebalanceRequest
from elasticmoe_sglang.cli.change import add_change_arguments, exit_status, followed
from elasticmoe_sglang.cli.client import ServerClient
from elasticmoe_sglang.cli.exits import OK
from elasticmoe_sglang.coordinator.status import Operation

_TEXT = (
    "Move and copy expert columns between the active ranks of a running server so that each gets an equal share of the "
    "tokens."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `rebalance` command; its namespace carries `run`."""
    parser = subparsers.add_parser("rebalance", help=_TEXT, description=_TEXT)
    defaults = RebalanceRequest()
    parser.add_argument(
        "--observe",
        type=float,
        default=defaults.observe_s,
        metavar="SECONDS",
        help="how long routing is observed first, under the load of that time (default: %(default)g)",
    )
    parser.add_argument(
        "--least-gain",
        type=float,
        default=defaults.least_gain,
        metavar="SHARE",
        help="do nothing unless the fullest rank's load falls by this share of the mean (default: %(default)g)",
    )
    parser.add_argument(
        "--copies",
        type=int,
        metavar="N",
        help="the most copies of columns afterwards (default: the server's --elasticmoe-redundant-experts)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add_change_arguments(parser, prints="answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Request it; 0 when nothing has to move or the change was accepted, or with --wait when it is done."""
    client = ServerClient.from_args(args)
    answer = client.rebalance(
        RebalanceRequest(
            observe_s=args.observe,
            least_gain=args.least_gain,
            copies=args.copies,
            dry_run=args.dry_run,
            operation_id=args.operation_id,
        )
    )
    operation = None if answer.operation is None else followed(client, answer.operation, args)
    if args.json:
        # The operation as it ended, in the place of the one that began.
        fields = msgspec.to_builtins(answer) | {"operation": msgspec.to_builtins(operation)}
        print(msgspec.json.encode(fields).decode())
    else:
        _show(answer, operation)
    return OK if operation is None else exit_status(operation, args)


def _show(answer: RebalanceAnswer, operation: Operation | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from elasticmoe_sglang.cli.render import operation_panel

    console = Console()
    table = Table("rank", "share of the routed tokens", "then")
    for rank, share in sorted(answer.rank_loads.items()):
        table.add_row(str(rank), f"{share:.1%}", f"{answer.expected_rank_loads[rank]:.1%}")
    console.print(table)
    console.print(
        f"{answer.observed_tokens} routed tokens seen; the fullest rank has {answer.imbalance:.2f} x the mean, "
        f"then {answer.expected_imbalance:.2f} x, with {answer.columns} columns moved"
    )
    if answer.copies or answer.expected_copies:
        console.print(f"copies of columns on further ranks: {answer.copies}, then {answer.expected_copies}")
    if operation is not None:
        console.print(operation_panel(operation))
    else:
        console.print(f"Nothing was moved: {answer.note}.")
