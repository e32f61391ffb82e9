"""What the policy measures in SGLang's main process: requests where the tokenizer handles them, and the ranks' load.

`METER` is written in the tokenizer's event loop and drained in the coordinator's. Times are those of
`time.perf_counter`, as SGLang's own of a request are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from elasticmoe_sglang.policy.estimator import Sample
from elasticmoe_sglang.policy.meter import RequestMeter

METER = RequestMeter()
HEALTH_CHECK = "HEALTH_CHECK"
"""What ids of SGLang's own health checks begin with (`sglang.srt.constants`)."""


def arrived(tokenizer_manager: Any, tokenized: Any) -> None:
    """A tokenised request is about to be sent. Only requests that generate count, and no health checks."""
    state = tokenizer_manager.rid_to_state.get(tokenized.rid)
    generates = hasattr(tokenized, "sampling_params") and not tokenized.rid.startswith(HEALTH_CHECK)
    if state is not None and generates:
        streams = bool(getattr(tokenized, "stream", False))
        METER.arrived(state.time_stats.created_time, tokenized.rid, len(tokenized.input_ids or ()), streams)


def output(batch: Any) -> None:
    """A batch of output came, of requests that generate or of others."""
    lengths = getattr(batch, "completion_tokens", None)
    if lengths is not None:
        METER.output(time.perf_counter(), batch.rids, batch.output_ids, lengths, batch.finished_reasons)


def aborted(request: Any) -> None:
    """SGLang says that a request has ended without output."""
    METER.aborted(time.perf_counter(), request.rid)


def sample_of(
    tokenizer_manager: Any, replicas: Callable[[], Sequence[int]], *, ranks_each: int = 1
) -> Callable[[], Sample | None]:
    """Returns a function that reads what the active replicas published last; it returns None until all have.

    Args:
        replicas: returns the active replicas, SGLang's data-parallel ranks. ranks_each: ranks of one.
    """
    reader = tokenizer_manager.load_snapshot_reader

    def sample() -> Sample | None:
        active = replicas()
        loads = [load for replica in active if (load := reader.read(replica)) is not None]
        if len(loads) < len(active):
            return None
        room = sum(load.max_total_num_tokens for load in loads)
        slots = min(load.max_running_requests for load in loads) // ranks_each
        return Sample(
            ranks=len(active) * ranks_each,
            running=sum(load.num_running_reqs for load in loads),
            waiting=sum(load.num_waiting_reqs for load in loads),
            kv_use=sum(load.num_used_tokens for load in loads) / room if room else None,
            slots=slots or None,
        )

    return sample
