"""`elasticmoe top`: the operator's page on a terminal."""

from __future__ import annotations

import argparse
import threading
import time

from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import OK, ServerRefused, ServerUnreachable
from elasticmoe_sglang.cli.seen import Seen

_TEXT = "Follow a running server: figures, ranks, placement, memory, changes, policy."
_DESCRIPTION = f"{_TEXT} Where the output is not a terminal, print what there is and end."
_RETRY_S = 1.0
_POLICY_S = 2.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `top` command; its namespace carries `run`."""
    parser = subparsers.add_parser("top", help=_TEXT, description=_DESCRIPTION)
    parser.add_argument("--once", action="store_true", help="print what there is and end")
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow until interrupted, through restarts of the server; or print once."""
    from rich.console import Console
    from rich.live import Live

    from elasticmoe_sglang.cli.top_view import top_view

    client, seen, console = ServerClient.from_args(args), Seen(), Console()
    # The first event is waited for here: a server that refuses or does not answer ends the command.
    events = client.events()
    first = next(events, None)
    if first is None:
        raise ServerUnreachable(f"the server at {client.url} has closed the connection", hint="Try again")
    seen.take(first)
    seen.policy = client.policy_if_any()
    if args.once or not console.is_terminal:
        events.close()
        console.print(top_view(seen, console.width, height=None))
        return OK
    threading.Thread(target=_watch_policy, args=(client, seen), daemon=True).start()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(top_view(seen, console.width, console.height), refresh=True)
            try:
                seen.take(next(events))
            except (ServerUnreachable, StopIteration) as error:
                seen.lost = str(error) or "the server has closed the connection"
                live.update(top_view(seen, console.width, console.height), refresh=True)
                time.sleep(_RETRY_S)
                events = client.events()


def _watch_policy(client: ServerClient, seen: Seen) -> None:
    while True:
        time.sleep(_POLICY_S)
        try:
            seen.policy = client.policy_if_any()
        except (ServerUnreachable, ServerRefused):
            seen.policy = None  # the events' stream says what is wrong
