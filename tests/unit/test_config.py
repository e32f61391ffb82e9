"""The settings: flags in, one validated frozen object out."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from elasticmoe_sglang.config import ElasticConfig, add_arguments, flag
from elasticmoe_sglang.errors import UserInputError


def parse(*argv: str) -> ElasticConfig | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return ElasticConfig.from_namespace(parser.parse_args(argv))


def test_without_our_flags_there_is_no_config() -> None:
    assert parse() is None


def test_a_namespace_that_never_had_our_flags_gives_no_config() -> None:
    assert ElasticConfig.from_namespace(argparse.Namespace(model_path="x")) is None


def test_flags_reach_their_fields() -> None:
    values = {
        "ep_size": ("2", 2),
        "max_ep_size": ("6", 6),
        "attention_tp": ("2", 2),
        "ranks_per_device": ("2", 2),
        "multiprocessor_share": ("40", "40"),
        "cpu_bind": ("0-3;4-7;9", "0-3;4-7;9"),
        "standbys": ("0", 0),
        "restore": ("off", False),
        "hmm_endpoint": ("ipc:///tmp/x.sock", "ipc:///tmp/x.sock"),
        "device_budget": ("2GiB", 2 << 30),
        "headroom": ("0.02", "0.02"),
        "hot_standbys": ("4", 4),
        "redundant_experts": ("4", 4),
        "count_routing": ("on", "on"),
        "spare_imm": ("off", "off"),
        "kv_tokens": ("4096", 4096),
        "run_dir": ("/tmp/r", "/tmp/r"),
        "prepare_deadline_s": ("12.5", 12.5),
        "commit_deadline_s": ("1", 1.0),
        "finish_deadline_s": ("3", 3.0),
        "pull_bandwidth": ("1GiB", 1 << 30),
        "collective_deadline_s": ("9", 9.0),
        "window_bytes": ("64KiB", 64 << 10),
        "slo": ("ttft=2s", "ttft=2s"),
        "autoscale": ("shadow", "shadow"),
        "min_ep_size": ("2", 2),
        "autoscale_hold_s": ("60", 60.0),
    }
    assert values.keys() == {field.name for field in fields(ElasticConfig)}
    config = parse(*(part for name, (text, _) in values.items() for part in (flag(name), text)))
    assert config is not None
    assert config.to_dict() == {name: value for name, (_, value) in values.items()}


def test_flags_are_read_back() -> None:
    config = ElasticConfig(ep_size=1, max_ep_size=3, device_budget=12345, commit_deadline_s=2.5, run_dir="/x y")
    assert parse(*config.to_flags()) == config
    assert "--elasticmoe-standbys" not in config.to_flags()


def test_short_names_on_request() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, short=True)
    parsed = parser.parse_args(["--ep-size", "1", "--max-ep-size", "3", "--commit-deadline", "2", "--standbys=2"])
    expected = ElasticConfig(ep_size=1, max_ep_size=3, commit_deadline_s=2.0, standbys=2)
    assert ElasticConfig.from_namespace(parsed) == expected


def test_the_share_of_a_gpu() -> None:
    def share(text: str, ranks: int = 4) -> int | None:
        return ElasticConfig(
            ep_size=1, max_ep_size=4, ranks_per_device=ranks, multiprocessor_share=text
        ).mps_percentage()

    assert (share("equal"), share("all"), share("40"), share("equal", 8), share("40", 1)) == (25, None, 40, 12, None)
    for text in ("half", "0", "101", "-5", "12.5"):
        with pytest.raises(UserInputError, match="multiprocessor-share"):
            share(text)


def test_help_names_every_field() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    assert all(flag(field.name) in text for field in fields(ElasticConfig))


def test_flag_names() -> None:
    assert flag("max_ep_size") == "--elasticmoe-max-ep-size"
    assert flag("commit_deadline_s") == "--elasticmoe-commit-deadline"


def test_one_size_is_enough() -> None:
    assert parse("--elasticmoe-ep-size", "3") == ElasticConfig(ep_size=3, max_ep_size=3)
    assert parse("--elasticmoe-max-ep-size", "3") == ElasticConfig(ep_size=3, max_ep_size=3)


def test_a_flag_without_a_size_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"--elasticmoe-standbys was given without a size.*--elasticmoe-ep-size"):
        parse("--elasticmoe-standbys", "2")


def test_survives_pickle_and_json() -> None:
    config = ElasticConfig(ep_size=2, max_ep_size=4, device_budget=1 << 30, hmm_endpoint="ipc:///x")
    assert pickle.loads(pickle.dumps(config)) == config
    assert ElasticConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ElasticConfig(ep_size=1, max_ep_size=1).ep_size = 2  # type: ignore[misc]


def test_devices() -> None:
    config = ElasticConfig(ep_size=1, max_ep_size=5, ranks_per_device=2)
    assert [config.device_of(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    assert config.num_devices == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"ep_size": 0},
        {"ep_size": 5},
        {"ep_size": True},
        {"ep_size": 2.0},
        {"max_ep_size": -1},
        {"ranks_per_device": 0},
        {"standbys": -1},
        {"redundant_experts": -1},
        {"redundant_experts": 2, "count_routing": "off"},
        {"device_budget": 0},
        {"pull_bandwidth": -5},
        {"window_bytes": 100},
        {"prepare_deadline_s": 0},
        {"commit_deadline_s": float("nan")},
        {"finish_deadline_s": float("inf")},
        {"collective_deadline_s": "9"},
        {"hmm_endpoint": "/tmp/hmm.sock"},
    ],
)
def test_impossible_values_name_their_flag(bad: dict[str, object]) -> None:
    with pytest.raises(UserInputError, match=flag(next(iter(bad)))):
        ElasticConfig.from_dict({"ep_size": 2, "max_ep_size": 4} | bad)


def test_unknown_and_missing_settings() -> None:
    with pytest.raises(UserInputError, match="no such setting: ep_sise"):
        ElasticConfig.from_dict({"ep_sise": 2, "max_ep_size": 4})
    with pytest.raises(UserInputError, match="missing setting: max_ep_size"):
        ElasticConfig.from_dict({"ep_size": 2})


def test_a_bad_size_ends_argparse_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--elasticmoe-device-budget", "lots")
    assert "'lots' is not a size" in capsys.readouterr().err
