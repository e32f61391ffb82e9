"""Every process group is the elastic one (reaches into sglang/srt/distributed/parallel_state.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process

_RANKS: frozenset[Process] = frozenset(("rank", "standby"))


def around_init_distributed_environment(original: Any, world_size: int = -1, rank: int = -1, **kwargs: Any) -> None:
    """WORLD over the collective region first; SGLang then finds torch.distributed initialised and builds its groups on
    it.

    torch asks the default group for subgroups whatever backend is named, so SGLang's gloo groups are elastic too.
    """
    from elasticmoe_patches.worker.worker import current_worker

    current_worker().init_world(world_size=world_size, rank=rank)
    original(world_size=world_size, rank=rank, **kwargs)


_COMMUNICATORS = ("use_pynccl", "use_mscclpp", "use_custom_allreduce", "use_torch_symm_mem_all_reduce")


def before_group_init(self: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """No communicator beside the group itself: each would be one of all ranks, absent ones included."""
    return (self, *args), {**kwargs, **dict.fromkeys(_COMMUNICATORS, False)}


HOOKS = (
    HookSpec(
        target="sglang.srt.distributed.parallel_state.init_distributed_environment",
        kind="around",
        hook=f"{__name__}:around_init_distributed_environment",
        signature="(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, backend='nccl', "
        "timeout=None, moe_a2a_backend=None, recovered_rank=False, max_world_size=None)",
        reason="Groups of all ranks over shared windows, with a membership mask; nobody waits for inactive ranks.",
        expires="SGLang takes the distributed backend as an argument.",
        processes=_RANKS,
    ),
    HookSpec(
        target="sglang.srt.distributed.parallel_state.GroupCoordinator.__init__",
        kind="before",
        hook=f"{__name__}:before_group_init",
        signature="(self, group_ranks, local_rank, torch_distributed_backend, use_pynccl, use_mscclpp, "
        "use_custom_allreduce, use_torch_symm_mem_all_reduce, use_hpu_communicator, use_xpu_communicator, "
        "use_npu_communicator, use_message_queue_broadcaster=False, group_name=None, "
        "gloo_timeout=datetime.timedelta(seconds=7200), recovered_rank=False, rank_offset=0, max_world_size=None)",
        reason="SGLang would build NCCL communicators beside the group, which need every rank and one GPU each.",
        expires="SGLang asks the platform which communicators to build.",
        processes=_RANKS,
    ),
)
