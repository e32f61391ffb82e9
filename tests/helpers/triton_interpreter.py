"""Child process of test_moe_triton_interpret: the CUDA kernels in Triton's interpreter, one line of JSON a case.

Run with TRITON_INTERPRET=1. Triton 3.6's interpreter has three faults that this file mends before any kernel runs:
it calls int() on one-element arrays, which numpy 2.4 refuses; its dot multiplies the bit patterns of bfloat16; and it
cuts off where the hardware rounds to nearest when it narrows float32 to bfloat16 or e4m3.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from elasticmoe_kernels.reference import combine as combine_reference
from elasticmoe_kernels.reference import quantize as quantize_reference
from elasticmoe_kernels.reference import route as route_reference
from elasticmoe_kernels.reference.moe import moe_experts, moe_experts_biased, moe_experts_fp8
from elasticmoe_kernels.triton import windows
from elasticmoe_kernels.triton.combine import combine
from elasticmoe_kernels.triton.config import GemmConfig, MoePlan, default_plan
from elasticmoe_kernels.triton.moe import fused_moe
from elasticmoe_kernels.triton.quantize import quantize
from elasticmoe_kernels.triton.route import route
from elasticmoe_kernels.triton.slots import slots_of_rows

SMALL = GemmConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2)
GROUPS = replace(SMALL, block_k=128)
PLANS = {
    "direct": MoePlan(direct=True, w13=SMALL, w2=SMALL),
    "direct-swap": MoePlan(direct=True, w13=replace(SMALL, swap_ab=True), w2=replace(SMALL, swap_ab=True)),
    "direct-one-dot": MoePlan(
        direct=True, w13=replace(SMALL, swap_ab=True, one_dot=True), w2=replace(SMALL, swap_ab=True)
    ),
    "direct-tma": MoePlan(direct=True, w13=replace(SMALL, tma=True), w2=replace(SMALL, tma=True, swap_ab=True)),
    "sorted": MoePlan(direct=False, w13=SMALL, w2=replace(SMALL, block_n=64)),
    "two-parts": MoePlan(direct=False, w13=replace(SMALL, block_m=32), w2=replace(SMALL, persistent=True)),
    "sorted-swap": MoePlan(direct=False, w13=replace(SMALL, swap_ab=True, group_m=4), w2=replace(SMALL, swap_ab=True)),
    "persistent": MoePlan(
        direct=False, w13=replace(SMALL, persistent=True, group_m=8), w2=replace(SMALL, persistent=True, per_sm=2)
    ),
    "tma": MoePlan(
        direct=False, w13=replace(SMALL, tma=True, group_m=2), w2=replace(SMALL, tma=True, tma_rows=True, group_m=2)
    ),
    "one-dot": MoePlan(
        direct=False,
        w13=replace(SMALL, tma=True, one_dot=True, persistent=True),
        w2=replace(SMALL, tma=True, tma_rows=True, persistent=True),
    ),
}
FP8_PLANS = {
    "direct": MoePlan(direct=True, w13=GROUPS, w2=GROUPS),
    "direct-swap": MoePlan(direct=True, w13=replace(GROUPS, swap_ab=True), w2=replace(GROUPS, swap_ab=True)),
    "direct-first": MoePlan(
        direct=True,
        w13=replace(GROUPS, swap_ab=True, one_dot=True, block_n=128, tma=True),
        w2=replace(GROUPS, swap_ab=True),
        quantize_first=True,
    ),
    "direct-x-first": MoePlan(direct=True, w13=replace(GROUPS, one_dot=True), w2=GROUPS, quantize_first=True),
    "sorted": MoePlan(direct=False, w13=GROUPS, w2=replace(GROUPS, block_n=64)),
    "sorted-swap": MoePlan(direct=False, w13=replace(GROUPS, swap_ab=True), w2=replace(GROUPS, swap_ab=True, tma=True)),
    "quantize-first": MoePlan(
        direct=False, w13=replace(GROUPS, block_n=128), w2=replace(GROUPS, tma=True, tma_rows=True), quantize_first=True
    ),
    "quantize-first-tma": MoePlan(
        direct=False,
        w13=replace(GROUPS, block_n=128, tma=True, persistent=True),
        w2=replace(GROUPS, block_n=128, persistent=True),
        quantize_first=True,
    ),
}


def mend_interpreter() -> None:
    patch = interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float
    narrow = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def rounded(data, source, target, rounding_mode):
        if source == tl.float8e4nv and target == tl.float16:  # exact either way; this one is fast
            tile = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8)).view(torch.float8_e4m3fn)
            return tile.half().view(torch.uint16).numpy()
        if source != tl.float32 or target not in narrow:
            return convert(data, source, target, rounding_mode)
        dtype, bits = narrow[target]
        wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return wide.to(dtype).view(bits).numpy()

    interpreter._patch_lang_tensor = patched
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = create_dot


def routing_case(tokens, experts, top_k, kind, generator):
    """ids [T, K] int32 and a slot table that drops and moves experts."""
    table = torch.randperm(experts, generator=generator).int()
    table[torch.rand(experts, generator=generator) < 0.3] = -1
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.int()
    if kind == "one":  # every token to one expert, which is here
        table = torch.randperm(experts, generator=generator).int()
        ids = torch.full((tokens, 1), experts - 1, dtype=torch.int32)
    elif kind == "none":
        table.fill_(-1)
    elif kind == "holes":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
    elif kind == "slots":
        return torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -1, ids), None
    return ids, table


def poisoned_weights(slots, inter, hidden, dtype, named, generator):
    """Strided columns with gaps; slots that nothing names hold NaN in every element."""
    pitch = 3 * inter * hidden + 64
    columns = torch.full((slots, pitch), float("nan")).to(dtype)
    w13 = columns.as_strided((slots, 2 * inter, hidden), (pitch, hidden, 1))
    w2 = columns.as_strided((slots, hidden, inter), (pitch, inter, 1), 2 * inter * hidden)
    for slot in named:
        w13[slot] = (torch.randn(2 * inter, hidden, generator=generator) / hidden**0.5).to(dtype)
        w2[slot] = (torch.randn(hidden, inter, generator=generator) / inter**0.5).to(dtype)
    return w13, w2


def error(out, reference):
    norm = float(reference.norm())
    difference = float((out.double() - reference).norm())
    return difference if norm == 0 else difference / norm


def layer(plan, tokens, hidden, inter, experts, top_k, dtype, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, table = routing_case(tokens, experts, top_k, kind, generator)
    slots = route_reference.slots_of(ids, table)
    w13, w2 = poisoned_weights(experts, inter, hidden, dtype, set(slots.flatten().tolist()) - {-1}, generator)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    weights[slots < 0] = float("nan")
    out = torch.full((tokens, hidden), float("nan"), dtype=dtype)
    fused_moe(x, w13, w2, ids, weights, slot_table=table, out=out, plan=plan)
    return error(out, moe_experts(x, w13, w2, slots, weights))


def layer_fp8(plan, tokens, hidden, inter, experts, top_k, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, table = routing_case(tokens, experts, top_k, kind, generator)
    slots = route_reference.slots_of(ids, table)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, inter, generator=generator) / inter**0.5
    q13, s13 = quantize_reference.quantize_weight(w13)
    q2, s2 = quantize_reference.quantize_weight(w2)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights = torch.rand(ids.shape, generator=generator)
    out = torch.full((tokens, hidden), float("nan"), dtype=torch.bfloat16)
    fused_moe(x, q13, q2, ids, weights, slot_table=table, w13_scale=s13, w2_scale=s2, out=out, plan=plan)
    return error(out, moe_experts_fp8(x, q13, q2, s13, s2, slots, weights))


def layer_biased(plan, tokens, hidden, inter, experts, top_k, dtype, kind, seed):
    """Biases lie in the columns of the weights; the limit is one that a third of all values reach."""
    generator = torch.Generator().manual_seed(seed)
    ids, table = routing_case(tokens, experts, top_k, kind, generator)
    slots = route_reference.slots_of(ids, table)
    named = set(slots.flatten().tolist()) - {-1}
    w13, w2 = poisoned_weights(experts, inter, hidden, dtype, named, generator)
    pitch = 2 * inter + hidden + 16
    columns = torch.full((experts, pitch), float("nan"))
    b13, b2 = columns[:, : 2 * inter], columns[:, 2 * inter : 2 * inter + hidden]
    for slot in named:
        b13[slot] = torch.randn(2 * inter, generator=generator)
        b2[slot] = torch.randn(hidden, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    weights[slots < 0] = float("nan")
    out = torch.full((tokens, hidden), float("nan"), dtype=dtype)
    more = {"w13_bias": b13, "w2_bias": b2, "clamped": (1.702, 1.0)}
    fused_moe(x, w13, w2, ids, weights, slot_table=table, out=out, plan=plan, **more)
    return error(out, moe_experts_biased(x, w13, w2, b13, b2, slots, weights, alpha=1.702, limit=1.0))


def check_route(tokens, experts, top_k, kind, block_m, seed):
    """Every pair that is here has exactly one row, in a block of its slot, and blocks are filled from the front."""
    generator = torch.Generator().manual_seed(seed)
    ids, table = routing_case(tokens, experts, top_k, kind, generator)
    got = route(ids, table, num_slots=experts, mapped_slots=experts, block_m=block_m)
    found: dict[int, set[int]] = {}
    used = int(got.num_blocks)
    assert used <= got.capacity_blocks, (used, got.capacity_blocks)
    sizes: dict[int, list[int]] = {}
    for block in range(used):
        slot, rows = int(got.block_slot[block]), int(got.block_rows[block])
        members = got.pair_of_row[block * block_m : block * block_m + rows].tolist()
        for row, pair in enumerate(members, start=block * block_m):
            assert int(got.row_of_pair[pair]) == row
        found.setdefault(slot, set()).update(members)
        sizes.setdefault(slot, []).append(rows)
    wanted = route_reference.pairs_of_slot(ids, table)
    assert found == wanted, "pairs went to the wrong slots"
    assert sizes == {s: route_reference.blocks_of_slot(len(p), block_m) for s, p in wanted.items()}
    assert list(sizes) == sorted(sizes), "blocks are not in slot order"
    assert int((got.row_of_pair >= 0).sum()) == sum(map(len, wanted.values()))


def check_parts(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 384, generator=generator).bfloat16()
    q, scale = quantize(x)
    wanted, wanted_scale = quantize_reference.quantize(x)
    assert torch.allclose(scale, wanted_scale, rtol=1e-6)
    assert float((q.float() != wanted.float()).float().mean()) < 0.01  # ties after a division that rounds differently
    y = torch.randn(20, 300, generator=generator).half()
    rows = torch.randint(-1, 20, (7, 5), generator=generator).int()
    weights = torch.rand(7, 5, generator=generator)
    out = torch.full((7, 300), float("nan"), dtype=torch.float16)
    combine(y, rows, None, weights, out, direct=False)
    assert error(out, combine_reference.combine(y.double(), rows, weights)) < 1e-3


def check_slots(tokens, top_k, rows_per_rank, members, dtype, seed, turns=1):
    """Ids become slots, in each row's turn; rows of ranks that are not members become -1 whatever they name."""
    generator = torch.Generator().manual_seed(seed)
    experts = 9
    table = torch.randint(-1, experts, (turns, experts + 1), generator=generator, dtype=torch.int32)
    table[:, -1] = -1
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=dtype)
    control = torch.zeros(windows.COUNTERS, dtype=torch.int64)
    control[windows.MEMBERS] = sum(1 << rank for rank in members)
    counts = torch.zeros(experts, dtype=torch.int64)
    got = slots_of_rows(ids, table, control=control.data_ptr(), rows_per_rank=rows_per_rank, counts=counts)
    assert torch.equal(slots_of_rows(ids, table, control=control.data_ptr(), rows_per_rank=rows_per_rank), got)
    wanted = route_reference.slots_of_rows(ids, table, rows_per_rank)
    if rows_per_rank is not None:
        absent = [row for row in range(tokens) if row // rows_per_rank not in members]
        wanted[absent] = -1
    assert got.dtype == torch.int32 and torch.equal(got, wanted), (got, wanted)
    assert counts.tolist() == [int(((ids == expert) & (wanted >= 0)).sum()) for expert in range(experts)]


def main(part: str) -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    dtypes = {"float16": (torch.float16, 1.5e-3), "bfloat16": (torch.bfloat16, 6e-3)}
    cases = []
    if part == "route":
        for seed, (tokens, experts, top_k, kind) in enumerate(
            [(1, 4, 2, "mixed"), (33, 7, 3, "mixed"), (50, 8, 8, "one"), (20, 6, 2, "none"), (40, 17, 4, "holes"),
             (64, 12, 4, "slots"), (700, 9, 6, "mixed"), (1100, 5, 4, "holes")]
        ):  # fmt: skip
            for block_m in (16, 64):
                check_route(tokens, experts, top_k, kind, block_m, seed)
        check_parts(1)
        check_slots(12, 3, 3, (0, 2), torch.int64, 1)
        check_slots(2048, 8, 256, (0, 1, 5, 7), torch.int32, 2)
        check_slots(5, 4, None, (3,), torch.int32, 3)
        check_slots(0, 4, None, (3,), torch.int32, 3)
        check_slots(24, 3, 6, (0, 2), torch.int64, 4, turns=60)
        check_slots(2048, 8, 256, (0, 1, 5, 7), torch.int32, 5, turns=60)
        check_slots(70, 4, None, (3,), torch.int32, 6, turns=60)
        cases.append({"case": "route and parts", "error": 0.0, "limit": 1.0})
    elif part == "biased":
        for name, plan in PLANS.items():
            for tokens, kind in ((1, "mixed"), (7, "one")) if plan.direct else ((13, "mixed"), (9, "holes")):
                value = layer_biased(plan, tokens, 72, 40, 6, 3, torch.float16, kind, tokens)
                cases.append({"case": f"biased {name} {tokens} {kind}", "error": value, "limit": 1.5e-3})
        for tokens in (3, 40):
            value = layer_biased(
                default_plan(tokens, 3, 6, fp8=False), tokens, 64, 32, 6, 3, torch.bfloat16, "mixed", 2
            )
            cases.append({"case": f"biased default {tokens}", "error": value, "limit": 6e-3})
    elif part == "fp8":
        for name, plan in FP8_PLANS.items():
            for tokens, kind in ((1, "mixed"), (7, "one")) if plan.direct else ((7, "mixed"),):
                value = layer_fp8(plan, tokens, 256, 128, 4, 2, kind, tokens)
                cases.append({"case": f"fp8 {name} {tokens} {kind}", "error": value, "limit": 3e-2})
        value = layer_fp8(default_plan(40, 2, 4, fp8=True), 40, 256, 128, 4, 2, "mixed", 1)
        cases.append({"case": "fp8 default", "error": value, "limit": 3e-2})
    else:
        dtype, limit = dtypes[part]
        runs = [(name, (13, 72, 40, "mixed")) for name in PLANS]
        runs += [(name, (1, 64, 32, "mixed")) for name in PLANS if name.startswith("direct")]
        if part == "float16":
            runs += [(name, (37, 72, 40, "holes")) for name in PLANS if not name.startswith("direct")]
            runs += [(n, c) for n in ("direct", "sorted", "one-dot") for c in
                     ((16, 64, 48, "one"), (3, 64, 32, "none"), (9, 40, 24, "slots"))]  # fmt: skip
        for name, (tokens, hidden, inter, kind) in runs:
            value = layer(PLANS[name], tokens, hidden, inter, 6, 3, dtype, kind, tokens)
            cases.append({"case": f"{name} {tokens}x{hidden}x{inter} {kind}", "error": value, "limit": limit})
        for tokens in (3, 40):
            value = layer(default_plan(tokens, 3, 6, fp8=False), tokens, 64, 32, 6, 3, dtype, "mixed", 2)
            cases.append({"case": f"default {tokens}", "error": value, "limit": limit})
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
