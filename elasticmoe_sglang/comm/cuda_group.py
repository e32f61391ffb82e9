"""The elastic process group for CUDA tensors: the same contract as `process_group.py`, carried out by kernels.

CPU tensors are left to the base class, CUDA tensors go through the windows of `cuda_region.py`. A collective on CUDA
tensors is queued on the current stream and may be captured in a graph; nothing waits for the device. What a kernel
reports later (a rank that did not come) is raised by the next eager collective, and by `CudaRegion.check`.

Carried: all_gather, broadcast and gather of any dtype; all_reduce, reduce and reduce_scatter_single (SUM, AVG of
floats, MIN, MAX) of bfloat16, float16, float32, float64, int32, int64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elasticmoe_kernels.triton import collectives
from elasticmoe_sglang.comm.cuda_region import CudaRegion
from elasticmoe_sglang.comm.header import DTYPE_FIELD, Op, Reduction, pack_header
from elasticmoe_sglang.comm.process_group import ElasticProcessGroup, FinishedWork, reduction_of, work_of
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import UserInputError

_REDUCTIONS = {
    Reduction.SUM: collectives.SUM,
    Reduction.AVG: collectives.AVERAGE,
    Reduction.MIN: collectives.MINIMUM,
    Reduction.MAX: collectives.MAXIMUM,
}


_SUMMED = (torch.bfloat16, torch.float32)
"""What SGLang sums: the model's values, and float32."""


def install_cuda_groups(region: CollectiveRegion, device: CudaRegion) -> None:
    """Let every process group over `region` carry CUDA tensors too. Before `install_backend` and the first group."""

    def make(
        region: CollectiveRegion, ranks: tuple[int, ...], channel: int | None, timeout_s: float
    ) -> CudaProcessGroup | None:
        if len(ranks) > 1:
            device.channel_of(ranks)  # on all ranks, so that they number the channels alike
        return CudaProcessGroup(region, ranks, channel, timeout_s, device) if region.rank in ranks else None

    region.group_type = make
    region.group_device = "cuda"


