"""The elastic process group for NPU tensors: the contract of `process_group.py`, carried out in host memory.

An NPU tensor is copied to the host, goes through the same shared windows as a CPU tensor, and its result is copied
back. So a change of membership costs NPU ranks what it costs CPU ranks, which is nothing, and masks, deadlines and
errors are the same. The price is two copies a collective over the host's bus, and that a collective waits for the
device: it cannot be captured in an NPU graph (docs/adr/0012-npu-collectives.md).

In a group in which only this rank is present nothing leaves the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elasticmoe_sglang.comm.process_group import ElasticProcessGroup, FinishedWork, install_groups, work_of
from elasticmoe_sglang.comm.region import CollectiveRegion

KIND = "npu"
Collective = Callable[..., FinishedWork]


def install_npu_groups(region: CollectiveRegion) -> None:
    """Let every process group over `region` carry NPU tensors too. Before `install_backend` and the first group."""
    install_groups(region, NpuProcessGroup, KIND)


class NpuProcessGroup(ElasticProcessGroup):
    """One group. Args as `ElasticProcessGroup`. CPU tensors are left to the base class."""

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device(KIND)]

    def _elsewhere(self, tensor: Tensor) -> bool:
        return tensor.device.type == KIND

    def _host(self, tensor: Tensor) -> Tensor:
        """The values in host memory, once the device has computed them."""
        return tensor.cpu()

    def _like(self, output: Tensor) -> Tensor:
        """Host memory for `output`, with its values where absent ranks' rows are left as the caller filled them."""
        return _shape_only(output) if output.dtype.is_floating_point else self._host(output)

    def _in_host_memory(self, collective: Collective, tensors: list[Tensor], opts: Any) -> FinishedWork:
        """A collective of the base class whose tensors are inputs and outputs."""
        staged = [self._host(tensor) for tensor in tensors]
        collective(staged, opts)
        return _back(opts, staged, tensors)

    def _rows_in_host_memory(
        self, collective: Collective, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any
    ) -> FinishedWork:
        """A collective of the base class with lists of outputs, one tensor a rank."""
        staged = [[self._like(row) for row in output] for output in outputs]
        collective(staged, [self._host(tensor) for tensor in inputs], opts)
        return _back(opts, _flat(staged), _flat(outputs))

    # In place

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> FinishedWork:
        if not self._elsewhere(tensors[0]):
            return super().allreduce(tensors, opts)
        self.engine.refresh()
        if self.engine.local:
            super().allreduce([_shape_only(tensor) for tensor in tensors], opts)  # what it refuses is refused here too
            return work_of(opts, tensors)
        return self._in_host_memory(super().allreduce, tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        if not self._elsewhere(tensors[0]):
            return super().reduce(tensors, opts)
        return self._in_host_memory(super().reduce, tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        if not self._elsewhere(tensors[0]):
            return super().broadcast(tensors, opts)
        return self._in_host_memory(super().broadcast, tensors, opts)

    # Between an input and an output

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [size * n]: row r is rank r's input [n]; absent rows: zero for floats, left for the rest."""
        if not self._elsewhere(output):
            return super().all_gather_single(output, input, opts)
        self.engine.refresh()
        if self.engine.local and output.is_contiguous() and output.nbytes == input.nbytes * self.engine.size:
            rows = output.view(self.engine.size, -1)
            if output.dtype.is_floating_point:
                for first, count in self.engine.absent_runs:  # not this rank's row: the input may be it
                    rows[first : first + count].zero_()
            rows[self.engine.rank].copy_(input.reshape(-1))
            return work_of(opts, [output])
        staged = self._like(output)
        super().all_gather_single(staged, self._host(input), opts)
        return _back(opts, [staged], [output])

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [n] = the combined row "my rank" of the inputs [size * n]."""
        if not self._elsewhere(output):
            return super().reduce_scatter_single(output, input, opts)
        staged = torch.empty(output.shape, dtype=output.dtype)
        super().reduce_scatter_single(staged, self._host(input), opts)
        return _back(opts, [staged], [output])

    _reduce_scatter_base = reduce_scatter_single

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> FinishedWork:
        if not self._elsewhere(inputs[0]):
            return super().allgather(outputs, inputs, opts)
        return self._rows_in_host_memory(super().allgather, outputs, inputs, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> FinishedWork:
        if not self._elsewhere(inputs[0]):
            return super().gather(outputs, inputs, opts)
        return self._rows_in_host_memory(super().gather, outputs, inputs, opts)


def _flat(rows: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for row in rows for tensor in row]


def _shape_only(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _back(opts: Any, staged: list[Tensor], tensors: list[Tensor]) -> FinishedWork:
    for made, wanted in zip(staged, tensors, strict=True):
        wanted.copy_(made)
    return work_of(opts, tensors)
