"""Every process group is the elastic one, and the collectives that SGLang has on NCCL only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.worker import current_worker

if TYPE_CHECKING:
    import torch

HOOKS = hook = Hooks(__name__, WORKERS)

_GROUP = (
    "(self, group_ranks, local_rank, torch_distributed_backend, use_pynccl, use_mscclpp, use_custom_allreduce, "
    "use_torch_symm_mem_all_reduce, use_hpu_communicator, use_xpu_communicator"
)
_GROUP_OPTIONS = (
    "use_message_queue_broadcaster=False, group_name=None, gloo_timeout=datetime.timedelta(seconds=7200), "
    "recovered_rank=False, rank_offset=0, max_world_size=None"
)
_COMMUNICATORS = ("use_pynccl", "use_mscclpp", "use_custom_allreduce", "use_torch_symm_mem_all_reduce")


@hook(
    "around",
    "init_distributed_environment(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, "
    "backend='nccl', timeout=None, moe_a2a_backend=None, recovered_rank=False, max_world_size=None)",
    expires="SGLang takes the distributed backend as an argument.",
)
def around_init_distributed_environment(original: Any, world_size: int = -1, rank: int = -1, **kwargs: Any) -> None:
    """Groups of all ranks over shared windows, with a membership mask; nobody waits for inactive ranks.

    The default group is made over the collective region first; SGLang then finds torch.distributed initialised and
    builds its groups on it. torch asks the default group for subgroups whatever backend is named, so SGLang's gloo
    groups are elastic too.
    """
    current_worker().init_world(world_size=world_size, rank=rank)
    original(world_size=world_size, rank=rank, **kwargs)


@hook(
    "before",
    f"GroupCoordinator.__init__{_GROUP}, use_npu_communicator, {_GROUP_OPTIONS})",
    also={"0.5.23": f"{_GROUP}, {_GROUP_OPTIONS})"},
    expires="SGLang asks the platform which communicators to build.",
)
def before_group_init(self: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """SGLang would build NCCL communicators beside the group, which need every rank and one GPU each."""
    return (self, *args), {**kwargs, **dict.fromkeys(_COMMUNICATORS, False)}


@hook(
    "attribute",
    "_is_cpu: bool",
    scope="platform",
    expires="SGLang asks the platform instead of SGLANG_USE_CPU_ENGINE.",
)
def cpu_flag(current: bool) -> bool:
    """all_gather_into_tensor and reduce_scatter_tensor go through CUDA-only custom operators unless this is set, and
    SGLang sets it only for its own CPU engine, which needs sgl_kernel."""
    return True


@hook(
    "replace",
    "GroupCoordinator.reduce_scatterv(self, input_, output=None, sizes=None)",
    scope="both",
    expires="SGLang has a torch.distributed path for it.",
)
def reduce_scatterv(
    self: Any, input_: torch.Tensor, output: torch.Tensor | None = None, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Data-parallel attention returns its rows with it; SGLang has it on pynccl only.

    Sums `input_` [sum(sizes), ...] over the ranks and keeps this rank's rows, [sizes[rank], ...].
    `sizes` None means equal parts. `output`, where given, receives the rows and is returned. `input_` is not changed.
    """
    import torch.distributed as dist

    sizes = _sizes(self.world_size, input_.shape[0], sizes)
    if not input_.is_cpu and len(set(sizes)) == 1:  # gloo, on the CPU platform, has no reduce-scatter
        rows = input_.new_empty((sizes[0], *input_.shape[1:])) if output is None else output
        dist.reduce_scatter_tensor(rows, input_, group=self.device_group)
        return rows
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    start = sum(sizes[: self.rank_in_group])
    mine = total[start : start + sizes[self.rank_in_group]]
    if output is None:
        return mine
    return output.copy_(mine)


@hook(
    "replace",
    "GroupCoordinator.all_gatherv(self, input_, sizes=None, output=None)",
    scope="both",
    expires="SGLang has a torch.distributed path for it.",
)
def all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    sizes: Sequence[int] | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Data-parallel attention may gather rows of unequal number with it; SGLang has it on pynccl only.

    Returns every rank's rows, [sizes[r], ...] of rank r, one after the other; a list of tensors is gathered one by one.
    """
    if isinstance(input_, list):
        if output is not None:
            raise ValueError("all_gatherv takes an output only with a single tensor")
        return [_gather_rows(self, tensor, sizes, None) for tensor in input_]
    return _gather_rows(self, input_, sizes, output)


def _gather_rows(
    group: Any, rows: torch.Tensor, sizes: Sequence[int] | None, output: torch.Tensor | None
) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    sizes = list(sizes) if sizes is not None else [rows.shape[0]] * group.world_size
    # Padded to the longest: gloo gathers equal parts only.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group.device_group)
    result = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return result if output is None else output.copy_(result)


def _sizes(world_size: int, rows: int, sizes: Sequence[int] | None) -> list[int]:
    if sizes is None:
        sizes = [rows // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != rows:
        raise ValueError(f"{rows} rows cannot be cut into parts of {list(sizes)} for {world_size} ranks")
    return list(sizes)
