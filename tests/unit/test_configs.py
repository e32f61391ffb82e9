"""Every file under configs/ loads, fits its devices, and makes arguments that the launchers know."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from elasticmoe_sglang.comm.membership import MAX_CAPACITY
from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import BudgetExceeded, UnsupportedFeature, UserInputError
from elasticmoe_sglang.launch_config import DEVICES, GIB, MIN_KV_TOKENS, LaunchConfig, load_launch_config
from elasticmoe_sglang.model_shape import shape_of
from elasticmoe_sglang.models import ARCHITECTURES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.glob("*/*.json") if path.parent.name not in ("models", "grafana"))
MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b", "deepseek-v3")


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def config(request: pytest.FixtureRequest) -> LaunchConfig:
    return load_launch_config(request.param)


def test_every_model_on_every_device_is_there() -> None:
    assert {(path.parent.name, path.stem) for path in FILES} == {
        (device, model) for device in DEVICES for model in MODELS
    }


# Published totals in billions: the model cards of the three, DeepSeek-V3 without its multi-token-prediction layer.
@pytest.mark.parametrize(
    ("model", "billions", "column_mb", "kv_bytes"),
    [
        ("deepseek-v2-lite", 15.7, 26 * 3 * 2048 * 1408 * 2 / 1e6, 27 * 576 * 2),
        ("qwen3-30b-a3b", 30.5, 48 * 3 * 2048 * 768 * 2 / 1e6, 48 * 2 * 4 * 128 * 2),
        ("deepseek-v3", 671.0, 58 * 3 * 7168 * 2048 * 2 / 1e6, 61 * 576 * 2),
    ],
)
def test_shapes_add_up_to_the_published_sizes(model: str, billions: float, column_mb: float, kv_bytes: int) -> None:
    shape = shape_of(json.loads((CONFIGS / f"models/{model}.json").read_text()))
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.05)
    assert shape.column_bytes("bfloat16") / 1e6 == pytest.approx(column_mb)
    assert shape.kv_bytes_per_token() == kv_bytes


def test_each_fits_its_devices(config: LaunchConfig) -> None:
    assert config.device == config.name.split("/")[0]
    hbm = DEVICES[config.device].hbm_bytes
    for ep_size in {config.min_ep_size, config.elastic.ep_size, config.elastic.max_ep_size}:
        assert config.rank_bytes(ep_size) <= config.device_budget < hbm
        assert config.kv_tokens(ep_size) >= MIN_KV_TOKENS
    # Room beside the budget for the runtime, activations and graphs.
    assert hbm - config.device_budget >= 6 * GIB
    # All experts are somewhere, and every rank added gives room to the cache.
    assert config.kv_tokens(config.elastic.max_ep_size) >= config.kv_tokens(config.elastic.ep_size)
    assert config.elastic.max_ep_size <= MAX_CAPACITY


def test_what_one_machine_cannot_do_is_said(config: LaunchConfig) -> None:
    assert (config.num_nodes > 1) == any("machines are needed" in lack for lack in config.missing)
    assert config.shape.architecture in ARCHITECTURES or any("refused at launch" in lack for lack in config.missing)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """SGLang's own launcher with our flags."""
    pytest.importorskip("sglang")
    from elasticmoe_patches.platform import torchvision_ops

    torchvision_ops.declare_if_unloadable()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if not any(option.startswith("--elasticmoe-") for action in parser._actions for option in action.option_strings):
        add_arguments(parser)
    return parser


@pytest.mark.process
def test_the_arguments_are_known_to_sglang_and_to_us(config: LaunchConfig, parser: argparse.ArgumentParser) -> None:
    argv = config.to_argv()
    assert argv[:6] == [
        "--model-path",
        config.model_path,
        "--ep-size",
        str(config.elastic.ep_size),
        "--max-ep-size",
        str(config.elastic.max_ep_size),
    ]
    # `elasticmoe serve` turns the two sizes into our flags and hands the rest to SGLang.
    sizes = [f"--elasticmoe-{argv[2][2:]}", argv[3], f"--elasticmoe-{argv[4][2:]}", argv[5]]
    parsed = parser.parse_args([*argv[:2], *sizes, *argv[6:]])
    assert ElasticConfig.from_namespace(parsed) == config.elastic
    assert parsed.context_length == 16384


# ---- what is refused ----


def write(tmp_path: Path, change: dict[str, object], drop: str | None = None) -> Path:
    values = json.loads((CONFIGS / "h200/qwen3-30b-a3b.json").read_text())
    values["shape"] = str(CONFIGS / "models/qwen3-30b-a3b.json")
    elastic = {**values["elastic"], **change.pop("elastic", {})}  # type: ignore[dict-item]
    values = {**values, **change, "elastic": elastic}
    values.pop(drop, None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_weights_that_do_not_fit_are_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetExceeded, match=r"on 1 ranks a device must hold 58\.\d GiB, its budget is 40\.0 GiB"
    ) as caught:
        load_launch_config(write(tmp_path, {"elastic": {"device_budget": "40GiB"}}))
    assert caught.value.needed > caught.value.budget == 40 * GIB
    load_launch_config(write(tmp_path, {"elastic": {"device_budget": "40GiB"}, "min_ep_size": 2}))
    with pytest.raises(BudgetExceeded, match="leaves nothing"):
        load_launch_config(write(tmp_path, {"elastic": {"device_budget": "139GiB"}}))
    with pytest.raises(BudgetExceeded):  # two ranks share what one had
        load_launch_config(write(tmp_path, {"elastic": {"device_budget": "100GiB", "ranks_per_device": 2}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "h100"}, "'h100' is unknown"),
        ({"expert_dtype": "int3"}, "int3"),
        ({"min_ep_size": 3}, r"not in 1\.\.2"),
        ({"elastic": {"max_ep_size": 200}}, "200 ranks for 128 experts"),
        ({"elastic": {"max_ep_size": 16}}, "2 machines are needed"),
        ({"elastic": {"ep_size": 9}}, "larger than"),
        ({"elastic": {"ranks": 2}}, "no such setting"),
        ({"elastic": {"device_budget": "much"}}, "is not a size"),
        ({"colour": "blue"}, "colour"),
        ({"shape": "nowhere.json"}, "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(UserInputError, match=says):
        load_launch_config(write(tmp_path, change))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot be read"):
        load_launch_config(tmp_path / "none.json")
    with pytest.raises(UserInputError, match="model_path"):
        load_launch_config(write(tmp_path, {}, drop="model_path"))
    path = write(tmp_path, {})
    values = json.loads(path.read_text())
    del values["elastic"]["device_budget"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserInputError, match="device_budget is missing"):
        load_launch_config(path)
    with pytest.raises(UnsupportedFeature, match="LlamaForCausalLM"):
        shape_of({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(UserInputError, match="hidden_size"):
        shape_of({"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2})
