"""The rank's KV cache in the scheduler's hands: opened before SGLang makes its pool over it, resized between batches.

`run_kv_jobs` is called at the top of an iteration, and by a survivor that waits for the others after a rank's death.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from elasticmoe_patches.device import on_npu
from elasticmoe_patches.worker.kv_resize import resize, update_limits
from elasticmoe_patches.worker.requests import set_aside
from elasticmoe_patches.worker.worker import Worker
from elasticmoe_sglang.hmm.layout import KvLayout, KvPlanes
from elasticmoe_sglang.planner import KvShape, kv_shape
from elasticmoe_sglang.wire.to_hmm import HmmStatus
from elasticmoe_sglang.worker.kv import Resized, WorkerKv, copy_tokens
from elasticmoe_sglang.worker.kv_share import device_at_rest

logger = logging.getLogger(__name__)

# How long memory of a process that is just ending is waited for.
_OPEN_S = 3.0


def open_kv(worker: Worker, configurator: Any) -> None:
    """Set `worker.kv` and map its first chunks."""
    from sglang.srt.runtime_context import get_schedule

    config = worker.runtime.config
    status = worker.client.status()
    layout = kv_layout(configurator)
    caps = [cap for cap in (config.kv_tokens, get_schedule().max_total_tokens) if cap is not None]
    budget = status.devices[worker.device].budget
    shape = kv_shape(
        token_bytes=layout.token_bytes,
        page_tokens=configurator.pool_page_size,
        granularity=layout.chunk_unit(status.granularity),
        budget=budget,
        ranks=config.ranks_per_device,
        cap_tokens=min(caps, default=None),
    )
    most = shape.share(budget, 1)
    worker.kv = WorkerKv(
        worker.client, rank=worker.rank, device=worker.device, shape=shape, layout=layout, max_chunks=most
    )
    # While a rank boots it runs prompts as long as a prefill step.
    longest = get_schedule().chunked_prefill_size or 0
    worker.boot_chunks = min(most, max(shape.least_chunks, shape.chunks(2 * max(0, longest))))
    chunks = worker.join_spec.kv_chunks or _first_share(worker, status, shape)
    worker.kv.open(min(chunks, most), worker.join_spec.txn or None, _OPEN_S)
    logger.info("rank %d: %d KV tokens in %d chunks of HMM memory", worker.rank, shape.tokens(worker.kv.chunks), chunks)
    _warn_if_short(worker, configurator.model_config.context_len)


def _warn_if_short(worker: Worker, context: int) -> None:
    """Of a rank that starts with the server; later ones start small."""
    assert worker.kv is not None
    shape = worker.kv.shape
    tokens = shape.tokens(worker.kv.chunks)
    if shape.cap_tokens is not None:  # the operator's own limit
        context = min(context, shape.cap_tokens)
    if not worker.join_spec.joining_rank and not worker.join_spec.hot and tokens < context:
        logger.warning(
            "rank %d: %d KV tokens are less than the context length of %d: longer requests are refused, and answers "
            "are cut short. Weights and headroom leave no more of the device: lower --elasticmoe-ranks-per-device, "
            "--elasticmoe-headroom or --context-length",
            worker.rank,
            tokens,
            context,
        )


def _first_share(worker: Worker, status: HmmStatus, shape: KvShape) -> int:
    """Chunks of each rank of this device under the placement it starts with; all of its ranks compute the same."""
    config = worker.runtime.config
    device = device_at_rest(
        config,
        status.devices[worker.device],
        worker.model.spec,
        granularity=status.granularity,
        ranks=[member for member in worker.join_spec.members if config.device_of(member) == worker.device],
        placement=worker.model.placement,
    )
    return device.targets(shape)[worker.rank]


def kv_layout(configurator: Any) -> KvLayout:
    """One token's keys and values, named `<layer>.k` and `<layer>.v`, or `<layer>.kv` for MLA's latent.

    On NPUs, whose attention takes no strides, each tensor has addresses of its own, and MLA's latent is two of them.
    """
    model, dtype = configurator.model_config, configurator.kv_cache_dtype
    layers = range(configurator.layer_info.num_effective_layers)
    if configurator.use_mla_backend:
        latent, rotated = model.kv_lora_rank, model.qk_rope_head_dim
        parts = {"k": (1, latent), "v": (1, rotated)} if on_npu() else {"kv": (1, latent + rotated)}
    else:
        parts = dict.fromkeys("kv", (kv_heads(configurator), model.head_dim))
    layout = KvPlanes if on_npu() else KvLayout
    return layout.of((f"{layer}.{part}", shape, dtype) for layer in layers for part, shape in parts.items())


def kv_heads(configurator: Any) -> int:
    """Heads of keys and values that this rank holds."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(configurator.model_config.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size))


def publish_first_capacity(scheduler: Any, worker: Worker) -> None:
    """Before the first iteration: limits that SGLang took from the address space become those of what is mapped."""
    if worker.kv is not None:
        update_limits(scheduler, scheduler.token_to_kv_pool_allocator.size)
        publish_use(scheduler, worker)


def run_kv_jobs(scheduler: Any, worker: Worker) -> None:
    """Carry out the changes of capacity that the agent's thread asks for."""
    if worker.kv is None:
        return
    worker.kv.jobs.run(adopt_capacity(scheduler, worker))
    publish_use(scheduler, worker)


def adopt_capacity(scheduler: Any, worker: Worker) -> Callable[[int], Resized]:
    """What makes a number of tokens the scheduler's capacity. Between two batches only."""
    kv = worker.kv
    assert kv is not None

    def move(rows: torch.Tensor, targets: torch.Tensor) -> None:
        copy_tokens(kv.rows, targets, kv.rows, rows)

    def retract() -> int:
        scheduler.cur_batch_for_debug = None  # it ran to its end
        return set_aside(scheduler, worker.iteration)

    def apply(tokens: int) -> Resized:
        done = resize(scheduler, tokens, move, retract)
        logger.info(
            "rank %d: %d KV tokens (%d evicted, %d moved, %d requests retracted)",
            worker.rank,
            done.tokens,
            done.evicted,
            done.moved,
            done.retracted,
        )
        return done

    return apply


def publish_use(scheduler: Any, worker: Worker) -> None:
    """Write capacity and use to the control page, for the status."""
    allocator = scheduler.token_to_kv_pool_allocator
    cached = 0 if scheduler.disable_radix_cache else scheduler.tree_cache.evictable_size()
    used = allocator.size - allocator.available_size() - cached
    worker.region.control.set_kv(worker.rank, capacity=allocator.size, used=used, cached=cached)
