"""The MoE layer on CPU against its float64 definition."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_kernels import NoBackend, ShapeError, moe_experts
from elasticmoe_kernels.cpu import moe as cpu_moe
from elasticmoe_kernels.reference.moe import moe_experts as reference

# Relative error (2-norm of the difference over that of the result) that each dtype allows.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def strided_weights(slots, inter, hidden, dtype, generator, gap=0):
    """w13 and w2 inside one column a slot, NaN between and behind them."""
    pitch = 3 * inter * hidden + gap
    columns = torch.full((slots, pitch), float("nan"), dtype=dtype)
    w13 = columns.as_strided((slots, 2 * inter, hidden), (pitch, hidden, 1))
    w2 = columns.as_strided((slots, hidden, inter), (pitch, inter, 1), 2 * inter * hidden)
    w13.copy_(torch.randn(w13.shape, generator=generator) / hidden**0.5)
    w2.copy_(torch.randn(w2.shape, generator=generator) / inter**0.5)
    return w13, w2


def relative_error(out, ref):
    scale = ref.norm()
    return 0.0 if scale == 0 and not out.any() else float((out.to(ref.dtype) - ref).norm() / scale)


@st.composite
def layers(draw):
    """Small layers that reach every path: gathered or grouped, widened or not, with and without absent pairs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 16, 33, 70]))
    slots = draw(st.integers(1, 9))
    k = draw(st.integers(1, min(slots, 8)))
    hidden, inter = draw(st.sampled_from([(8, 8), (40, 24), (64, 32), (33, 17), (272, 136)]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    absent = draw(st.sampled_from([0.0, 0.5, 1.0]))
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    w13, w2 = strided_weights(slots, inter, hidden, dtype, generator, gap=draw(st.sampled_from([0, 5])))
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    topk_slots = torch.rand(tokens, slots, generator=generator).topk(k).indices.to(index)
    gone = torch.rand(tokens, k, generator=generator) < absent
    topk_slots[gone] = -1
    weights = torch.rand(tokens, k, generator=generator)
    weights[gone] = float("nan")  # an absent pair's weight is never read
    return x, w13, w2, topk_slots, weights


@settings(max_examples=120, deadline=None)
@given(layers())
def test_equals_the_float64_definition(layer):
    x, *_ = layer
    out = moe_experts(*layer)
    assert out.dtype == x.dtype and out.shape == x.shape
    assert relative_error(out, reference(*layer)) <= TOLERANCE[x.dtype]


@settings(max_examples=40, deadline=None)
@given(layers())
def test_a_token_is_the_same_alone_and_in_a_batch(layer):
    x, w13, w2, slots, weights = layer
    together = moe_experts(*layer)
    for t in range(0, len(x), 7):
        alone = moe_experts(x[t : t + 1], w13, w2, slots[t : t + 1], weights[t : t + 1])
        assert relative_error(alone, together[t : t + 1].double()) <= TOLERANCE[x.dtype]


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(2, 4))
def test_experts_split_among_ranks_add_up(layer, ranks):
    """Each rank masks what it does not hold; the sum over ranks is the whole layer."""
    x, w13, w2, slots, weights = layer
    whole = moe_experts(*layer)
    parts = [
        moe_experts(x, w13, w2, torch.where((slots >= 0) & (slots % ranks == r), slots, -1), weights).double()
        for r in range(ranks)
    ]
    assert relative_error(sum(parts), whole.double()) <= 2 * TOLERANCE[x.dtype]


def test_repeats_bit_for_bit_and_combines_in_the_order_of_k():
    generator = torch.Generator().manual_seed(3)
    w13, w2 = strided_weights(8, 32, 64, torch.float32, generator)
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 64, generator=generator)
        slots = torch.rand(tokens, 8, generator=generator).topk(6).indices
        weights = torch.rand(tokens, 6, generator=generator)
        first = moe_experts(x, w13, w2, slots, weights)
        assert torch.equal(first, moe_experts(x, w13, w2, slots, weights))
        order = torch.from_numpy(cpu_moe.group_by_slot(slots, 8).order)
        y = torch.randn(len(order) + 1, 64, generator=generator)
        terms = torch.empty(tokens * 6, 64)
        terms[order] = y[:-1]
        expected = torch.zeros(tokens, 64)
        for k in range(6):
            expected += terms.view(tokens, 6, 64)[:, k] * weights[:, k : k + 1]
        assert torch.equal(cpu_moe._combine(y, order.numpy(), slots, weights, torch.float32), expected)


def test_every_token_to_one_expert_and_no_token_at_all():
    generator = torch.Generator().manual_seed(4)
    w13, w2 = strided_weights(4, 24, 40, torch.float32, generator)
    x = torch.randn(50, 40, generator=generator)
    slots = torch.full((50, 1), 2)
    weights = torch.rand(50, 1, generator=generator)
    assert relative_error(moe_experts(x, w13, w2, slots, weights), reference(x, w13, w2, slots, weights)) < 2e-6
    assert not moe_experts(x, w13, w2, torch.full((50, 1), -1), weights).any()


