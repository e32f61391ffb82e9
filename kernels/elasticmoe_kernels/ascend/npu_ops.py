"""The same expert MLP through CANN's `npu_grouped_matmul`, one weight tensor an expert: the alternative to our kernel.

It takes weights as a list of tensors, each where its column is mapped, in ND format: a column that moves or changes
hands must stay plain rows, which rules out the FRACTAL_NZ format SGLang casts NPU weights to. Which experts are in the
list is fixed on the host, so a graph captured with it holds for one membership only; our Triton kernel reads the slots
from device memory and has no such limit.

Argument names, order and types follow torch_npu 2.13.0's schemas (checked in tests/contract/test_ascend_npu_ops.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SINGLE_OUTPUT = 3  # split_item: one input, many weights, one output
_ALONG_ROWS = 0  # group_type
_COUNTS = 1  # group_list_type: rows of each group, not their running sum


@dataclass(frozen=True, kw_only=True)
class LocalExperts:
    """The experts of one rank, for one membership.

    groups: [L] int64 on the device, which of the dispatcher's groups they are, ascending.
    w13, w2: for each its [H, 2I] and [I, H] view of the column, transposed without a copy.
    """

    groups: torch.Tensor
    w13: list[torch.Tensor]
    w2: list[torch.Tensor]


def local_experts(w13: torch.Tensor, w2: torch.Tensor, slots: list[int]) -> LocalExperts:
    """Views of the columns this rank has mapped.

    Args:
        w13: [S, 2I, H]; w2: [S, H, I], any pitch between slots.
        slots: slot of each of the dispatcher's groups, -1 = not on this rank.
    """
    here = [group for group, slot in enumerate(slots) if slot >= 0]
    return LocalExperts(
        groups=torch.tensor(here, dtype=torch.int64, device=w13.device),
        w13=[w13[slots[group]].t() for group in here],
        w2=[w2[slots[group]].t() for group in here],
    )


def grouped_matmul(rows: torch.Tensor, weights: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """rows [R, K] times one [K, N] weight a group; `counts` [G] int64 rows each. Returns [R, N]."""
    result: list[torch.Tensor] = torch.ops.npu.npu_grouped_matmul(
        x=[rows],
        weight=weights,
        split_item=_SINGLE_OUTPUT,
        group_list_type=_COUNTS,
        group_type=_ALONG_ROWS,
        group_list=counts,
        output_dtype=rows.dtype,
    )
    return result[0]


def expert_mlp(rows: torch.Tensor, counts: torch.Tensor, experts: LocalExperts) -> torch.Tensor:
    """The MLP for rows that lie expert by expert; rows of experts that are elsewhere come back as zeros.

    Args:
        rows: [R, H], groups in ascending order. counts: [G] int64, rows of each group.

    Returns: [R, H]. Its work grows with the rows of the local experts, since those are moved to the front first.
    """
    count = rows.shape[0]
    if not experts.w13:
        return torch.zeros_like(rows)
    bounds = torch.cumsum(counts, 0)
    places = torch.arange(count, dtype=torch.int64, device=rows.device)
    group_of_row = torch.searchsorted(bounds, places, right=True).clamp(max=counts.shape[0] - 1)
    is_local = torch.zeros_like(counts, dtype=torch.bool).index_fill(0, experts.groups, True)
    here = is_local[group_of_row] & (places < bounds[-1])
    order = torch.argsort(torch.where(here, 0, 1), stable=True)
    local_counts = counts.index_select(0, experts.groups)
    gate_up = grouped_matmul(rows.index_select(0, order), experts.w13, local_counts)
    y = grouped_matmul(torch.ops.npu.npu_swiglu(gate_up), experts.w2, local_counts)
    # Past the local rows the operator writes nothing: chosen away, not multiplied away, since it may be NaN.
    computed = (places < local_counts.sum())[:, None]
    return torch.empty_like(y).index_copy(0, order, torch.where(computed, y, 0))
