"""The policy's settings: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings, Slo, changed, check_sizes, parse_slo

SLO = "ttft=1s,itl=50ms,attainment=0.9"


def test_an_slo_is_read_and_written() -> None:
    assert parse_slo(SLO) == Slo(ttft_s=1.0, itl_s=0.05, attainment=0.9)
    assert parse_slo(" itl = 20ms ") == Slo(itl_s=0.02)
    assert parse_slo("ttft=2m,attainment=0.99") == Slo(ttft_s=120.0, attainment=0.99)
    assert parse_slo(str(parse_slo("ttft=1.5s,itl=50ms"))) == parse_slo("ttft=1.5s,itl=50ms")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not understood"),
        ("ttft", "not understood"),
        ("tpot=1s", "not understood"),
        ("ttft=1s,ttft=2s", "given twice"),
        ("ttft=1", "no time larger than zero"),
        ("ttft=0s", "no time larger than zero"),
        ("itl=-5ms", "no time larger than zero"),
        ("ttft=1h", "no time larger than zero"),
        ("attainment=0.9", "neither ttft nor itl"),
        ("ttft=1s,attainment=90", "no share between 0 and 1"),
        ("ttft=1s,attainment=1", "no share between 0 and 1"),
        ("ttft=1s,attainment=nan", "no share between 0 and 1"),
    ],
)
def test_what_is_no_slo_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        parse_slo(text)


def test_settings_change_partly() -> None:
    settings = changed(PolicySettings(), {"slo": SLO, "autoscale": "shadow", "hold_s": 5})
    assert (settings.autoscale, settings.hold_s, settings.forecast) == (Autoscale.SHADOW, 5.0, True)
    assert changed(settings, {"min_ep_size": 2}) == PolicySettings(
        slo=SLO, autoscale=Autoscale.SHADOW, hold_s=5.0, min_ep_size=2
    )
    assert changed(settings, {}) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"autoscale": "on"}, "there is no SLO"),
        ({"autoscale": "maybe", "slo": SLO}, "impossible"),
        ({"slo": "ttft=x"}, "no time larger"),
        ({"slo": 5}, "impossible"),
        ({"min_ep_size": 0}, "at least 1"),
        ({"min_ep_size": 1.5}, "impossible"),
        ({"min_ep_size": True}, "impossible"),
        ({"hold_s": -1}, "hold_s must be"),
        ({"hold_s": "10"}, "impossible"),
        ({"slow_window_s": 1}, "slow_window_s must be"),
        ({"fast_window_s": 1e9}, "fast_window_s must be"),
        ({"speed": 1}, "no setting 'speed'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        changed(PolicySettings(), values)


def test_the_smallest_size_is_at_most_the_largest() -> None:
    check_sizes(PolicySettings(min_ep_size=4), 4)
    with pytest.raises(UserInputError, match="min_ep_size 5"):
        check_sizes(PolicySettings(min_ep_size=5), 4)


def test_flags_are_checked_at_launch() -> None:
    def config(*flags: str) -> ElasticConfig | None:
        parser = argparse.ArgumentParser()
        add_arguments(parser, short=True)
        return ElasticConfig.from_namespace(parser.parse_args(["--max-ep-size", "4", *flags]))

    found = config("--slo", SLO, "--autoscale", "on", "--min-ep-size", "2", "--autoscale-hold", "30")
    assert found is not None
    assert found.policy_settings() == PolicySettings(slo=SLO, autoscale=Autoscale.ON, min_ep_size=2, hold_s=30.0)
    for flags, words in (
        (("--autoscale", "on"), "there is no SLO"),
        (("--slo", "fast"), "not understood"),
        (("--min-ep-size", "5"), "larger than the maximum"),
        (("--slo", SLO, "--autoscale", "yes"), "impossible"),
    ):
        with pytest.raises(UserInputError, match=words):
            config(*flags)
