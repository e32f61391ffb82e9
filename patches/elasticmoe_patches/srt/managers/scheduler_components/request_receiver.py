"""What arrives for one rank alone, and the iteration's input until it has been processed."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.worker import current_worker

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "after", "SchedulerRequestReceiver._pull_raw_reqs(self)", expires="Control messages can be addressed to one rank."
)
def after_pull_raw_reqs(requests: list[Any] | None, self: Any) -> list[Any] | None:
    """Sees the fence behind the last request that was routed to a retiring rank.

    What is for this rank alone is taken out here, since of control messages only rank 0's would be kept. The rest is
    kept until the iteration's input has been processed: another rank's death in between must not lose it.
    """
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, ElasticResumeReq

    if requests is None:
        return None
    worker = current_worker()
    iteration = worker.iteration
    requests = [*iteration.replay, *requests]
    iteration.replay = []
    kept = []
    for request in requests:
        if isinstance(request, ElasticFenceReq):
            worker.fences.append(request.operation_id)
        elif isinstance(request, ElasticResumeReq):
            worker.recovery.sent_again.append(request)
        else:
            kept.append(request)
    iteration.pulled = list(kept)
    return kept
