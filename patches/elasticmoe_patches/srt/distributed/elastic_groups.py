"""Every process group is the elastic one (reaches into sglang/srt/distributed/parallel_state.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process

_SEATS: frozenset[Process] = frozenset(("seat", "standby"))


def around_init_distributed_environment(original: Any, world_size: int = -1, rank: int = -1, **kwargs: Any) -> None:
    """WORLD over the fabric first; SGLang then finds torch.distributed initialised and builds its groups on it."""
    from elasticmoe_patches.seat import current_seat

    current_seat().init_world(world_size=world_size, rank=rank)
    kwargs["backend"] = "elastic"
    original(world_size=world_size, rank=rank, **kwargs)


def around_new_group(original: Any, ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
    """SGLang asks for gloo by name for its CPU groups."""
    kwargs.pop("use_local_synchronization", None)
    return original(ranks, backend="elastic", group_desc=kwargs.get("group_desc"))


HOOKS = (
    HookSpec(
        target="sglang.srt.distributed.parallel_state.init_distributed_environment",
        kind="around",
        hook=f"{__name__}:around_init_distributed_environment",
        signature="(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, backend='nccl', "
        "timeout=None, moe_a2a_backend=None, recovered_rank=False, max_world_size=None)",
        reason="Groups of the capacity's size over shared windows, with a membership mask; no rendezvous with absent ranks.",
        expires="SGLang takes the distributed backend as an argument.",
        processes=_SEATS,
    ),
    HookSpec(
        target="torch.distributed.new_group",
        kind="around",
        hook=f"{__name__}:around_new_group",
        signature="(ranks=None, timeout=None, backend=None, pg_options=None, use_local_synchronization=False, "
        "group_desc=None, device_id=None, sort_ranks=True)",
        reason="SGLang names gloo for its CPU groups.",
        expires="SGLang takes the CPU groups' backend as an argument.",
        processes=_SEATS,
    ),
)
