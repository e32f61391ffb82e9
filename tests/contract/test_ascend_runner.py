"""SGLang 0.5.21's NPU MoE path with our runner core, on the CPU: its dispatcher, its MoeRunner, torch_npu's schemas.

The operators' arithmetic is tests/helpers/npu_ops.py, the Triton kernels are their lowered Linalg. Not an NPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from elasticmoe_kernels.ascend import moe
from elasticmoe_kernels.ascend.tiles import Tiles
from elasticmoe_kernels.reference.moe import moe_experts as reference
from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError
from tests.helpers import npu_ops
from tests.helpers.triton_ascend.execute import ToolMissing, tool, triton_ascend_python
from tests.helpers.triton_ascend.launch import LinalgKernel

EXPERTS, HIDDEN, INTER, TOP_K = 8, 64, 32, 2
SMALL = Tiles(block_m=16, block_n=32, block_k=32, block_h=64, block_i=32)


@pytest.fixture(scope="module")
def sglang_moe() -> Iterator[SimpleNamespace]:
    pytest.importorskip("sglang")
    from elasticmoe_patches.platform import torchvision_ops

    torchvision_ops.declare_if_unloadable()
    npu_ops.register()
    from sglang.srt.layers.moe.moe_runner import runner
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher.ascend_tp import AscendTPDispatcher
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    from elasticmoe_patches.srt.layers.moe.moe_runner import ascend
    from elasticmoe_patches.srt.layers.moe.token_dispatcher import ascend_tp
    from elasticmoe_patches.srt.layers.quantization.unquant import before_create_moe_runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ascend.ND_ENV, "0")  # register() sets it; put back at the end
        patch.setattr(ascend, "_registered", False)
        patch.setattr(runner, "_CUSTOM_RUNNER_CORE_FACTORIES", {})
        before_create_moe_runner(None, None, None)
        assert not runner._CUSTOM_RUNNER_CORE_FACTORIES, "this machine has no NPU"
        ascend.register()
        ascend.register()  # once a process is enough, twice is no error
        yield SimpleNamespace(
            Config=MoeRunnerConfig,
            Runner=runner.MoeRunner,
            Dispatcher=AscendTPDispatcher,
            TopK=StandardTopKOutput,
            ASCEND=MoeRunnerBackend.ASCEND,
            ours=ascend,
            hooks=ascend_tp,
        )


@pytest.fixture
def triton_as_linalg(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    try:
        triton_ascend_python()
        tool("mlir-opt")
    except ToolMissing as error:
        pytest.skip(str(error))
    for name in ("gather_rows", "grouped_gemm", "swiglu", "combine"):
        monkeypatch.setattr(moe, name, LinalgKernel(name))
    monkeypatch.setattr(moe, "cores_of", lambda device: moe.Cores(cube=3, vector=4))
    monkeypatch.setattr(moe, "tiles_for", lambda *sizes: SMALL)
    yield


def make_layer(sglang_moe: SimpleNamespace, slots: list[int], **changes: object) -> tuple[torch.nn.Module, object]:
    """One FusedMoE layer as the NPU path sees it: strided columns, a table with -1 for experts elsewhere."""
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Module()
    pitch = 2 * INTER * HIDDEN + HIDDEN * INTER
    column = torch.full((EXPERTS * pitch,), float("nan"))
    layer.w13_weight = column.as_strided((EXPERTS, 2 * INTER, HIDDEN), (pitch, HIDDEN, 1))
    layer.w2_weight = column.as_strided((EXPERTS, HIDDEN, INTER), (pitch, INTER, 1), 2 * INTER * HIDDEN)
    for slot in (slot for slot in slots if slot >= 0):
        layer.w13_weight[slot] = torch.randn(2 * INTER, HIDDEN, generator=generator) / HIDDEN**0.5
        layer.w2_weight[slot] = torch.randn(HIDDEN, INTER, generator=generator) / INTER**0.5
    fields = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "activation": "silu", "layer": layer}
    config = sglang_moe.Config(**{**fields, **changes})
    layer.dispatcher = sglang_moe.Dispatcher(config)
    sglang_moe.hooks.after_init(None, layer.dispatcher, config)
    layer.dispatcher.local_expert_mapping = torch.tensor([*slots, -1], dtype=torch.int32)
    return layer, config


def forward(sglang_moe: SimpleNamespace, layer: torch.nn.Module, config: object, x, ids, weights) -> torch.Tensor:
    runner = sglang_moe.Runner(sglang_moe.ASCEND, config)
    return layer.dispatcher.combine(runner.run(dispatch(sglang_moe, layer, x, ids, weights), layer))


def dispatch(sglang_moe: SimpleNamespace, layer: torch.nn.Module, x, ids, weights):
    """SGLang's dispatch behind our hook, as the hook registry would call it."""
    topk = sglang_moe.TopK(weights, ids, torch.empty(0))
    args, kwargs = sglang_moe.hooks.before_dispatch(layer.dispatcher, x, topk)
    return type(layer.dispatcher).dispatch(*args, **kwargs)


