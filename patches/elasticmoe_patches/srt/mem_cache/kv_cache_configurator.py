"""How large a rank's KV pool is (mirrors sglang/srt/mem_cache/kv_cache_configurator.py).

SGLang sizes its pool once, by what the device has left. A rank's pool is what of its HMM memory is mapped now: it is
opened here, and SGLang is told that size. It changes later, see `resize.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from elasticmoe_patches.spec import HookSpec
from elasticmoe_sglang.hmm.layout import KvLayout
from elasticmoe_sglang.planner import KvShape, kv_shape
from elasticmoe_sglang.worker.kv_share import device_at_rest

logger = logging.getLogger(__name__)

_NO_LIMIT = 1 << 50
# How long memory of a process that is just ending is waited for.
_OPEN_S = 3.0


def around_configure(original: Any, self: Any, *, pre_model_load_memory: int) -> Any:
    """Open the rank's KV cache before SGLang makes its pool over it."""
    from elasticmoe_patches.worker.worker import current_worker

    if _is_ours():
        open_kv(current_worker(), self)
    return original(self, pre_model_load_memory=pre_model_load_memory)


def around_profile_available_bytes(original: Any, self: Any, pre_model_load_memory: int) -> int:
    """The device's free memory is the HMM's business."""
    from elasticmoe_patches.worker.worker import current_worker

    return _NO_LIMIT if current_worker().kv is not None else int(original(self, pre_model_load_memory))


def around_apply_token_constraints(original: Any, self: Any, token_capacity: int) -> int:
    """SGLang's own limits are in the shape's cap already."""
    from elasticmoe_patches.worker.worker import current_worker

    kv = current_worker().kv
    return kv.shape.tokens(kv.chunks) if kv is not None else int(original(self, token_capacity))


def around_resolve_max_num_reqs(original: Any, self: Any, token_capacity: int) -> int:
    """The table of requests is made for the most tokens the rank may ever have."""
    from elasticmoe_patches.worker.worker import current_worker

    kv = current_worker().kv
    return int(original(self, kv.shape.tokens(kv.space.max_chunks) if kv is not None else token_capacity))


def _is_ours() -> bool:
    """Whether the platform makes its pools over HMM memory."""
    from sglang.srt.platforms import current_platform

    return bool(getattr(current_platform, "elastic_kv", False))


def open_kv(worker: Any, configurator: Any) -> None:
    """Make `rank.kv` and map its first chunks."""
    from sglang.srt.runtime_context import get_schedule

    from elasticmoe_sglang.worker.kv import WorkerKv

    config = worker.runtime.config
    status = worker.client.status()
    layout = kv_layout(configurator)
    caps = [cap for cap in (config.kv_tokens, get_schedule().max_total_tokens) if cap is not None]
    budget = status.devices[worker.device].budget
    shape = kv_shape(
        token_bytes=layout.token_bytes,
        page_tokens=configurator.pool_page_size,
        granularity=status.granularity,
        budget=budget,
        ranks=config.ranks_per_device,
        cap_tokens=min(caps, default=None),
    )
    most = shape.share(budget, 1)
    worker.kv = WorkerKv(
        worker.client, rank=worker.rank, device=worker.device, shape=shape, layout=layout, max_chunks=most
    )
    chunks = worker.join_spec.kv_chunks or first_share(worker, status, shape)
    worker.kv.open(min(chunks, most), worker.join_spec.txn or None, _OPEN_S)
    logger.info("rank %d: %d KV tokens in %d chunks of HMM memory", worker.rank, shape.tokens(worker.kv.chunks), chunks)


def first_share(worker: Any, status: Any, shape: KvShape) -> int:
    """Chunks of each rank of this device when the placement of the join_spec holds; all of its ranks find the same."""
    config, join_spec = worker.runtime.config, worker.join_spec
    device = device_at_rest(
        config,
        status.devices[worker.device],
        worker.spec,
        granularity=status.granularity,
        ranks=[member for member in join_spec.members if config.device_of(member) == worker.device],
        owners=worker.placement,
    )
    return device.targets(shape)[worker.rank]


def kv_layout(configurator: Any) -> KvLayout:
    """One token's keys and values, named `<layer>.k` and `<layer>.v`, or `<layer>.kv` for MLA's latent."""
    from sglang.srt.runtime_context import get_parallel

    model, dtype = configurator.model_config, configurator.kv_cache_dtype
    layers = range(configurator.layer_info.num_effective_layers)
    if configurator.use_mla_backend:
        width = model.kv_lora_rank + model.qk_rope_head_dim
        return KvLayout.of((f"{layer}.kv", (1, width), dtype) for layer in layers)
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size, get_parallel().attn_dcp_size)
    shape = (heads, model.head_dim)
    return KvLayout.of((f"{layer}.{part}", shape, dtype) for layer in layers for part in ("k", "v"))


_TARGET = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


def _hook(name: str, function: Any, signature: str, reason: str) -> HookSpec:
    return HookSpec(
        target=f"{_TARGET}.{name}",
        kind="around",
        hook=f"{__name__}:{function.__name__}",
        signature=signature,
        reason=reason,
        expires="SGLang lets a platform supply the size of a pool that can change.",
        processes=frozenset(("rank", "standby")),
    )


HOOKS = (
    _hook(
        "configure",
        around_configure,
        "(self, *, pre_model_load_memory)",
        "Maps the rank's KV memory, which the HMM owns, before SGLang builds its pool over it.",
    ),
    _hook(
        "_profile_available_bytes",
        around_profile_available_bytes,
        "(self, pre_model_load_memory)",
        "The HMM's ledger decides how much KV there is, not the device's free memory.",
    ),
    _hook(
        "_apply_token_constraints",
        around_apply_token_constraints,
        "(self, token_capacity)",
        "Tells SGLang how many tokens are mapped.",
    ),
    _hook(
        "resolve_max_num_reqs",
        around_resolve_max_num_reqs,
        "(self, token_capacity)",
        "A joining rank that begins with little KV must be able to run as many requests as the others later.",
    ),
)
