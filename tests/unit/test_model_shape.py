"""The architectures as data: their sizes against the weights of tiny models, refusals, and the page made from them."""

from __future__ import annotations

import ast
import json
from math import prod
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open

from elasticmoe_patches.worker.stacked import is_stacked
from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError
from elasticmoe_sglang.hmm.layout import ALIGNMENT
from elasticmoe_sglang.model_shape import shape_of
from elasticmoe_sglang.models import ARCHITECTURES, REFUSED, architecture_of
from elasticmoe_sglang.models.docs import cases_of
from elasticmoe_sglang.tiny_model import Arch, make_tiny_model

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
QUANTISED = [each.arch for each in ARCHITECTURES.values() if each.fp8]


def test_every_architecture_has_a_tiny_model() -> None:
    assert {each.arch for each in ARCHITECTURES.values()} == set(get_args(Arch))
    assert not ARCHITECTURES.keys() & REFUSED.keys()


@pytest.mark.parametrize("arch", get_args(Arch))
def test_a_tiny_model_has_what_is_counted(arch: Arch, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, arch=arch, layers=3, experts=6, hidden=128)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    column = {name: size for name, size in sizes.items() if ".experts.5." in name}
    stacked = {name: size for name, size in sizes.items() if is_stacked(name)}
    assert (len(column), len(stacked)) == ((0, 4 * shape.moe_layers) if stacked else (3 * shape.moe_layers, 0))
    column |= {name: size // 6 for name, size in stacked.items()}
    assert sum(column.values()) == shape.column_parameters
    assert sum(sizes.values()) == shape.parameters
    assert shape.experts == 6


@pytest.mark.parametrize(
    ("layers", "experts", "billions", "kv_bytes"), [(24, 32, 20.91, 48 << 10), (36, 128, 116.83, 72 << 10)]
)
def test_gpt_oss_adds_up_to_its_published_sizes(layers: int, experts: int, billions: float, kv_bytes: int) -> None:
    """Of the model card, for gpt-oss-20b and gpt-oss-120b."""
    widths = {"hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    counts = {"num_hidden_layers": layers, "num_local_experts": experts}
    shape = shape_of({"architectures": ["GptOssForCausalLM"], **widths, **heads, **counts})
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert shape.kv_bytes_per_token() == kv_bytes


@pytest.mark.parametrize("arch", QUANTISED)
def test_a_quantised_column_weighs_its_scales_too(arch: Arch, tmp_path: Path) -> None:
    """What the checkpoint has of an expert, the sizes count, and the layout holds, but for alignment."""
    from elasticmoe_patches.worker.loader import column_layout

    folder = make_tiny_model(tmp_path, arch=arch, layers=3, experts=2, hidden=256, quantization="fp8")
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        column = [file.get_tensor(name) for name in file.keys() if ".experts.1." in name]  # noqa: SIM118
    weights, scales = column[0::2], column[1::2]
    assert {tensor.dtype for tensor in weights} == {torch.float8_e4m3fn} and len(scales) == len(weights)
    assert sum(tensor.nbytes for tensor in column) == shape.column_bytes("fp8_block128")
    layout = column_layout(moe_layers_like(shape.moe_layers, QUANTISED_EXPERT))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())
    assert sum(spec.nbytes for spec in layout.specs) == shape.column_bytes("fp8_block128")
    assert 0 <= layout.column_bytes - shape.column_bytes("fp8_block128") < 4 * shape.moe_layers * ALIGNMENT


def test_a_column_weighs_its_biases_too(tmp_path: Path) -> None:
    """Weights in bfloat16 and biases in float32, as the layout holds them, but for alignment."""
    from elasticmoe_patches.worker.loader import column_layout

    folder = make_tiny_model(tmp_path, arch="gpt_oss", layers=3, experts=2, hidden=256, dtype="bfloat16")
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    layout = column_layout(moe_layers_like(shape.moe_layers, BIASED_EXPERT))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())
    assert sum(spec.nbytes for spec in layout.specs) == shape.column_bytes("bfloat16")
    assert 0 <= layout.column_bytes - shape.column_bytes("bfloat16") < 4 * shape.moe_layers * ALIGNMENT


QUANTISED_EXPERT = {
    "w13_weight": ((256, 256), torch.float8_e4m3fn),
    "w13_weight_scale_inv": ((2, 2), torch.float32),
    "w2_weight": ((256, 128), torch.float8_e4m3fn),
    "w2_weight_scale_inv": ((2, 1), torch.float32),
}
"""What SGLang's Fp8MoEMethod registers for experts of H = 256, I = 128: shape and dtype by name."""
BIASED_EXPERT = {
    "w13_weight": ((384, 256), torch.bfloat16),
    "w13_weight_bias": ((384,), torch.float32),
    "w2_weight": ((256, 192), torch.bfloat16),
    "w2_weight_bias": ((256,), torch.float32),
}
"""The same of its UnquantizedFusedMoEMethod, H = 256, I = 192."""


def moe_layers_like(number: int, expert: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> list[Any]:
    """Modules with these parameters for two experts, on the meta device."""
    layers = []
    for layer_id in range(number):
        layer = torch.nn.Module()
        layer.layer_id = layer_id
        for name, (shape, dtype) in expert.items():
            tensor = torch.empty((2, *shape), dtype=dtype, device="meta")
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        layers.append(layer)
    return layers


@pytest.mark.parametrize("name", [*REFUSED, "SomethingNewForCausalLM"])
def test_a_refusal_says_why(name: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        architecture_of({"architectures": [name]})
    reason = REFUSED.get(name, "nobody has looked yet")
    assert name in caught.value.what and reason in caught.value.what
    assert "Qwen3MoeForCausalLM" in str(caught.value.hint)


def test_a_gap_in_the_configuration_is_named() -> None:
    with pytest.raises(UserInputError, match="'num_hidden_layers'"):
        shape_of({"architectures": ["Qwen2MoeForCausalLM"]})


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda each: str(each.arch))
def test_the_tests_that_the_page_names_exist(arch: object) -> None:
    """Functions by their source; cases by a parameter that says the architecture or the case literally."""
    for test in cases_of(arch).values():  # type: ignore[arg-type]
        path, _, case = test.partition("::")
        name, _, parameters = case.partition("[")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert name in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}, test
        parameter = parameters.rstrip("]")
        assert f'"{parameter}"' in source or (parameter in get_args(Arch) and "get_args(Arch)" in source), test