PLACEMENTS = {
    "all here": list(range(EXPERTS)),
    "a part, not in order": [5, -1, 0, -1, -1, 7, 1, -1],
    "one": [-1, -1, -1, 2, -1, -1, -1, -1],
    "none": [-1] * EXPERTS,
}


@pytest.mark.toolchain
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("gemm", ["triton", "grouped_matmul"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_the_layer(sglang_moe, triton_as_linalg, monkeypatch, gemm: str, tokens: int, placement: str) -> None:
    monkeypatch.setenv("ELASTICMOE_NPU_GEMM", gemm)
    slots = PLACEMENTS[placement]
    layer, config = make_layer(sglang_moe, slots)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator)
    out = forward(sglang_moe, layer, config, x, ids, weights)
    wanted = reference(x, layer.w13_weight, layer.w2_weight, torch.tensor(slots)[ids], weights)
    assert torch.isfinite(out).all()
    assert (out.double() - wanted).abs().max() <= 1e-5


@pytest.mark.toolchain
@pytest.mark.parametrize("gemm", ["triton", "grouped_matmul"])
def test_a_changed_table_is_seen_by_the_next_batch(sglang_moe, triton_as_linalg, monkeypatch, gemm: str) -> None:
    monkeypatch.setenv("ELASTICMOE_NPU_GEMM", gemm)
    layer, config = make_layer(sglang_moe, PLACEMENTS["all here"])
    runner = sglang_moe.Runner(sglang_moe.ASCEND, config)
    x, ids, weights = torch.randn(9, HIDDEN), torch.randint(0, EXPERTS, (9, TOP_K)), torch.rand(9, TOP_K)
    for slots in (PLACEMENTS["all here"], PLACEMENTS["a part, not in order"], PLACEMENTS["all here"]):
        layer.dispatcher.local_expert_mapping[:-1] = torch.tensor(slots, dtype=torch.int32)  # as a commit does
        out = layer.dispatcher.combine(runner.run(dispatch(sglang_moe, layer, x, ids, weights), layer))
        wanted = reference(x, layer.w13_weight, layer.w2_weight, torch.tensor(slots)[ids], weights)
        assert (out.double() - wanted).abs().max() <= 1e-5


@pytest.mark.toolchain
@pytest.mark.parametrize("gemm", ["triton", "grouped_matmul"])
def test_rows_of_absent_ranks_name_no_expert(sglang_moe, triton_as_linalg, monkeypatch, gemm: str) -> None:
    monkeypatch.setenv("ELASTICMOE_NPU_GEMM", gemm)
    slots = PLACEMENTS["a part, not in order"]
    layer, config = make_layer(sglang_moe, slots)
    x, weights = torch.randn(12, HIDDEN), torch.rand(12, TOP_K)
    ids = torch.randint(0, EXPERTS, (12, TOP_K))
    ids[4:9] = -1
    ids[10, 1] = -1
    table = torch.tensor([*slots, -1])  # index -1 is its last entry
    wanted = reference(x, layer.w13_weight, layer.w2_weight, table[ids], weights)
    out = forward(sglang_moe, layer, config, x, ids, weights)
    assert (out.double() - wanted).abs().max() <= 1e-5
    assert out[4:9].abs().max() == 0


def test_sglangs_own_core_is_replaced(sglang_moe) -> None:
    _, config = make_layer(sglang_moe, PLACEMENTS["all here"])
    assert type(sglang_moe.Runner(sglang_moe.ASCEND, config).runner_core).__name__ == "ColumnRunnerCore"


@pytest.mark.parametrize(
    "change",
    [{"activation": "gelu"}, {"is_gated": False}, {"apply_router_weight_on_input": True}, {"gemm1_clamp_limit": 7.0}],
)
def test_layers_it_would_compute_wrongly_are_refused(sglang_moe, change: dict[str, object]) -> None:
    _, config = make_layer(sglang_moe, PLACEMENTS["all here"], **change)
    with pytest.raises(UnsupportedFeature, match="plain SwiGLU"):
        sglang_moe.Runner(sglang_moe.ASCEND, config)


def test_weights_in_another_format_are_refused(sglang_moe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_NPU_DISABLE_ACL_FORMAT_WEIGHT", "0")
    _, config = make_layer(sglang_moe, PLACEMENTS["all here"])
    with pytest.raises(UnsupportedFeature, match="ND format"):
        sglang_moe.Runner(sglang_moe.ASCEND, config)


def test_an_unknown_gemm_is_named(sglang_moe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICMOE_NPU_GEMM", "cublas")
    with pytest.raises(UserInputError, match="triton, grouped_matmul"):
        sglang_moe.ours.chosen_gemm()
