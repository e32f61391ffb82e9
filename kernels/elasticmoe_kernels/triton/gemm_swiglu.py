# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""First grouped product and SwiGLU in one kernel: h[row] = silu(x @ gate.T) * (x @ up.T), slot by slot.

A program loads the gate tile and the up tile of the same BLOCK_N columns, so that the [rows, 2I] product
never goes to memory. In fp8 the activations are quantized while they are loaded (small batches), or come quantized
(prefill); then the result leaves quantized as well, since a program that owns 128 columns owns a whole scale group.
Biased experts have gpt-oss's clamped SwiGLU: gate * sigmoid(alpha * gate) * (up + 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from elasticmoe_kernels.triton.config import GemmConfig
from elasticmoe_kernels.triton.launch import TL_TYPES, address, multiprocessors, next_power_of_2, pdl_options
from elasticmoe_kernels.triton.quantize import quantize_tile
from elasticmoe_kernels.triton.route import Routing
from elasticmoe_kernels.triton.rows import block_and_column, direct_rows


@triton.jit
def _tile(x_ptr, xs_ptr, w_ptr, ws_ptr, b_ptr, h_ptr, hs_ptr, slot, source, source_valid, row, valid, column,
          hidden, inter, x_stride, xs_stride, w_stride, ws_stride, b_stride, h_stride, hs_stride, alpha, limit,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr,
          TMA: tl.constexpr, FP8: tl.constexpr, QUANT_IN: tl.constexpr, QUANT_OUT: tl.constexpr,
          EVEN_K: tl.constexpr, ONE_DOT: tl.constexpr, BIASED: tl.constexpr, W_TYPE: tl.constexpr,
          NUM_STAGES: tl.constexpr):  # fmt: skip
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * x_stride + offs_k[None, :]
    if not TMA:
        base = tl.multiple_of(tl.cast(w_ptr, tl.pointer_type(W_TYPE)), 16) + slot.to(tl.int64) * w_stride
        # Columns past the end read column 0: always mapped, and never stored.
        if ONE_DOT:
            part = tl.arange(0, 2 * BLOCK_N) // BLOCK_N
            n = column * BLOCK_N + tl.arange(0, 2 * BLOCK_N) % BLOCK_N
            w_row = part * inter + tl.where(n < inter, n, 0)
            w_ptrs = base + w_row[:, None].to(tl.int64) * hidden + offs_k[None, :]
        else:
            w_row = tl.where(offs_n < inter, offs_n, 0)
            gate_ptrs = base + w_row[:, None].to(tl.int64) * hidden + offs_k[None, :]
            up_ptrs = gate_ptrs + inter.to(tl.int64) * hidden
    if ONE_DOT:
        both = tl.zeros((2 * BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    else:
        gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FP8:
        # Weight scales are per 128 x 128 block; BLOCK_N divides 128, so a tile has one for gate and one for up.
        # Small tiles load their scales one step ahead: nothing else hides the latency. Large ones lack the registers.
        AHEAD: tl.constexpr = BLOCK_M <= 32
        groups = tl.cdiv(hidden, 128)
        ws_gate = tl.cast(ws_ptr, tl.pointer_type(tl.float32)) + slot.to(tl.int64) * ws_stride
        ws_gate += (column * BLOCK_N // 128) * groups
        ws_up = ws_gate + (inter // 128) * groups
        xs_ptrs = xs_ptr + source.to(tl.int64) * xs_stride
        if AHEAD:
            gate_next = tl.load(ws_gate)
            up_next = tl.load(ws_up)
            if not QUANT_IN:
                a_next = tl.load(xs_ptrs, mask=source_valid, other=0.0)
    for k in tl.range(0, hidden, BLOCK_K, num_stages=NUM_STAGES):
        if FP8:
            if AHEAD:
                gate_scale = gate_next
                up_scale = up_next
                more = k + BLOCK_K < hidden
                gate_next = tl.load(ws_gate + k // 128 + 1, mask=more, other=0.0)
                up_next = tl.load(ws_up + k // 128 + 1, mask=more, other=0.0)
                if not QUANT_IN:
                    a_scale = a_next
                    a_next = tl.load(xs_ptrs + k // 128 + 1, mask=source_valid & more, other=0.0)
            else:
                gate_scale = tl.load(ws_gate + k // 128)
                up_scale = tl.load(ws_up + k // 128)
                if not QUANT_IN:
                    a_scale = tl.load(xs_ptrs + k // 128, mask=source_valid, other=0.0)
        if EVEN_K:
            a = tl.load(x_ptrs, mask=source_valid[:, None], other=0.0)
        else:
            a = tl.load(x_ptrs, mask=source_valid[:, None] & (offs_k[None, :] < hidden - k), other=0.0)
        if ONE_DOT:
            if TMA:
                w = w_ptr.load([slot, 0, column * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
            elif EVEN_K:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=offs_k[None, :] < hidden - k, other=0.0)
        elif TMA:
            g = w_ptr.load([slot, column * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
            u = w_ptr.load([slot, inter + column * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
        elif EVEN_K:
            g = tl.load(gate_ptrs)
            u = tl.load(up_ptrs)
        else:
            g = tl.load(gate_ptrs, mask=offs_k[None, :] < hidden - k, other=0.0)
            u = tl.load(up_ptrs, mask=offs_k[None, :] < hidden - k, other=0.0)
        if FP8:
            if QUANT_IN:
                a, a_scale = quantize_tile(a)
            if ONE_DOT:
                scales = tl.where(tl.arange(0, 2 * BLOCK_N) < BLOCK_N, gate_scale, up_scale)
                if SWAP_AB:
                    both += tl.dot(w, tl.trans(a)) * (scales[:, None] * a_scale[None, :])
                else:
                    both += tl.dot(a, tl.trans(w)) * (a_scale[:, None] * scales[None, :])
            elif SWAP_AB:
                gate += tl.dot(g, tl.trans(a)) * (a_scale * gate_scale)[None, :]
                up += tl.dot(u, tl.trans(a)) * (a_scale * up_scale)[None, :]
            else:
                gate += tl.dot(a, tl.trans(g)) * (a_scale * gate_scale)[:, None]
                up += tl.dot(a, tl.trans(u)) * (a_scale * up_scale)[:, None]
        elif ONE_DOT:
            both = tl.dot(w, tl.trans(a), both) if SWAP_AB else tl.dot(a, tl.trans(w), both)
        elif SWAP_AB:
            gate = tl.dot(g, tl.trans(a), gate)
            up = tl.dot(u, tl.trans(a), up)
        else:
            gate = tl.dot(a, tl.trans(g), gate)
            up = tl.dot(a, tl.trans(u), up)
        x_ptrs += BLOCK_K
        if not TMA:
            if ONE_DOT:
                w_ptrs += BLOCK_K
            else:
                gate_ptrs += BLOCK_K
                up_ptrs += BLOCK_K
    if ONE_DOT:
        # Row n and row n + BLOCK_N of the operand lie in the same thread: the split moves nothing.
        if SWAP_AB:
            gate, up = tl.split(tl.permute(tl.reshape(both, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        else:
            gate, up = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    if BIASED:
        biases = tl.cast(b_ptr, tl.pointer_type(tl.float32)) + slot.to(tl.int64) * b_stride + offs_n
        gate_bias = tl.load(biases, mask=offs_n < inter, other=0.0)
        up_bias = tl.load(biases + inter, mask=offs_n < inter, other=0.0)
        if SWAP_AB:
            gate += gate_bias[:, None]
            up += up_bias[:, None]
        else:
            gate += gate_bias[None, :]
            up += up_bias[None, :]
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        h = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    else:
        h = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP_AB:
        h = tl.trans(h)
    row64 = row.to(tl.int64)
    h_ptrs = h_ptr + row64[:, None] * h_stride + offs_n[None, :]
    if QUANT_OUT:
        h, h_scale = quantize_tile(h)
        tl.store(hs_ptr + row64 * hs_stride + column, h_scale, mask=valid)
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=valid[:, None] & (offs_n[None, :] < inter))


@triton.jit(do_not_specialize=["tokens", "top_k"])
def _direct_kernel(x_ptr, xs_ptr, w_ptr, ws_ptr, b_ptr, h_ptr, hs_ptr, ids_ptr, table_ptr, tokens, top_k, hidden,
                   inter, x_stride, xs_stride, w_stride, ws_stride, b_stride, h_stride, hs_stride, alpha, limit,
                   K_P2: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
                   QUANT_IN: tl.constexpr, QUANT_OUT: tl.constexpr, EVEN_K: tl.constexpr, ONE_DOT: tl.constexpr,
                   BIASED: tl.constexpr, W_TYPE: tl.constexpr, NUM_STAGES: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.cdiv(inter, BLOCK_N)
    block = tl.program_id(0) // columns
    column = tl.program_id(0) - block * columns
    slot, row, valid = direct_rows(ids_ptr, table_ptr, block, tokens, top_k, K_P2, BLOCK_M, HAS_TABLE)
    if slot >= 0:
        token = tl.arange(0, BLOCK_M)
        _tile(x_ptr, xs_ptr, w_ptr, ws_ptr, b_ptr, h_ptr, hs_ptr, slot, token, token < tokens, row, valid, column,
              hidden, inter, x_stride, xs_stride, w_stride, ws_stride, b_stride, h_stride, hs_stride, alpha, limit,
              BLOCK_M, BLOCK_N, BLOCK_K, SWAP_AB, TMA, FP8, QUANT_IN, QUANT_OUT, EVEN_K, ONE_DOT, BIASED, W_TYPE,
              NUM_STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["top_k"])
def _sorted_kernel(x_ptr, xs_ptr, w_ptr, ws_ptr, b_ptr, h_ptr, hs_ptr, pair_of_row_ptr, block_slot_ptr,
                   block_rows_ptr, num_blocks_ptr, hidden, inter, top_k, x_stride, xs_stride, w_stride, ws_stride,
                   b_stride, h_stride, hs_stride, alpha, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP_AB: tl.constexpr, TMA: tl.constexpr,
                   FP8: tl.constexpr, QUANT_IN: tl.constexpr, QUANT_OUT: tl.constexpr, EVEN_K: tl.constexpr,
                   ONE_DOT: tl.constexpr, BIASED: tl.constexpr, PERSISTENT: tl.constexpr, W_TYPE: tl.constexpr,
                   NUM_STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.cdiv(inter, BLOCK_N)
    num_blocks = tl.load(num_blocks_ptr)
    tiles = num_blocks * columns
    start = tl.program_id(0)
    if PERSISTENT:
        stop = tiles
        step = tl.num_programs(0)
    else:
        stop = tl.minimum(start + 1, tiles)
        step = 1
    for tile in tl.range(start, stop, step, num_stages=1):
        block, column = block_and_column(tile, num_blocks, columns, GROUP_M)
        slot = tl.load(block_slot_ptr + block)
        inside = tl.arange(0, BLOCK_M)
        valid = inside < tl.load(block_rows_ptr + block)
        row = block * BLOCK_M + inside
        token = tl.load(pair_of_row_ptr + row, mask=valid, other=0) // top_k
        _tile(x_ptr, xs_ptr, w_ptr, ws_ptr, b_ptr, h_ptr, hs_ptr, slot, token, valid, row, valid, column, hidden,
              inter, x_stride, xs_stride, w_stride, ws_stride, b_stride, h_stride, hs_stride, alpha, limit, BLOCK_M,
              BLOCK_N, BLOCK_K, SWAP_AB, TMA, FP8, QUANT_IN, QUANT_OUT, EVEN_K, ONE_DOT, BIASED, W_TYPE,
              NUM_STAGES)  # fmt: skip


def weight_operand(w13: torch.Tensor, config: GemmConfig) -> int | TensorDescriptor:
    """w13 [S, 2I, H] of any slot pitch, as the kernel takes it: its address, or a TMA descriptor over it."""
    if not config.tma:
        return address(w13)
    slots, double, hidden = w13.shape
    pitch = w13.stride(0)
    if config.one_dot:
        inter = double // 2
        return TensorDescriptor(
            w13, [slots, 2, inter, hidden], [pitch, inter * hidden, hidden, 1], [1, 2, config.block_n, config.block_k]
        )
    return TensorDescriptor(w13, [slots, double, hidden], [pitch, hidden, 1], [1, config.block_n, config.block_k])


def gemm_swiglu_direct(
    x: torch.Tensor, x_scale: torch.Tensor | None, w13: torch.Tensor, w13_scale: torch.Tensor | None,
    topk_ids: torch.Tensor, slot_table: torch.Tensor | None, h: torch.Tensor, h_scale: torch.Tensor | None,
    config: GemmConfig, *, bias: torch.Tensor | None = None, clamped: tuple[float, float] = (0.0, 0.0),
    pdl: bool = False,
) -> None:  # fmt: skip
    """x [T, H], T <= config.block_m -> h [T * K, I], the rows of pairs whose slot is here; nothing else is written.

    w13: [S, 2I, H] in x's dtype, or e4m3 with w13_scale float32 [S, 2I / 128, H / 128]. x_scale, h_scale, bias,
    clamped: as in `gemm_swiglu_sorted`.
    """
    tokens, hidden = x.shape
    top_k, inter = topk_ids.shape[1], h.shape[1]
    assert tokens <= config.block_m
    grid = (topk_ids.numel() * triton.cdiv(inter, config.block_n),)
    scale = x if w13_scale is None else w13_scale  # without scales any address will do: it is not used
    biases = x if bias is None else bias
    alpha, limit = clamped
    _direct_kernel[grid](
        x, x if x_scale is None else x_scale, weight_operand(w13, config), address(scale), address(biases), h,
        h if h_scale is None else h_scale, topk_ids, topk_ids if slot_table is None else slot_table, tokens, top_k,
        hidden, inter, x.stride(0), 0 if x_scale is None else x_scale.stride(0), w13.stride(0), scale.stride(0),
        biases.stride(0), h.stride(0), 0 if h_scale is None else h_scale.stride(0), alpha, limit,
        K_P2=next_power_of_2(top_k),
        HAS_TABLE=slot_table is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        SWAP_AB=config.swap_ab, TMA=config.tma, FP8=w13_scale is not None,
        QUANT_IN=w13_scale is not None and x_scale is None, QUANT_OUT=h_scale is not None,
        EVEN_K=hidden % config.block_k == 0, ONE_DOT=config.one_dot, BIASED=bias is not None,
        W_TYPE=TL_TYPES[w13.dtype], NUM_STAGES=config.num_stages, PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, **pdl_options(pdl),
    )  # fmt: skip


def gemm_swiglu_sorted(
    x: torch.Tensor, x_scale: torch.Tensor | None, w13: torch.Tensor, w13_scale: torch.Tensor | None,
    routing: Routing, top_k: int, h: torch.Tensor, h_scale: torch.Tensor | None, config: GemmConfig, *,
    bias: torch.Tensor | None = None, clamped: tuple[float, float] = (0.0, 0.0), pdl: bool = False,
) -> None:  # fmt: skip
    """Rows of `routing`: x [T, H] -> h [capacity, I].

    x_scale float32 [T, H / 128]: x is e4m3; None with fp8 weights: x is quantized on the way. h_scale float32
    [capacity, I / 128]: h is e4m3 and leaves quantized (needs block_n 128). bias float32 [S, 2I]: SwiGLU is clamped by
    `clamped`, (alpha, limit).
    """
    hidden, inter = x.shape[1], h.shape[1]
    columns = triton.cdiv(inter, config.block_n)
    tiles = routing.capacity_blocks * columns
    grid = (min(tiles, multiprocessors(x.device) * config.per_sm) if config.persistent else tiles,)
    scale = x if w13_scale is None else w13_scale  # without scales any address will do: it is not used
    biases = x if bias is None else bias
    alpha, limit = clamped
    _sorted_kernel[grid](
        x, x if x_scale is None else x_scale, weight_operand(w13, config), address(scale), address(biases), h,
        h if h_scale is None else h_scale, routing.pair_of_row, routing.block_slot, routing.block_rows,
        routing.num_blocks, hidden, inter, top_k,
        x.stride(0), 0 if x_scale is None else x_scale.stride(0), w13.stride(0), scale.stride(0), biases.stride(0),
        h.stride(0), 0 if h_scale is None else h_scale.stride(0), alpha, limit,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, SWAP_AB=config.swap_ab, TMA=config.tma,
        FP8=w13_scale is not None, QUANT_IN=w13_scale is not None and x_scale is None, QUANT_OUT=h_scale is not None,
        EVEN_K=hidden % config.block_k == 0, ONE_DOT=config.one_dot, BIASED=bias is not None,
        PERSISTENT=config.persistent,
        W_TYPE=TL_TYPES[w13.dtype], NUM_STAGES=config.num_stages, PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(pdl),
    )  # fmt: skip
