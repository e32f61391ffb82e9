"""Which rows of a gathered batch are this rank's own.

Before a mixture SGLang gathers the batches of all ranks, and sums its output over the ranks afterwards. What only one
rank may add to a row, the row's own rank adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elasticmoe_patches.versions import api
from elasticmoe_patches.worker.worker import current_worker


def is_shared_expert(prefix: str) -> bool:
    """Whether a module of this name in the checkpoint is a layer's shared expert, or all of them in one."""
    return prefix.rpartition(".")[2] in ("shared_expert", "shared_experts")


def init_whole(original: Any, mlp: Any, *args: Any, prefix: str, **kwargs: Any) -> None:
    """Construct one of SGLang's parallel MLPs; a shared expert is held whole: a shard would leave with its rank."""
    if is_shared_expert(prefix):
        kwargs |= api().whole_mlp()
    original(mlp, *args, prefix=prefix, **kwargs)


def rows_of_each(rows: int, ranks: int) -> int | None:
    """Of `rows` gathered rows, how many are each rank's where every rank has an equal part; None: inactive ranks have
    none. Replicas of several ranks count as one."""
    from sglang.srt.layers.dp_attention import is_dp_max_padding

    # With rows padded to the longest batch every rank has an equal part; without, inactive ranks have no rows.
    equal_parts = ranks > 1 and is_dp_max_padding() and rows > 0 and rows % ranks == 0
    return rows // ranks if equal_parts else None


def own_rows(rows: int) -> slice:
    """Of `rows` gathered rows, those of this rank's batch. Constant under a captured graph."""
    from sglang.srt.layers.dp_attention import get_dp_global_num_tokens

    worker = current_worker()
    config = worker.runtime.config
    replica = config.replica_of(worker.rank)
    each = rows_of_each(rows, config.num_replicas)
    if each is not None:
        start, count = replica * each, each
    else:
        tokens = get_dp_global_num_tokens()
        start, count = sum(tokens[:replica]), tokens[replica]
    size = config.attention_tp
    if size == 1:
        return slice(start, start + count)
    # The ranks of a replica have the same rows: each takes a part of them.
    return slice(start + count * worker.shard // size, start + count * (worker.shard + 1) // size)


def in_own_rows(compute: Callable[[Any], Any], hidden_states: Any) -> Any:
    """[T, H] -> [T, H]: `compute` of this rank's rows in their places, zeros elsewhere; None if `compute` gives None.

    Args:
        compute: [t, H] -> [t, H], row by row; not called for no rows.
    """
    rows = own_rows(hidden_states.shape[0])
    if rows == slice(0, hidden_states.shape[0]):
        return compute(hidden_states)
    output = torch.zeros_like(hidden_states)
    if rows.start < rows.stop:
        part = compute(hidden_states[rows])
        if part is None:
            return None
        output[rows] = part
    return output
