"""Calls against the real torch_npu's operators and classes: schemas, shapes on meta tensors, HCCL's constructor."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from elasticmoe_kernels.ascend import npu_ops
from elasticmoe_kernels.registry import select
from elasticmoe_sglang.comm.hccl import EpochGroups, build_hccl
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import PeerTimeout
from elasticmoe_sglang.hmm.vmm import get_backend
from tests.helpers.npu_ops import SCHEMAS

pytestmark = pytest.mark.toolchain

M = 2 << 20
ND = 2  # ACL_FORMAT_ND


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_used_elsewhere_are_the_real_ones(name: str) -> None:
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
