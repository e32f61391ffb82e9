"""Collectives of SGLang's GroupCoordinator without NCCL (mirrors ``sglang/srt/distributed/parallel_state.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elasticmoe_patches.spec import HookSpec, Process

if TYPE_CHECKING:
    import torch

_MODULE = "sglang.srt.distributed.parallel_state"
_RANKS: frozenset[Process] = frozenset(("rank", "standby"))


def cpu_flag(current: bool) -> bool:
    """The module's flag for "use plain torch.distributed calls, not CUDA custom operators"."""
    return True


def reduce_scatterv(
    self: Any, input_: torch.Tensor, output: torch.Tensor | None = None, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Sum `input_` [sum(sizes), ...] over the ranks and keep this rank's rows, [sizes[rank], ...].

    `sizes` None means equal parts. `output`, where given, receives the rows and is returned. `input_` is not changed.
    """
    import torch.distributed as dist

    sizes = _sizes(self.world_size, input_.shape[0], sizes)
    if input_.is_cuda and len(set(sizes)) == 1:  # gloo, on the CPU platform, has no reduce-scatter
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


def all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    sizes: Sequence[int] | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Every rank's rows, [sizes[r], ...] of rank r, one after the other; a list of tensors is gathered one by one."""
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


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(
        target=f"{_MODULE}._is_cpu",
        kind="attribute",
        hook=f"{__name__}:cpu_flag",
        signature="bool",
        reason="all_gather_into_tensor and reduce_scatter_tensor go through CUDA-only custom operators unless this is "
        "set, and SGLang sets it only for its own CPU engine, which needs sgl_kernel.",
        expires="SGLang asks the platform instead of SGLANG_USE_CPU_ENGINE.",
        scope="platform",
        processes=_RANKS,
    ),
    HookSpec(
        target=f"{_MODULE}.GroupCoordinator.reduce_scatterv",
        kind="replace",
        hook=f"{__name__}:reduce_scatterv",
        signature="(self, input_, output=None, sizes=None)",
        reason="Data-parallel attention returns its rows with it; SGLang has it on pynccl only.",
        expires="SGLang has a torch.distributed path for it.",
        scope="both",
        processes=_RANKS,
    ),
    HookSpec(
        target=f"{_MODULE}.GroupCoordinator.all_gatherv",
        kind="replace",
        hook=f"{__name__}:all_gatherv",
        signature="(self, input_, sizes=None, output=None)",
        reason="Data-parallel attention may gather rows of unequal number with it; SGLang has it on pynccl only.",
        expires="SGLang has a torch.distributed path for it.",
        scope="both",
        processes=_RANKS,
    ),
)
