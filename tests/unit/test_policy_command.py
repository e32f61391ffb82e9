"""What `elasticmoe policy` prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from elasticmoe_sglang.cli import policy
from elasticmoe_sglang.cli.main import build_parser
from elasticmoe_sglang.policy.decision import Action, Decision
from elasticmoe_sglang.policy.estimator import Quantiles
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings
from elasticmoe_sglang.policy.view import PolicyView

SLO = "ttft=1s,itl=50ms,attainment=0.9"


def printed(view: PolicyView) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(policy.policy_panel(view, 10))
    return console.export_text()


def decision(action: Action, ranks: int, desired: int, because: str, *, acted: bool = False) -> Decision:
    return Decision(at=0.0, action=action, ranks=ranks, desired=desired, because=because, acted=acted)


def test_figures_and_decisions() -> None:
    view = PolicyView(
        settings=PolicySettings(slo=SLO, autoscale=Autoscale.SHADOW, min_ep_size=2),
        mode=Autoscale.SHADOW,
        state="the load needs 2 ranks",
        ranks=2,
        max_ep_size=4,
        desired_ranks=3,
        attainment=0.875,
        ttft=Quantiles(p50=0.1, p90=0.5, p99=1.25),
        queue_length=7,
        tokens_per_s=200.0,
        tokens_per_s_per_rank=100.0,
        decisions=[
            decision(Action.GROW, 2, 3, "seven wait"),
            decision(Action.SHRINK, 3, 2, "few came", acted=True),
            decision(Action.NOTHING, 2, 2, "it fits"),
        ],
    )
    text = printed(view)
    for words in (SLO, "2 active, 3 desired", "2 to 4", "87.5%", "100 ms, 500 ms, 1.25 s", "7 wait", "100 a rank"):
        assert words in text, words
    rows = {line.split("│")[2].strip(): line for line in text.splitlines() if "│" in line}
    assert "2 -> 3" in rows["grow *"] and "seven wait" in rows["grow *"]
    assert "3 -> 2" in rows["shrink"] and "it fits" in rows["nothing"]


def test_decisions_that_differ_in_numbers_only_are_one_row() -> None:
    held = [decision(Action.NOTHING, 2, 2, f"held for {left} s more") for left in (8, 9, 10)]
    grown = decision(Action.GROW, 2, 3, "seven wait", acted=True)
    again = decision(Action.NOTHING, 2, 2, "held for 20 s more")
    assert policy.turns([*held, grown, again]) == [(held[0], 3), (grown, 1), (again, 1)]
    assert policy.turns([]) == []


def test_a_server_that_has_decided_nothing() -> None:
    text = printed(PolicyView(settings=PolicySettings(), mode=Autoscale.OFF, state="off", max_ep_size=4))
    assert "none" in text and "- active, - desired" in text and "newest first" not in text


def test_flags_have_the_settings_names() -> None:
    words = ["policy", "--slo", SLO, "--autoscale", "on", "--grow-cool-down", "1", "--hold", "2", "--forecast", "off"]
    args = build_parser().parse_args(words)
    assert (args.slo, args.autoscale, args.grow_cool_down_s, args.hold_s, args.forecast) == (SLO, "on", 1.0, 2.0, "off")
    settings = {name for name in PolicySettings.__struct_fields__ if hasattr(args, name)}
    assert settings == set(PolicySettings.__struct_fields__), "a setting that the command cannot set"


def test_an_unknown_mode_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["policy", "--autoscale", "maybe"])
    assert "invalid choice" in capsys.readouterr().err
