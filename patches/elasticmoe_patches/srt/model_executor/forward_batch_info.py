"""Preparing a batch for the forward pass."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.batch_sizes import set_sizes

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "attribute",
    "_is_cpu: bool",
    scope="platform",
    expires="It uses the platform's is_pin_memory_available as the rest of the file does.",
)
def cpu_flag(current: bool) -> bool:
    """prepare_mlp_sync_batch asks for pinned memory, which needs an accelerator's driver, unless this is set; SGLang
    sets it only for its own CPU engine."""
    return True


@hook(
    "around",
    "ForwardBatch.init_mlp_sync_metadata(self, batch, device, *, is_draft_worker=False)",
    expires="SGLang uploads the ranks' batch sizes only when they have changed.",
)
def around_init_mlp_sync_metadata(
    original: Any, self: Any, batch: Any, device: Any, *, is_draft_worker: bool = False
) -> None:
    """Two uploads of the ranks' batch sizes before every batch, which a graph that is replayed does not even read."""
    if batch.global_num_tokens is None or self.spec_info is not None or is_draft_worker:
        original(self, batch, device, is_draft_worker=is_draft_worker)
    else:
        set_sizes(self, batch, device)


@hook(
    "before",
    "ForwardBatch.prepare_mlp_sync_batch(self, model_runner)",
    expires="SGLang uploads the ranks' batch sizes only when they have changed.",
)
def before_prepare_mlp_sync_batch(self: Any, model_runner: Any) -> None:
    """It writes padded sizes into the tensor that batches share (`around_init_mlp_sync_metadata`)."""
    self.global_num_tokens_gpu = self.global_num_tokens_gpu.clone()


@hook(
    "around",
    "compute_local_num_token_non_padded(global_num_token_non_padded, num_tokens_per_dp, *, sharded)",
    rebind=(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.compute_local_num_token_non_padded",
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.compute_local_num_token_non_padded",
    ),
    expires="SGLang launches nothing where a rank holds all tokens.",
)
def around_compute_local(
    original: Any, global_num_token_non_padded: Any, num_tokens_per_dp: int, *, sharded: bool
) -> Any:
    """Attention is not sharded on an elastic server, so a rank's count is the global one: SGLang launches a subtraction
    of 0 and a clamp that changes nothing before every batch."""
    from sglang.srt.model_executor.forward_batch_info import _attn_tp_local_shard_bounds

    if _attn_tp_local_shard_bounds(num_tokens_per_dp, sharded=sharded) == (num_tokens_per_dp, 0):
        return global_num_token_non_padded
    return original(global_num_token_non_padded, num_tokens_per_dp, sharded=sharded)
