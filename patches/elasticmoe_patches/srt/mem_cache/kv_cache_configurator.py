"""How large a seat's KV pool is (mirrors sglang/srt/mem_cache/kv_cache_configurator.py).

SGLang sizes its pool once, by what the device has left. A seat's pool is what of its HMM memory is mapped now: it is
opened here, and SGLang is told that size. It changes later, see `resize.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from elasticmoe_patches.spec import HookSpec
from elasticmoe_sglang.hmm.layout import KvLayout
from elasticmoe_sglang.planner import KvShape, kv_shape
from elasticmoe_sglang.seats.kv_room import device_at_rest

logger = logging.getLogger(__name__)

_NO_LIMIT = 1 << 50
# How long memory of a process that is just ending is waited for.
_OPEN_S = 3.0


def around_configure(original: Any, self: Any, *, pre_model_load_memory: int) -> Any:
    """Open the seat's KV cache before SGLang makes its pool over it."""
    from elasticmoe_patches.seat import current_seat

    if _is_ours():
        open_kv(current_seat(), self)
    return original(self, pre_model_load_memory=pre_model_load_memory)


def around_profile_available_bytes(original: Any, self: Any, pre_model_load_memory: int) -> int:
    """The device's free memory is the HMM's business."""
    from elasticmoe_patches.seat import current_seat

    return _NO_LIMIT if current_seat().kv is not None else int(original(self, pre_model_load_memory))


def around_apply_token_constraints(original: Any, self: Any, token_capacity: int) -> int:
    """SGLang's own limits are in the shape's cap already."""
    from elasticmoe_patches.seat import current_seat

    kv = current_seat().kv
    return kv.shape.tokens(kv.chunks) if kv is not None else int(original(self, token_capacity))


def around_resolve_max_num_reqs(original: Any, self: Any, token_capacity: int) -> int:
    """The table of requests is made for the most tokens the seat may ever have."""
    from elasticmoe_patches.seat import current_seat

    kv = current_seat().kv
    return int(original(self, kv.shape.tokens(kv.space.max_chunks) if kv is not None else token_capacity))


def _is_ours() -> bool:
    """Whether the platform makes its pools over HMM memory."""
    from sglang.srt.platforms import current_platform

    return bool(getattr(current_platform, "elastic_kv", False))


def open_kv(seat: Any, configurator: Any) -> None:
    """Make `seat.kv` and map its first chunks."""
    from sglang.srt.runtime_context import get_schedule

    from elasticmoe_sglang.seats.kv import SeatKv

    config = seat.runtime.config
    status = seat.client.status()
    layout = kv_layout(configurator)
    caps = [cap for cap in (config.kv_tokens, get_schedule().max_total_tokens) if cap is not None]
    budget = status.devices[seat.device].budget
    shape = kv_shape(
        token_bytes=layout.token_bytes,
        page_tokens=configurator.pool_page_size,
        granularity=status.granularity,
        budget=budget,
        seats=config.seats_per_device,
        cap_tokens=min(caps, default=None),
    )
    most = shape.share(budget, 1)
    seat.kv = SeatKv(seat.client, seat=seat.me, device=seat.device, shape=shape, layout=layout, max_chunks=most)
    chunks = seat.ticket.kv_chunks or first_share(seat, status, shape)
    seat.kv.open(min(chunks, most), seat.ticket.txn or None, _OPEN_S)
    logger.info("seat %d: %d KV tokens in %d chunks of HMM memory", seat.me, shape.tokens(seat.kv.chunks), chunks)


def first_share(seat: Any, status: Any, shape: KvShape) -> int:
    """Chunks of each seat of this device when the placement of the ticket holds; all of its seats find the same."""
    config, ticket = seat.runtime.config, seat.ticket
    device = device_at_rest(
        config,
        status.devices[seat.device],
        seat.spec,
        granularity=status.granularity,
        seats=[member for member in ticket.members if config.device_of(member) == seat.device],
        owners=seat.placement,
    )
    return device.targets(shape)[seat.me]


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
        processes=frozenset(("seat", "standby")),
    )


HOOKS = (
    _hook(
        "configure",
        around_configure,
        "(self, *, pre_model_load_memory)",
        "Maps the seat's KV memory, which the HMM owns, before SGLang builds its pool over it.",
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
        "A joiner that begins with little KV must be able to run as many requests as the others later.",
    ),
)
