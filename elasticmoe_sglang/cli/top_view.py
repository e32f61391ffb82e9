"""What `elasticmoe top` draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from elasticmoe_sglang.cli.client import Policy
from elasticmoe_sglang.cli.render import (
    draw_placement,
    memory_view,
    milliseconds,
    operation_panel,
    operations_table,
    ranks_table,
)
from elasticmoe_sglang.cli.seen import Seen
from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.live_figures import Figures

_BARS = " ▁▂▃▄▅▆▇█"
_LABEL = 14
_VALUE = 20
_OPERATIONS = 5
_DECISIONS = 4
_POLICY_FIGURES = ("desired_ranks", "attainment", "goodput_tokens_per_s")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


_LINES = (
    ("tokens/s", "tokens", _count),
    ("TTFT p99", "ttft_p99_ms", milliseconds),
    ("longest gap", "longest_gap_ms", milliseconds),
)
"""Name, field of Figures, how its values are written."""


def top_view(seen: Seen, width: int, height: int | None) -> RenderableType:
    """Everything, the most important first.

    Args:
        width, height: of the terminal, in characters; None: as high as it gets.
    """
    event = seen.event
    assert event is not None, "there was no event"
    status = event.status
    parts: list[RenderableType] = [_head(seen)]
    if seen.lost:
        parts.append(Text(f"not connected: {seen.lost}", style="bold red"))
    parts.append(figures_view(list(seen.figures), seen.operations, int(event.at), width))
    if status.running is not None:
        parts.append(operation_panel(status.running))
    parts += [ranks_table(status), draw_placement(status.placement, status.copies), memory_view(status.memory)]
    parts += [policy_view(seen.policy), operations_table(seen.operations[:_OPERATIONS])]
    view = Group(*parts)
    return view if height is None else Panel(view, height=height, padding=0, border_style="dim")


def _head(seen: Seen) -> Text:
    event = seen.event
    assert event is not None
    status = event.status
    return Text.assemble(
        ("ElasticMoE ", "bold"), event.model,
        ("   EP size ", "dim"), (str(status.ep_size), "bold"), (f" of {status.max_ep_size}", "dim"),
        ("   epoch ", "dim"), (str(status.epoch), "bold"),
        ("   at ", "dim"), _clock(event.at),
    )  # fmt: skip


def figures_view(figures: Sequence[Figures], operations: Sequence[Operation], now: int, width: int) -> RenderableType:
    """One line of bars for each figure, a second per character, and a line that marks changes.

    Args:
        now: Unix time in seconds, at the right end.
        width: of the terminal, in characters.
    """
    seconds = max(10, width - _LABEL - _VALUE - 6)
    by_second = {second.at: second for second in figures}
    shown = [by_second.get(at) for at in range(now - seconds, now)]
    last = next((second for second in reversed(shown) if second is not None), None)
    grid = Table.grid(padding=(0, 1))
    for name, field, show in _LINES:
        values = [getattr(second, field) if second is not None else None for second in shown]
        latest = next((value for value in reversed(values[-10:]) if value is not None), None)
        highest = max((value for value in values if value is not None), default=None)
        grid.add_row(Text(name, style="dim"), Text(bars(values), style="cyan"), f"{show(latest)} (max {show(highest)})")
    grid.add_row(Text("changes", style="dim"), _marks(operations, now, seconds), "")
    load = f"{last.running} running, {last.queued} waiting" if last is not None else "-"
    grid.add_row(Text("requests", style="dim"), Text(load), "")
    return grid


def bars(values: Sequence[float | None]) -> str:
    """One character for each value, its height a share of the highest value; a blank for None."""
    highest = max((value for value in values if value is not None), default=0)
    if not highest:
        return " " * len(values)
    steps = len(_BARS) - 1
    # What is not zero can be seen.
    return "".join(
        " " if value is None else _BARS[max(1 if value else 0, round(value / highest * steps))] for value in values
    )


def _marks(operations: Sequence[Operation], now: int, seconds: int) -> Text:
    line = [" "] * seconds
    for operation in reversed(operations):
        if operation.old_ep_size == operation.new_ep_size and not operation.columns_planned:
            continue
        place = int(operation.created_at) - (now - seconds)
        label = "▲balance" if operation.rebalances else f"▲{operation.old_ep_size}→{operation.new_ep_size}"
        for offset, character in enumerate(label):
            if 0 <= place + offset < seconds:
                line[place + offset] = character
    return Text("".join(line), style="magenta")


def policy_view(policy: Policy | None) -> RenderableType:
    """Mode, figures and the latest decisions; a sentence where the server has no policy."""
    if policy is None:
        return Text("policy: not available on this server", style="dim")
    grid = Table.grid(padding=(0, 1))
    figures = [f"{name} {_flat(policy[name])}" for name in _POLICY_FIGURES if name in policy]
    mode = policy.get("mode") or _settings(policy).get("autoscale")
    grid.add_row("policy", Text(" · ".join([str(mode), _flat(policy.get("state", "")), *figures])))
    for decision in _turns(list(policy.get("decisions") or []))[:_DECISIONS]:
        what = f"{decision['action']} ({decision.get('ranks')} -> {decision.get('desired')}): {decision.get('because')}"
        grid.add_row(Text(_clock(decision.get("at", 0)), style="dim"), Text(what))
    return grid


def _turns(decisions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Newest first; of decisions of the same kind that follow each other only the newest."""
    return [
        each for each, after in zip(decisions, [{}, *decisions], strict=False) if each["action"] != after.get("action")
    ]


def _settings(policy: Policy) -> dict[str, Any]:
    settings = policy.get("settings")
    return settings if isinstance(settings, dict) else {}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
