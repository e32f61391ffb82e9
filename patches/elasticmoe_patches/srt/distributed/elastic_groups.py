"""Every process group is the elastic one (reaches into sglang/srt/distributed/parallel_state.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process

_SEATS: frozenset[Process] = frozenset(("seat", "standby"))


def around_init_distributed_environment(original: Any, world_size: int = -1, rank: int = -1, **kwargs: Any) -> None:
    """WORLD over the fabric first; SGLang then finds torch.distributed initialised and builds its groups on it.

    torch asks the default group for subgroups whatever backend is named, so SGLang's gloo groups are elastic too.
    """
    from elasticmoe_patches.seat import current_seat

    current_seat().init_world(world_size=world_size, rank=rank)
    original(world_size=world_size, rank=rank, **kwargs)


HOOKS = (
    HookSpec(
        target="sglang.srt.distributed.parallel_state.init_distributed_environment",
        kind="around",
        hook=f"{__name__}:around_init_distributed_environment",
        signature="(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, backend='nccl', "
        "timeout=None, moe_a2a_backend=None, recovered_rank=False, max_world_size=None)",
        reason="Groups of all seats over shared windows, with a membership mask; nobody waits for absent seats.",
        expires="SGLang takes the distributed backend as an argument.",
        processes=_SEATS,
    ),
)
