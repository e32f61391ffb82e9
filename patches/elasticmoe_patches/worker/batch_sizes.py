"""Sizes of the ranks' batches: gathered with few tensor operations, and uploaded only when they have changed.

SGLang does both anew for every batch; in a decode step of few requests that is host time which the device waits for.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from elasticmoe_patches.versions import api

_idle_rows: dict[tuple[int, int], torch.Tensor] = {}


def share_batch_info(info: Any, group: Any, *, alone: bool) -> None:
    """Fill SGLang's MLPSyncBatchInfo as its `all_gather` on the CPU does.

    Args:
        group: of all ranks of the tensor-parallel group, on the CPU.
        alone: no other rank is active: nothing is gathered, and nothing computed while this rank's sizes stay.
    """
    global _last
    if not alone:
        started = time.perf_counter()
        rows = _gathered(info, group, alone=False)
        _fill(info, rows, time.perf_counter() - started)
        return
    key = (group.rank(), *(getattr(info, name) for name in (*_LOCAL, *api().batch_info_local)))
    if _last is None or _last[0] != key:
        _last = key, _gathered(info, group, alone=True)
    _fill(info, _last[1], 0.0)


_LOCAL = (
    "tp_size", "cp_size", "num_tokens", "num_tokens_for_logprob", "can_run_decode_cuda_graph",
    "can_run_draft_cuda_graph", "can_run_prefill_cuda_graph", "is_extend_in_batch", "local_can_run_tbo",
    "local_forward_mode", "prefill_cuda_graph_max_prefix_len",
)  # fmt: skip
"""What a rank says of its batch."""
_last: tuple[tuple[Any, ...], torch.Tensor] | None = None
"""The last batch's sizes of a rank that was alone, and the rows for them; not to be written."""


def _gathered(info: Any, group: Any, *, alone: bool) -> torch.Tensor:
    """int64 [attention groups, width]: what one rank of each says."""
    from sglang.srt.distributed.utils import all_gather_single

    mine = info._get_local_tensor(device="cpu")
    a_group = info.tp_size * info.cp_size
    rows = _idle(info, api().data_parallel_ranks(info) * a_group, mine.numel()).clone()
    if alone:
        rows[group.rank()] = mine
    else:
        all_gather_single(rows.view(-1), mine, group=group)
    return rows[::a_group]


def _fill(info: Any, rows: torch.Tensor, waited_s: float) -> None:
    from sglang.srt.managers.scheduler_components import dp_attn

    columns = list(zip(*rows.tolist(), strict=True))
    tokens, logprobs, decode, extend, _, modes, prefill, prefix, draft = columns[:9]
    api().fill_batch_info(info, columns[9:], waited_s)
    info.tp0_info_cpu = rows
    info.global_num_tokens = list(tokens)
    info.global_num_tokens_for_logprob = list(logprobs)
    info.can_run_decode_cuda_graph = bool(min(decode))
    info.is_extend_in_batch = bool(max(extend))
    info.can_run_prefill_cuda_graph = bool(min(prefill))
    info.prefill_cuda_graph_max_prefix_len = max(prefix)
    info.can_run_draft_cuda_graph = bool(min(draft))
    if dp_attn._ENABLE_METRICS_DP_ATTENTION:
        info.dp_cooperation_info = dp_attn.DPCooperationInfo.create(list(modes))


def _idle(info: Any, rows: int, width: int) -> torch.Tensor:
    """int64 [rows, width]: what stands for ranks that are not active. Not to be written."""
    if (rows, width) not in _idle_rows:
        _idle_rows[rows, width] = info._get_fallback_tensor(device="cpu").repeat(rows, 1)
    return _idle_rows[rows, width]


class UploadedSizes:
    """The ranks' numbers of tokens on the device, as of the last batches: a decoding server's stay the same for many.

    The tensors are shared by batches and not to be written.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[tuple[Any, ...], torch.Tensor]] = {}

    def tensor(self, name: str, values: list[int], device: Any, *, pinned: bool) -> torch.Tensor:
        """int64 [len(values)] on the device; uploaded unless the last ones of this name are equal."""
        key = (str(device), *values)
        last = self._last.get(name)
        if last is None or last[0] != key:
            made = torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
            last = self._last[name] = (key, made)
        return last[1]


uploaded = UploadedSizes()


def set_sizes(batch: Any, schedule: Any, device: Any) -> None:
    """Fill a ForwardBatch as its `init_mlp_sync_metadata` does for a batch without speculation."""
    from sglang.srt.model_executor import forward_batch_info

    tokens, logprobs = schedule.global_num_tokens, schedule.global_num_tokens_for_logprob
    pinned = forward_batch_info.is_pin_memory_available(device)
    batch.dp_spec_prefill_coordination_applied = schedule.dp_spec_prefill_coordination_applied
    batch.original_global_num_tokens_cpu = batch.global_num_tokens_cpu = tokens
    batch.global_num_tokens_for_logprob_cpu = logprobs
    batch.global_num_tokens_gpu = uploaded.tensor("tokens", tokens, device, pinned=pinned)
    if logprobs == tokens:
        batch.global_num_tokens_for_logprob_gpu = batch.global_num_tokens_gpu
    else:
        batch.global_num_tokens_for_logprob_gpu = uploaded.tensor("logprobs", logprobs, device, pinned=pinned)
    batch.can_run_decode_cuda_graph = schedule.can_run_decode_cuda_graph
    batch.can_run_dp_draft_cuda_graph = schedule.can_run_dp_draft_cuda_graph