class CudaProcessGroup(ElasticProcessGroup):
    """One group. Args as `ElasticProcessGroup`; device: whose windows it uses."""

    def __init__(
        self,
        region: CollectiveRegion,
        ranks: tuple[int, ...],
        channel: int | None,
        timeout_s: float,
        device: CudaRegion,
    ) -> None:
        super().__init__(region, ranks, channel, timeout_s)
        self._device = device
        self._group = device.group(ranks) if len(ranks) > 1 else None
        device.serve_replays(self.engine)
        if self._group is not None:
            collectives.load_kernels(device.windows, self._group, _SUMMED)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    def _rendezvous(self, op: Op, tensor: Tensor) -> Callable[[], None]:
        """For `collectives`: the hosts meet once the kernels are loaded."""
        header = pack_header(Op.LAUNCH, dtype_field=DTYPE_FIELD.get(tensor.dtype, 0), nbytes=tensor.nbytes, root=op)
        return partial(self._device.rendezvous, self.engine, header)

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> FinishedWork:
        if not tensors[0].is_cuda:
            return super().allreduce(tensors, opts)
        for tensor in tensors:
            self._sum(tensor, tensor, opts)
        return work_of(opts, tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        if not tensors[0].is_cuda:
            return super().reduce(tensors, opts)
        engine = self._engine_for_root(opts.rootRank, Op.REDUCE)
        for tensor in tensors:
            mine = tensor if engine.local or engine.rank == opts.rootRank else torch.empty_like(tensor)
            self._sum(mine, tensor, opts)
        return work_of(opts, tensors)

    def _sum(self, out: Tensor, inp: Tensor, opts: Any) -> None:
        reduction = _reduction(opts, inp)
        self._device.check()
        if self._group is None or not inp.nbytes:
            return
        target, source = out.contiguous(), inp.contiguous()
        collectives.all_reduce(
            self._device.windows,
            self._group,
            target,
            source,
            reduction=reduction,
            rendezvous=self._rendezvous(Op.ALLREDUCE, inp),
        )
        _copy_back(target, out)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [n] = the combined row "my rank" of the inputs [size * n]."""
        if not output.is_cuda:
            return super().reduce_scatter_single(output, input, opts)
        self._check_rows(input, output)
        reduction = _reduction(opts, output)
        self._device.check()
        if self._group is None:
            output.copy_(input.view(output.shape))
        elif output.nbytes:
            target, source = output.contiguous(), input.contiguous()
            collectives.reduce_scatter(
                self._device.windows,
                self._group,
                target,
                source,
                reduction=reduction,
                rendezvous=self._rendezvous(Op.REDUCE_SCATTER, output),
            )
            _copy_back(target, output)
        return work_of(opts, [output])

    _reduce_scatter_base = reduce_scatter_single

    # Copies

    def broadcast(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        if not tensors[0].is_cuda:
            return super().broadcast(tensors, opts)
        self._engine_for_root(opts.rootRank, Op.BROADCAST)
        self._device.check()
        for tensor in tensors:
            if self._group is not None and tensor.nbytes:
                target = tensor.contiguous()
                collectives.broadcast(
                    self._device.windows,
                    self._group,
                    target,
                    root=opts.rootRank,
                    rendezvous=self._rendezvous(Op.BROADCAST, tensor),
                )
                _copy_back(target, tensor)
        return work_of(opts, tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [size * n]: row r is rank r's input [n]; absent rows: zero for floats, left for the rest."""
        if not output.is_cuda:
            return super().all_gather_single(output, input, opts)
        self._check_rows(output, input)
        self._device.check()
        if self._group is None:
            output.copy_(input.view(output.shape))
        elif input.nbytes:
            target, source = output.contiguous(), input.contiguous()
            zero = output.dtype.is_floating_point
            collectives.all_gather(
                self._device.windows,
                self._group,
                target,
                source,
                zero_absent=zero,
                rendezvous=self._rendezvous(Op.ALLGATHER, input),
            )
            _copy_back(target, output)
        return work_of(opts, [output])

    _allgather_base = all_gather_single

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> FinishedWork:
        if not inputs[0].is_cuda:
            return super().allgather(outputs, inputs, opts)
        for output, input in zip(outputs, inputs, strict=True):
            self._gather_rows(output, input, Op.ALLGATHER)
        return work_of(opts, [tensor for output in outputs for tensor in output])

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> FinishedWork:
        if not inputs[0].is_cuda:
            return super().gather(outputs, inputs, opts)
        engine = self._engine_for_root(opts.rootRank, Op.GATHER)
        for index, input in enumerate(inputs):
            receiving = engine.rank == opts.rootRank
            spare = [] if receiving else [torch.empty_like(input) for _ in range(engine.size)]
            self._gather_rows(outputs[index] if receiving else spare, input, Op.GATHER)
        return work_of(opts, [tensor for output in outputs for tensor in output])

    def _gather_rows(self, output: list[Tensor], input: Tensor, op: Op) -> None:
        self._check_list(output, input, op)
        rows = torch.stack([tensor.reshape(-1) for tensor in output])
        self.all_gather_single(rows.view(-1), input.reshape(-1))
        for row, target in zip(rows, output, strict=True):
            target.copy_(row.view(target.shape))

    def _check_rows(self, rows: Tensor, row: Tensor) -> None:
        if rows.nbytes != row.nbytes * self.engine.size or rows.dtype != row.dtype:
            raise UserInputError(
                f"{rows.dtype} of {rows.nbytes} bytes is not {self.engine.size} rows of {row.dtype} and "
                f"{row.nbytes} bytes"
            )


def _reduction(opts: Any, tensor: Tensor) -> int:
    reduction = reduction_of(opts, tensor)
    averaged_integers = reduction is Reduction.AVG and not tensor.dtype.is_floating_point
    if reduction not in _REDUCTIONS or tensor.dtype not in collectives.REDUCED_DTYPES or averaged_integers:
        raise UserInputError(
            f"{reduction.name} of {tensor.dtype} values on a GPU is not supported",
            hint="SUM, MIN, MAX of "
            + ", ".join(str(dtype) for dtype in collectives.REDUCED_DTYPES)
            + "; AVG of floats.",
        )
    return _REDUCTIONS[reduction]


def _copy_back(made: Tensor, wanted: Tensor) -> None:
    if made is not wanted:
        wanted.copy_(made)
