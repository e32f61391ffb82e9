"""Calls against the real torch_npu's operators and classes: schemas, shapes on meta tensors, HCCL's constructor."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from elasticmoe_kernels.ascend import npu_ops
from elasticmoe_kernels.registry import select
from elasticmoe_sglang.comm.hccl import EpochGroups, build_hccl
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import PeerTimeout
from elasticmoe_sglang.hmm.vmm import get_backend
from tests.helpers.npu_ops import IMPLEMENTATIONS, SCHEMAS

pytestmark = pytest.mark.toolchain

M = 2 << 20
ND = 2  # ACL_FORMAT_ND


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_used_elsewhere_are_the_real_ones(name: str) -> None:
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{name}{SCHEMAS[name]}"


def calls(dtype: torch.dtype) -> dict[str, tuple[tuple[object, ...], dict[str, object]]]:
    """Arguments of each operator as SGLang and our kernels call it: 6 tokens, 2 experts each of 4."""
    rows, experts, weights = (
        torch.randn(12, 16).to(dtype),
        torch.tensor([[3, 0]] * 6, dtype=torch.int32),
        torch.rand(6, 2),
    )
    counts = torch.tensor([6, 0, 0, 6])
    grouped = {"split_item": 3, "group_type": 0, "group_list_type": 1, "group_list": counts, "output_dtype": dtype}
    routing = {
        "active_num": 12,
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
        "quant_mode": -1,
    }
    places = torch.arange(12, dtype=torch.int32)
    return {
        "npu_grouped_matmul": (([rows], [torch.randn(16, 8).to(dtype)] * 4), grouped),
        "npu_swiglu": ((rows,), {}),
        "npu_moe_init_routing_v2": ((rows[:6], experts), routing),
        "npu_moe_finalize_routing": ((rows, None, None, None, weights, places, None), {"drop_pad_mode": 2}),
    }


def kinds(outputs: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_used_elsewhere_are_the_real_ones(name: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes of what the helper computes, against torch_npu's Meta kernel for the same call."""
    arguments, options = calls(dtype)[name]
    meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (arguments, options))
    real = getattr(torch.ops.npu, name)(*meta[0], **meta[1])
    assert kinds(IMPLEMENTATIONS[name](*arguments, **options)) == kinds(real)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_alternative_calls_npu_grouped_matmul_rightly(dtype: torch.dtype) -> None:
    """Shapes and dtypes through torch_npu's own meta kernels."""
    rows, hidden, inter, slots = 48, 64, 32, 8
    pitch = 3 * 2 * inter * hidden
    columns = torch.empty(slots * pitch, dtype=dtype, device="meta")
    w13 = columns.as_strided((slots, 2 * inter, hidden), (pitch, hidden, 1))
    w2 = torch.empty(slots, hidden, inter, dtype=dtype, device="meta")
    experts = npu_ops.local_experts(w13, w2, [-1, 3, -1, 0, 7])
    assert [tuple(weight.shape) for weight in experts.w13] == [(hidden, 2 * inter)] * 3
    assert [tuple(weight.shape) for weight in experts.w2] == [(inter, hidden)] * 3
    counts = torch.empty(5, dtype=torch.int64, device="meta")
    out = npu_ops.expert_mlp(torch.empty(rows, hidden, dtype=dtype, device="meta"), counts, experts)
    assert out.shape == (rows, hidden) and out.dtype == dtype


def test_npu_tensors_get_the_ascend_kernels() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert select(torch.device("npu:0"), dtype).name == "ascend"


def test_columns_are_in_nd_format() -> None:
    backend = get_backend("npu")
    va, handle = backend.reserve(M), backend.create(M, 0)
    backend.map(va.base, handle)
    tensor = torch.empty(0, dtype=torch.bfloat16, device="npu:0").set_(backend.storage(va.base, M, 0), 0, (1024, 1024))
    assert torch.ops.npu.get_npu_format(tensor) == ND
    assert torch.ops.npu.get_npu_format(tensor[3:5].t()) == ND
    backend.unmap(va.base, M)
    backend.close(handle)
    backend.release_va(va)


def test_hccl_groups_are_built_as_torch_npu_wants_and_fail_loudly_here() -> None:
    store = dist.HashStore()
    group = build_hccl(dist.PrefixStore("probe", store), 0, 2, timedelta(seconds=5))
    assert (group.rank(), group.size(), group.name()) == (0, 2, "hccl")
    groups = EpochGroups(store, 0, device="npu:0")
    with pytest.raises(PeerTimeout, match="did not form"):
        groups.prepare(Membership(ranks=(0, 1), epoch=1, capacity=2), timeout_s=5)
