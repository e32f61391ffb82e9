"""What the ranks tell each other before every batch."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.batch_sizes import share_batch_info
from elasticmoe_patches.worker.worker import current_worker

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "MLPSyncBatchInfo.all_gather(self, device, group, use_all_reduce=False)",
    expires="SGLang gathers batch sizes in few operations, and none where one rank is active.",
)
def around_all_gather(original: Any, self: Any, device: Any, group: Any, use_all_reduce: bool = False) -> None:
    """A rank that is alone asks nobody, and the gathered rows are read at once: SGLang's some twenty tensor operations
    take a sixth of a decode step of one request on a GPU.
    """
    if device != "cpu" or use_all_reduce:
        original(self, device, group, use_all_reduce)
    else:
        share_batch_info(self, group, alone=current_worker().region.is_solo)
