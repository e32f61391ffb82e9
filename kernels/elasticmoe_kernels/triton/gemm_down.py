# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""Second grouped product: y[row] = h[row] @ w2[slot].T, plus the slot's bias if there is one; rows where the first one
put them."""

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
def _tile(h_ptr, hs_ptr, w_ptr, ws_ptr, b_ptr, y_ptr, slot, row, valid, first_row, column, hidden, inter,
          h_stride, hs_stride, w_stride, ws_stride, b_stride, y_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, TMA: tl.constexpr, TMA_ROWS: tl.constexpr, FP8: tl.constexpr,
          QUANT_IN: tl.constexpr, EVEN_K: tl.constexpr, BIASED: tl.constexpr, W_TYPE: tl.constexpr,
          NUM_STAGES: tl.constexpr):  # fmt: skip
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row64 = row.to(tl.int64)
    if not TMA_ROWS:
        h_ptrs = h_ptr + row64[:, None] * h_stride + offs_k[None, :]
    if not TMA:
        inside = tl.where(offs_n < hidden, offs_n, 0)
        base = tl.multiple_of(tl.cast(w_ptr, tl.pointer_type(W_TYPE)), 16) + slot.to(tl.int64) * w_stride
        w_ptrs = base + inside[:, None].to(tl.int64) * inter + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FP8:
        # One scale for the tile and each 128 of k, since BLOCK_N divides 128.
        AHEAD: tl.constexpr = BLOCK_M <= 32  # see gemm_swiglu
        groups = tl.cdiv(inter, 128)
        ws_ptrs = tl.cast(ws_ptr, tl.pointer_type(tl.float32)) + slot.to(tl.int64) * ws_stride
        ws_ptrs += (column * BLOCK_N // 128) * groups
        hs_ptrs = hs_ptr + row64 * hs_stride
        if AHEAD:
            w_next = tl.load(ws_ptrs)
            if not QUANT_IN:
                a_next = tl.load(hs_ptrs, mask=valid, other=0.0)
    for k in tl.range(0, inter, BLOCK_K, num_stages=NUM_STAGES):
        if FP8:
            if AHEAD:
                w_scale = w_next
                more = k + BLOCK_K < inter
                w_next = tl.load(ws_ptrs + k // 128 + 1, mask=more, other=0.0)
                if not QUANT_IN:
                    a_scale = a_next
                    a_next = tl.load(hs_ptrs + k // 128 + 1, mask=valid & more, other=0.0)
            else:
                w_scale = tl.load(ws_ptrs + k // 128)
                if not QUANT_IN:
                    a_scale = tl.load(hs_ptrs + k // 128, mask=valid, other=0.0)
        if TMA_ROWS:
            a = h_ptr.load([first_row, k])
        elif EVEN_K:
            a = tl.load(h_ptrs, mask=valid[:, None], other=0.0)
        else:
            a = tl.load(h_ptrs, mask=valid[:, None] & (offs_k[None, :] < inter - k), other=0.0)
        if TMA:
            w = w_ptr.load([slot, column * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
        elif EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=offs_k[None, :] < inter - k, other=0.0)
        if FP8:
            if QUANT_IN:
                a, a_scale = quantize_tile(a)
            if SWAP_AB:
                acc += tl.dot(w, tl.trans(a)) * (a_scale * w_scale)[None, :]
            else:
                acc += tl.dot(a, tl.trans(w)) * (a_scale * w_scale)[:, None]
        elif SWAP_AB:
            acc = tl.dot(w, tl.trans(a), acc)
        else:
            acc = tl.dot(a, tl.trans(w), acc)
        if not TMA_ROWS:
            h_ptrs += BLOCK_K
        if not TMA:
            w_ptrs += BLOCK_K
    if SWAP_AB:
        acc = tl.trans(acc)
    if BIASED:
        biases = tl.cast(b_ptr, tl.pointer_type(tl.float32)) + slot.to(tl.int64) * b_stride + offs_n
        acc += tl.load(biases, mask=offs_n < hidden, other=0.0)[None, :]
    y_ptrs = y_ptr + row64[:, None] * y_stride + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (offs_n[None, :] < hidden))


@triton.jit(do_not_specialize=["tokens", "top_k"])
def _direct_kernel(h_ptr, hs_ptr, w_ptr, ws_ptr, b_ptr, y_ptr, ids_ptr, table_ptr, tokens, top_k, hidden, inter,
                   h_stride, hs_stride, w_stride, ws_stride, b_stride, y_stride, K_P2: tl.constexpr,
                   HAS_TABLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   SWAP_AB: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr, QUANT_IN: tl.constexpr,
                   EVEN_K: tl.constexpr, BIASED: tl.constexpr, W_TYPE: tl.constexpr, NUM_STAGES: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    columns = tl.cdiv(hidden, BLOCK_N)
    block = tl.program_id(0) // columns
    column = tl.program_id(0) - block * columns
    # The ids were complete before the kernel in front of this one started: they need not wait for it.
    slot, row, valid = direct_rows(ids_ptr, table_ptr, block, tokens, top_k, K_P2, BLOCK_M, HAS_TABLE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if slot >= 0:
        _tile(h_ptr, hs_ptr, w_ptr, ws_ptr, b_ptr, y_ptr, slot, row, valid, 0, column, hidden, inter, h_stride,
              hs_stride, w_stride, ws_stride, b_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, SWAP_AB, TMA, False, FP8,
              QUANT_IN, EVEN_K, BIASED, W_TYPE, NUM_STAGES)  # fmt: skip


@triton.jit
def _sorted_kernel(h_ptr, hs_ptr, w_ptr, ws_ptr, b_ptr, y_ptr, block_slot_ptr, block_rows_ptr, num_blocks_ptr, hidden,
                   inter, h_stride, hs_stride, w_stride, ws_stride, b_stride, y_stride, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP_AB: tl.constexpr,
                   TMA: tl.constexpr, TMA_ROWS: tl.constexpr, FP8: tl.constexpr, QUANT_IN: tl.constexpr,
                   EVEN_K: tl.constexpr, BIASED: tl.constexpr,
                   PERSISTENT: tl.constexpr, PARTS: tl.constexpr, W_TYPE: tl.constexpr, NUM_STAGES: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    # A block of the routing is PARTS tiles here.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.cdiv(hidden, BLOCK_N)
    num_blocks = tl.load(num_blocks_ptr) * PARTS
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
        slot = tl.load(block_slot_ptr + block // PARTS)
        rows = tl.load(block_rows_ptr + block // PARTS) - (block % PARTS) * BLOCK_M
        if rows > 0:
            inside = tl.arange(0, BLOCK_M)
            _tile(h_ptr, hs_ptr, w_ptr, ws_ptr, b_ptr, y_ptr, slot, block * BLOCK_M + inside, inside < rows,
                  block * BLOCK_M, column, hidden, inter, h_stride, hs_stride, w_stride, ws_stride, b_stride, y_stride,
                  BLOCK_M, BLOCK_N, BLOCK_K, SWAP_AB, TMA, TMA_ROWS, FP8, QUANT_IN, EVEN_K, BIASED, W_TYPE,
                  NUM_STAGES)  # fmt: skip


def weight_operand(w2: torch.Tensor, config: GemmConfig) -> int | TensorDescriptor:
    """w2 [S, H, I] of any slot pitch, as the kernel takes it: its address, or a TMA descriptor over it."""
    if not config.tma:
        return address(w2)
    return TensorDescriptor(w2, list(w2.shape), [w2.stride(0), w2.shape[2], 1], [1, config.block_n, config.block_k])


def gemm_down_direct(
    h: torch.Tensor, h_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None,
    topk_ids: torch.Tensor, slot_table: torch.Tensor | None, y: torch.Tensor, config: GemmConfig, *,
    bias: torch.Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """h [T * K, I], T <= config.block_m -> y [T * K, H]; rows of pairs that are not here are left alone.

    w2: [S, H, I] in h's dtype, or e4m3 with w2_scale float32 [S, H / 128, I / 128]. h_scale: as in `gemm_down_sorted`.
    bias: float32 [S, H], added to every row that is written.
    """
    (tokens, top_k), inter, hidden = topk_ids.shape, h.shape[1], y.shape[1]
    grid = (topk_ids.numel() * triton.cdiv(hidden, config.block_n),)
    scale = h if w2_scale is None else w2_scale  # without scales any address will do: it is not used
    biases = h if bias is None else bias
    _direct_kernel[grid](
        h, h if h_scale is None else h_scale, weight_operand(w2, config), address(scale), address(biases), y, topk_ids,
        topk_ids if slot_table is None else slot_table, tokens, top_k, hidden, inter, h.stride(0),
        0 if h_scale is None else h_scale.stride(0), w2.stride(0), scale.stride(0), biases.stride(0), y.stride(0),
        K_P2=next_power_of_2(top_k), HAS_TABLE=slot_table is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, SWAP_AB=config.swap_ab, TMA=config.tma, FP8=w2_scale is not None,
        QUANT_IN=w2_scale is not None and h_scale is None, EVEN_K=inter % config.block_k == 0, BIASED=bias is not None,
        W_TYPE=TL_TYPES[w2.dtype], NUM_STAGES=config.num_stages, PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, **pdl_options(pdl),
    )  # fmt: skip


def gemm_down_sorted(
    h: torch.Tensor, h_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None, routing: Routing,
    y: torch.Tensor, config: GemmConfig, *, bias: torch.Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """h [capacity, I] -> y [capacity, H], valid rows only. h_scale: h is e4m3; None with fp8 weights: quantized. bias:
    float32 [S, H]."""
    hidden, inter = y.shape[1], h.shape[1]
    parts = routing.block_m // config.block_m
    tiles = routing.capacity_blocks * parts * triton.cdiv(hidden, config.block_n)
    grid = (min(tiles, multiprocessors(h.device) * config.per_sm) if config.persistent else tiles,)
    scale = h if w2_scale is None else w2_scale  # without scales any address will do: it is not used
    biases = h if bias is None else bias
    # TMA over the rows reads the padding rows too; what a padding row gives is never stored.
    rows = (
        TensorDescriptor(h, list(h.shape), [h.stride(0), 1], [config.block_m, config.block_k]) if config.tma_rows else h
    )
    _sorted_kernel[grid](
        rows, h if h_scale is None else h_scale, weight_operand(w2, config), address(scale), address(biases), y,
        routing.block_slot, routing.block_rows, routing.num_blocks, hidden, inter, h.stride(0),
        0 if h_scale is None else h_scale.stride(0), w2.stride(0), scale.stride(0), biases.stride(0), y.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        SWAP_AB=config.swap_ab, TMA=config.tma, TMA_ROWS=config.tma_rows, FP8=w2_scale is not None,
        QUANT_IN=w2_scale is not None and h_scale is None, EVEN_K=inter % config.block_k == 0, BIASED=bias is not None,
        PERSISTENT=config.persistent, PARTS=parts, W_TYPE=TL_TYPES[w2.dtype], NUM_STAGES=config.num_stages, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **pdl_options(pdl),
    )  # fmt: skip
