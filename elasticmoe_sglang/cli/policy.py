"""`elasticmoe policy`: show what the policy decides and why, or change its settings."""

from __future__ import annotations

import argparse
import re
import time
from typing import TYPE_CHECKING, Any

import msgspec

from elasticmoe_sglang.cli.client import ServerClient, add_server_arguments
from elasticmoe_sglang.cli.exits import OK
from elasticmoe_sglang.policy.settings import DECISIONS_KEPT, Autoscale

if TYPE_CHECKING:
    from rich.console import RenderableType

    from elasticmoe_sglang.policy.decision import Decision
    from elasticmoe_sglang.policy.view import PolicyView

_TEXT = "Show the autoscaling policy of a running server, its last decisions and their reasons, or change its settings."
_SECONDS = {
    "hold_s": "after a requested change, without actions",
    "grow_cool_down_s": "after a change, before the policy grows again",
    "shrink_cool_down_s": "after a change, before it shrinks again",
    "fast_window_s": "that growing looks at",
    "slow_window_s": "that shrinking looks at",
    "drain_s": "in which a queue is to be worked off",
    "unpaid_hold_s": "without growing after it did not pay",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `policy` command; its namespace carries `run`."""
    parser = subparsers.add_parser("policy", help=_TEXT, description=_TEXT)
    settings = parser.add_argument_group("settings to change")
    settings.add_argument("--slo", metavar="SLO", help="like ttft=1s,itl=50ms,attainment=0.9")
    settings.add_argument("--autoscale", choices=[mode.value for mode in Autoscale])
    settings.add_argument("--min-ep-size", type=int, metavar="N", help="the policy never goes below it")
    settings.add_argument("--forecast", choices=["on", "off"], help="whether expected load sets a floor")
    for name, text in _SECONDS.items():
        settings.add_argument(_flag(name), type=float, metavar="SECONDS", dest=name, help=f"seconds {text}")
    parser.add_argument(
        "--decisions",
        type=int,
        default=10,
        metavar="N",
        help="how many to show; those alike that follow each other are one, but not with --json (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_server_arguments(parser)
    parser.set_defaults(run=run)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def run(args: argparse.Namespace) -> int:
    """Change what was given, and print the policy."""
    client = ServerClient.from_args(args)
    names = ("slo", "autoscale", "min_ep_size", *_SECONDS)
    values: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.forecast is not None:
        values["forecast"] = args.forecast == "on"
    if values:
        client.set_policy(values)
    if args.json:
        print(msgspec.json.encode(client.policy(args.decisions)).decode())
        return OK
    from rich.console import Console

    Console().print(policy_panel(client.policy(DECISIONS_KEPT), args.decisions))
    return OK


def policy_panel(view: PolicyView, rows: int) -> RenderableType:
    """Settings, figures of the last minute and at most so many rows of decisions."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_row("autoscale", Text(view.mode.value, style="bold"))
    grid.add_row("state", view.state)
    grid.add_row("SLO", view.settings.slo or "none")
    grid.add_row("ranks", f"{_number(view.ranks)} active, {_number(view.desired_ranks)} desired")
    grid.add_row("allowed", f"{view.settings.min_ep_size} to {view.max_ep_size}")
    grid.add_row("attainment", "-" if view.attainment is None else f"{view.attainment:.1%}")
    for name, value in (("TTFT p50, p90, p99", view.ttft), ("ITL p50, p90, p99", view.itl)):
        grid.add_row(name, ", ".join(_milliseconds(part) for part in (value.p50, value.p90, value.p99)))
    grid.add_row("requests", f"{view.arrivals_per_s:.1f}/s, {view.running} run, {view.queue_length} wait")
    each = f"{view.tokens_per_s_per_rank:.0f} a rank, {view.goodput_tokens_per_s:.0f} within the SLO"
    grid.add_row("tokens/s", f"{view.tokens_per_s:.0f}, {each}")
    table = Table("at", "decision", "ranks", "because", "times", title="decisions, newest first", title_justify="left")
    for decision, times in turns(view.decisions)[:rows]:
        moved = str(decision.ranks) if decision.ranks == decision.desired else f"{decision.ranks} -> {decision.desired}"
        at = time.strftime("%H:%M:%S", time.localtime(decision.at))
        done = decision.acted or decision.ranks == decision.desired
        action = decision.action.value + ("" if done else " *")
        table.add_row(at, action, moved, decision.because, str(times) if times > 1 else "")
    return Group(grid, table, Text("* not carried out", style="dim")) if view.decisions else grid


def turns(decisions: list[Decision]) -> list[tuple[Decision, int]]:
    """Newest first: of decisions that follow each other and differ in numbers only, the newest and their number."""
    found: list[tuple[Decision, int]] = []
    for decision in decisions:
        if found and _sort_of(found[-1][0]) == _sort_of(decision):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((decision, 1))
    return found


def _sort_of(decision: Decision) -> tuple[object, ...]:
    return decision.action, decision.ranks, decision.desired, decision.acted, re.sub(r"[\d.]+", "", decision.because)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
