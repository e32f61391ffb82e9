"""A kernel's first use on a GPU is reported, its second is not; another specialisation is a first use again."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from elasticmoe_kernels.triton.loads import KernelLoads

pytestmark = pytest.mark.gpu


@triton.jit
def _fill_kernel(out, value, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, value, mask=at < count)


def test_first_uses_are_reported_with_their_specialisation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    loads, told = KernelLoads(), list[str]()
    try:
        out = torch.zeros(256, dtype=torch.int32, device="cuda")
        _fill_kernel[(2,)](out, 3, 256, BLOCK=128)
        assert [kernel.partition("[")[0] for kernel in loads.before] == ["_fill_kernel"]
        loads.report(told.append)
        _fill_kernel[(2,)](out, 4, 256, BLOCK=128)
        assert not told and out.tolist() == [4] * 256
        _fill_kernel[(1,)](out, 5, 256, BLOCK=256)
        _fill_kernel[(1,)](out, 5, 256, BLOCK=256)
        assert len(told) == 1 and told[0].startswith("_fill_kernel[warps=4") and "BLOCK=256" in told[0], told
    finally:
        loads.close()