def test_a_long_prefill_is_cut_into_passes(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    w13, w2 = strided_weights(6, 24, 40, torch.float32, generator)
    x = torch.randn(101, 40, generator=generator)
    slots = torch.rand(101, 6, generator=generator).topk(2).indices
    weights = torch.rand(101, 2, generator=generator)
    whole = moe_experts(x, w13, w2, slots, weights)
    monkeypatch.setattr(cpu_moe, "MAX_ROWS_PER_PASS", 32)
    assert relative_error(moe_experts(x, w13, w2, slots, weights), whole.double()) < 2e-6


def test_groups_are_stable_and_complete():
    slots = torch.tensor([[2, 0], [-1, 2], [0, 5]])
    groups = cpu_moe.group_by_slot(slots, 6)
    assert groups.slots == [0, 2, 5] and groups.sizes == [2, 2, 1]
    assert groups.order.tolist() == [1, 4, 0, 3, 5]
    wide = cpu_moe.group_by_slot(slots, 2**16)  # keys too wide for the 16-bit sort
    assert wide.order.tolist() == groups.order.tolist() and wide.sizes == groups.sizes


def test_wrong_arguments_are_named():
    generator = torch.Generator().manual_seed(6)
    w13, w2 = strided_weights(4, 24, 40, torch.float32, generator)
    x, slots, weights = torch.randn(3, 40), torch.zeros(3, 2, dtype=torch.int32), torch.rand(3, 2)
    with pytest.raises(ShapeError, match="do not fit x"):
        moe_experts(x[:, :39], w13, w2, slots, weights)
    with pytest.raises(ShapeError, match="must both be"):
        moe_experts(x, w13, w2, slots[:2], weights)
    with pytest.raises(ShapeError, match="int32 or int64"):
        moe_experts(x, w13, w2, slots.float(), weights)
    with pytest.raises(ShapeError, match="share one dtype"):
        moe_experts(x.half(), w13, w2, slots, weights)
    with pytest.raises(ShapeError, match="w13: one slot's matrix must be contiguous"):
        moe_experts(x, w13.transpose(1, 2).contiguous().transpose(1, 2), w2, slots, weights)
    with pytest.raises(NoBackend, match="does not serve"):
        moe_experts(x, w13, w2, slots, weights, backend="triton")
    with pytest.raises(NoBackend, match="no MoE backend is called 'cuda'"):
        moe_experts(x, w13, w2, slots, weights, backend="cuda")


def _columns_with_holes(slots, mapped, inter, hidden, dtype):
    """A reservation of `slots` columns in which only `mapped` may be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    column = 3 * inter * hidden * dtype.itemsize
    pitch = -(-column // mmap.PAGESIZE) * mmap.PAGESIZE
    private_anonymous = 0x02 | 0x20
    base = libc.mmap(None, slots * pitch, 0, private_anonymous, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    for slot in mapped:
        assert libc.mprotect(base + slot * pitch, pitch, 3) == 0
    memory = torch.frombuffer((ctypes.c_char * (slots * pitch)).from_address(base), dtype=dtype)
    step = pitch // dtype.itemsize
    w13 = memory.as_strided((slots, 2 * inter, hidden), (step, hidden, 1))
    w2 = memory.as_strided((slots, hidden, inter), (step, inter, 1), 2 * inter * hidden)
    return w13, w2


def _run_with_holes(touch):
    """Runs in a child process: every path of the CPU layer with most slots unmapped."""
    torch.set_num_threads(1)
    mapped = [1, 4, 6]
    for dtype in (torch.float32, torch.bfloat16):
        for hidden, inter, tokens in ((64, 32, 1), (64, 32, 70), (272, 136, 4)):
            w13, w2 = _columns_with_holes(8, mapped, inter, hidden, dtype)
            for slot in mapped:
                w13[slot].normal_(std=hidden**-0.5)
                w2[slot].normal_(std=inter**-0.5)
            x = torch.randn(tokens, hidden).to(dtype)
            slots = torch.tensor([[6, -1, 1], [4, 6, -1], [-1, -1, 4]])[torch.arange(tokens) % 3]
            weights = torch.rand(tokens, 3)
            out = moe_experts(x, w13, w2, slots, weights)
            assert relative_error(out, reference(x, w13, w2, slots, weights)) <= TOLERANCE[dtype]
    if touch:
        print(float(w13[0, 0, 0]))
    print("whole")


@pytest.mark.process
@pytest.mark.parametrize("touch", [False, True], ids=["layer", "control"])
def test_unmapped_slots_are_never_touched(touch):
    """The control reads one element of an unmapped slot and must die: the holes are real."""
    child = subprocess.run(
        [sys.executable, __file__, "touch" if touch else "layer"], capture_output=True, text=True, timeout=120
    )
    if touch:
        assert child.returncode == -signal.SIGSEGV, child.stderr
    else:
        assert child.returncode == 0 and child.stdout == "whole\n", child.stderr


if __name__ == "__main__":
    _run_with_holes(sys.argv[1] == "touch")
