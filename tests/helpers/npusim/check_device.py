"""Mistakes that the simulated NPU finds. Runs in its venv; started by test_npusim.py."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_sglang.hmm.vmm import get_backend

pytestmark = pytest.mark.toolchain

M = 2 << 20


@pytest.fixture
def half_mapped():
    """A [2, n] float32 tensor of which only row 0 is mapped; and what unmaps it."""
    backend = get_backend("npu")
    space, handle = backend.reserve(2 * M), backend.create(M, 0)
    backend.map(space.base, handle)
    tensor = torch.empty(0, device="npu:0").set_(backend.storage(space.base, 2 * M, 0), 0, (2, M // 4))
    mapped = [True]

    def unmap() -> None:
        if mapped.pop():
            backend.unmap(space.base, M)

    yield tensor, unmap
    if mapped:
        unmap()
    backend.close(handle)
    backend.release_va(space)


def test_it_computes_on_the_device() -> None:
    left, right = torch.randn(4, 8), torch.randn(8, 3)
    made = left.to("npu:1") @ right.to("npu:1")
    assert made.device == torch.device("npu:1") and torch.equal(made.cpu(), left @ right)
    assert torch.equal(left.to("npu:0").t().double().cpu(), left.t().double())
    mask = (left > 0).to("npu:0")
    assert torch.equal(left.to("npu:0")[mask].cpu(), left[left > 0]), "an output whose size depends on values"


def test_a_wrong_device_index() -> None:
    with pytest.raises(RuntimeError, match=r"aten::add.Tensor gets tensors of npu:0 and npu:1"):
        torch.ones(3, device="npu:0") + torch.ones(3, device="npu:1")
    with pytest.raises(RuntimeError, match=r"npu::npu_rms_norm gets tensors of \['npu:0', 'npu:1'\]"):
        torch.ops.npu.npu_rms_norm(torch.ones(2, 8, device="npu:0"), torch.ones(8, device="npu:1"), 1e-6)


def test_memory_that_is_not_mapped(half_mapped) -> None:
    tensor, _ = half_mapped
    assert tensor[0].fill_(3).sum().item() == 3 * M // 4
    for wrong in (lambda: tensor[1].fill_(1), lambda: tensor.sum(), lambda: tensor[:, :5].clone()):
        with pytest.raises(RuntimeError, match=r"which are not all mapped on npu:0"):
            wrong()
    with pytest.raises(RuntimeError, match=r"is not mapped device memory"):
        tensor[1].copy_(torch.zeros(M // 4))


def test_a_use_after_unmap(half_mapped) -> None:
    tensor, unmap = half_mapped
    row = tensor[0]
    unmap()
    with pytest.raises(RuntimeError, match=r"not all mapped"):
        row + 1
    with pytest.raises(RuntimeError, match=r"is not mapped device memory"):
        row.cpu()


def test_copies_between_devices_go_by_canns_rules(half_mapped) -> None:
    tensor, _ = half_mapped
    tensor[0].fill_(5)
    assert tensor[0].to("npu:1").cpu().eq(5).all()
    assert tensor[0].view(2, -1).t().to("npu:1", torch.float64).cpu().eq(5).all()


def test_a_host_that_does_not_wait_for_a_copy() -> None:
    made = torch.arange(1000, device="npu:0")
    host = torch.full((1000,), -1).pin_memory()
    done = torch.npu.Event()
    with torch.npu.device(0):
        host.copy_(made, non_blocking=True)
        done.record()
    made.fill_(7)
    assert host.eq(-1).all() and not done.query(), "nobody has waited"
    done.synchronize()
    assert done.query() and host.equal(torch.arange(1000)), "what the device held when the copy was asked for"


def test_a_copy_of_columns_that_nobody_waits_for(monkeypatch) -> None:
    backend = get_backend("npu")
    pages, ranges = [backend.create(M, 0), backend.create(M, 1)], [backend.reserve(M), backend.reserve(M)]
    for va, page in zip(ranges, pages, strict=True):
        backend.map(va.base, page)
    source, target = (
        torch.empty(0, dtype=torch.uint8, device=f"npu:{n}").set_(backend.storage(va.base, M, n), 0, (M,))
        for n, va in enumerate(ranges)
    )
    source.fill_(9)
    backend.copy(ranges[1].base, ranges[0].base, M)
    assert target.eq(9).all()
    source.fill_(10)
    real = backend._acl.status
    monkeypatch.setattr(
        type(backend._acl),
        "status",
        lambda _, name, *rest: 0 if name == "aclrtSynchronizeStream" else real(name, *rest),
    )
    backend.copy(ranges[1].base, ranges[0].base, M)
    assert target.eq(9).all(), "the copy is not done"  # until this line asks the device for a value
    assert target.eq(10).all()
    backend.copy(ranges[1].base, ranges[0].base, M)
    monkeypatch.undo()
    for va, page in zip(ranges, pages, strict=True):
        backend.unmap(va.base, M)
        backend.close(page)
        backend.release_va(va)
    with pytest.raises(RuntimeError, match=r"a late copy: destination .* is not mapped device memory"):
        torch.npu.synchronize(1)


def test_an_operator_without_an_implementation_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"npu_fast_gelu|FastGelu"):
        torch.ops.npu.npu_fast_gelu(torch.ones(4, device="npu:0"))
    import sgl_kernel_npu.fla.chunk as chunk
    from sgl_kernel_npu.norm.l1_norm import l1_norm

    assert l1_norm(torch.ones(2, 4, device="npu:0")).cpu().eq(0.25).all()
    with pytest.raises(NotImplementedError, match=r"sgl_kernel_npu.fla.chunk.chunk_rule has no implementation"):
        chunk.chunk_rule(torch.ones(4))


def test_an_output_that_is_not_torch_npus(monkeypatch) -> None:
    from npusim_device import dispatch

    monkeypatch.setattr(dispatch, "to_device", lambda value, _device: value)
    kernel = dispatch._kernel("npu_swiglu", lambda x, dim=-1: x)
    with pytest.raises(RuntimeError, match=r"npu::npu_swiglu computes .* and torch_npu's Meta kernel says"):
        kernel(torch.ones(2, 8, device="npu:0"))
