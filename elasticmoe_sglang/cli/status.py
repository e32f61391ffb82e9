"""`elasticmoe status`: ranks, placement, memory and operations of a running server."""

from __future__ import annotations

import argparse
import time

import msgspec

from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import OK

_TEXT = "Show ranks, membership, placement, memory and operations of a running server."


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `status` command; its namespace carries `run`."""
    parser = subparsers.add_parser("status", help=_TEXT, description=_TEXT)
    parser.add_argument("--json", action="store_true", help="print the status as JSON; with --watch, one line each")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=1.0,
        help="repeat until interrupted (default: every second)",
    )
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print once, or until interrupted."""
    client = ServerClient.from_args(args)
    if args.json:
        return _print_json(client, args.watch)
    from rich.console import Console
    from rich.live import Live

    from elasticmoe_sglang.cli.render import status_view

    if args.watch is None:
        Console().print(status_view(client.status()))
        return OK
    with Live(status_view(client.status()), auto_refresh=False) as live:
        while True:
            time.sleep(args.watch)
            live.update(status_view(client.status()), refresh=True)


def _print_json(client: ServerClient, interval: float | None) -> int:
    while True:
        print(msgspec.json.encode(client.status()).decode(), flush=True)
        if interval is None:
            return OK
        time.sleep(interval)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds larger than zero")
    return seconds
