"""torch_npu's operators that SGLang's NPU MoE path calls: their real schemas, and plain CPU code behind them.

tests/helpers/npu_suite/check_ops.py compares the schemas with the real torch_npu, so a call that passes here has the
argument names, order and types of the real operator, and the outputs' shapes and dtypes with its Meta kernels. What the
CPU code computes follows CANN's description of each.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

SCHEMAS = {
    "npu_grouped_matmul": "(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, "
    "int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu_moe_init_routing_v2": "(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
    "int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, "
    "int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "npu_moe_finalize_routing": "(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, "
    "Tensor? scales, Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) "
    "-> Tensor",
}


def grouped_matmul(x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0, **unused):
    """One input, one weight a group (or one 3-D weight for all), one output; group_list_type 1 is counts."""
    assert len(x) == 1 and split_item in (2, 3) and group_type == 0 and group_list is not None
    assert not any(value is not None for key, value in unused.items() if key not in ("output_dtype", "act_type"))
    weights = list(weight[0]) if len(weight) == 1 and weight[0].dim() == 3 else list(weight)
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    assert len(weights) == counts.numel() and counts.dtype == torch.int64
    rows = x[0]
    # Rows of no group are not written: poison, so that nobody relies on them.
    out = torch.full((rows.shape[0], weights[0].shape[1]), float("nan"), dtype=rows.dtype)
    at = 0
    for count, matrix in zip(counts.tolist(), weights, strict=True):
        out[at : at + count] = (rows[at : at + count].float() @ matrix.float()).to(rows.dtype)
        at += count
    return [out]


def swiglu(x, dim=-1):
    gate, up = x.float().chunk(2, dim)
    return (F.silu(gate) * up).to(x.dtype)


def init_routing(x, expert_idx, *, active_num=-1, expert_num=-1, expert_tokens_num_type=0, quant_mode=-1, **rest):
    """Rows sorted by expert, stably. expanded_row_idx[t * K + k] is the row of pair (t, k)."""
    assert expert_idx.dtype == torch.int32 and expert_tokens_num_type == 1 and quant_mode == -1
    assert active_num == expert_idx.numel() and rest["active_expert_range"] == [0, expert_num]
    assert int(expert_idx.min()) >= 0 and int(expert_idx.max()) < expert_num
    flat = expert_idx.flatten()
    order = torch.sort(flat, stable=True).indices
    row_of_pair = torch.empty_like(flat)
    row_of_pair[order] = torch.arange(flat.numel(), dtype=torch.int32)
    counts = torch.bincount(flat, minlength=expert_num).to(torch.int64)
    # The scales of a quantised call: there all the same, one a row, and not written. Poison, as above.
    scales = torch.full((active_num,), float("nan"), dtype=torch.float32)
    return x[order // expert_idx.shape[1]], row_of_pair, counts, scales


def finalize_routing(rows, skip1, skip2, bias, scales, src_to_dst, expert_idx, drop_pad_mode=0, k=1):
    """out[t] = sum over k of scales[t, k] * rows[row of (t, k)]. Mode 2: a token's pairs are neighbours."""
    assert drop_pad_mode == 2 and skip1 is skip2 is bias is None
    tokens, top_k = scales.shape
    picked = rows[src_to_dst.long()].reshape(tokens, top_k, -1)
    return (picked.float() * scales.float()[..., None]).sum(1).to(rows.dtype)


IMPLEMENTATIONS = {
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_moe_init_routing_v2": init_routing,
    "npu_moe_finalize_routing": finalize_routing,
}


@functools.cache
def register() -> torch.library.Library:
    """Defines torch.ops.npu.* for this process. Not where the real torch_npu is loaded."""
    library = torch.library.Library("npu", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, IMPLEMENTATIONS[name], "CPU")
    return library
