"""The elastic process group: a torch.distributed backend whose groups keep their size while ranks come and go.

Registered as backend "elastic" for CPU tensors. SGLang believes that the world has `capacity` ranks; a collective runs
over the active ranks only.

Rows of absent ranks in an output (all_gather, gather, all_to_all): floating-point rows become zero, integer and bool
rows stay as the caller filled them. SGLang prefills its scheduler metadata (int64) with an idle row for ranks that are
not there, and hidden states of nobody must be finite and the same everywhere (docs/adr: rows of inactive ranks).
AVG divides by the number of present ranks. A broadcast, scatter, gather or reduce whose root is absent raises
`RankInactive`, except in a group in which only this rank is present: there it is local and nothing changes.

Numerics: reductions go in rank order and give every rank the same bits; float16 and bfloat16 are summed in float32.
Collectives run to their end in the calling thread; one thread at a time per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elasticmoe_sglang.comm.copying import zero_bytes
from elasticmoe_sglang.comm.engine import GroupEngine
from elasticmoe_sglang.comm.header import Op, Reduction, dtype_field, pack_header
from elasticmoe_sglang.comm.options import reduction_of, work_of
from elasticmoe_sglang.comm.point_to_point import PointToPoint
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.comm.work import FINISHED, FinishedWork
from elasticmoe_sglang.errors import UserInputError

BACKEND_NAME = "elastic"
_DEFAULT_TIMEOUT = timedelta(minutes=30)  # torch.distributed's own
_Base: Any = dist.ProcessGroup  # the stubs do not know that it can be subclassed


class ElasticProcessGroup(PointToPoint, _Base):  # type: ignore[misc]
    """One group. Its methods are those that `torch.distributed` calls, with its options objects.

    Args:
        collective region: who is present.
        ranks: rank of each group rank.
        channel: None for a group of one.
        timeout_s: how long a member may be late, unless the collective region says less.
    """

    def __init__(self, region: CollectiveRegion, ranks: tuple[int, ...], channel: int | None, timeout_s: float) -> None:
        engine = GroupEngine(region, ranks, channel, timeout_s)
        super().__init__(engine.rank, engine.size)
        self.engine = engine
        self._name = ""
        self._desc = ""

    # What torch.distributed asks a group about itself.
    def getBackendName(self) -> str:
        return BACKEND_NAME

    def getSize(self) -> int:
        return self.engine.size

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._desc

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def new_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        pg_options: Any = None,
        group_name: str = "",
        group_desc: str | None = None,
    ) -> ElasticProcessGroup | None:
        """`torch.distributed.new_group` asks the default group for its subgroups, whatever backend the caller named.

        Called by every rank for every group, so all ranks number the channels alike.
        """
        global_ranks = tuple(self.engine.ranks[rank] for rank in ranks)
        group = make_group(self.engine.region, global_ranks, timeout)
        if group is not None:
            group._set_group_name(group_name)
            group._set_group_desc(group_desc or "undefined")
        return group

    def shutdown(self) -> None:
        """Give the channel back."""
        if self.engine.channel_index is not None:
            self.engine.region.return_channel(self.engine.channel_index)
            self.engine.channel_index = None

    def abort(self) -> None:
        self.shutdown()

    # Collectives
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> FinishedWork:
        for tensor in tensors:
            self._all_reduce(tensor, reduction_of(opts, tensor))
        return work_of(opts, tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> FinishedWork:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        engine = self._engine_for_root(opts.rootRank, Op.REDUCE)
        for tensor in tensors:
            self._all_reduce(tensor, reduction_of(opts, tensor), None if engine.local else opts.rootRank)
        return work_of(opts, tensors)

    def _all_reduce(self, tensor: Tensor, reduction: Reduction, root: int | None = None) -> None:
        engine = self.engine
        engine.refresh()
        field = dtype_field(tensor)
        if engine.local:
            return
        op = Op.ALLREDUCE if root is None else Op.REDUCE
        header = pack_header(op, dtype_field=field, nbytes=tensor.nbytes, reduction=reduction, root=root or 0)
        if tensor.is_contiguous():
            engine.all_reduce(tensor.view(-1), reduction, header, root)
        else:
            values = tensor.contiguous().view(-1)
            engine.all_reduce(values, reduction, header, root)
            tensor.copy_(values.view(tensor.shape))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> FinishedWork:
        root = opts.rootRank
        engine = self._engine_for_root(root, Op.BROADCAST)
        for tensor in tensors:
            header = pack_header(Op.BROADCAST, dtype_field=dtype_field(tensor), nbytes=tensor.nbytes, root=root)
            if tensor.is_contiguous():
                engine.broadcast(tensor.data_ptr(), tensor.nbytes, root, header)
            else:
                values = tensor.contiguous()
                engine.broadcast(values.data_ptr(), tensor.nbytes, root, header)
                tensor.copy_(values)
        return work_of(opts, tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [size * n]: row r is rank r's input [n]."""
        engine = self.engine
        engine.refresh()
        field, nbytes = dtype_field(input), input.nbytes
        if output.nbytes != nbytes * engine.size or output.dtype != input.dtype:
            raise UserInputError(
                f"all_gather output is {output.dtype} of {output.nbytes} bytes, "
                f"{engine.size} rows of {input.dtype} and {nbytes} bytes are needed"
            )
        source = input if input.is_contiguous() else input.contiguous()
        target = output if output.is_contiguous() else output.contiguous()
        begin = target.data_ptr()
        header = pack_header(Op.ALLGATHER, dtype_field=field, nbytes=nbytes)
        if nbytes:
            engine.all_gather(source.data_ptr(), nbytes, range(begin, begin + nbytes * engine.size, nbytes), header)
        if engine.absent_runs and output.dtype.is_floating_point:
            for first, count in engine.absent_runs:
                zero_bytes(begin + first * nbytes, count * nbytes)
        if target is not output:
            output.copy_(target)
        return work_of(opts, [output])

    _allgather_base = all_gather_single

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> FinishedWork:
        for output, input in zip(outputs, inputs, strict=True):
            self._gather_list(output, input, Op.ALLGATHER, None)
        return work_of(opts, [tensor for output in outputs for tensor in output])

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> FinishedWork:
        return self.allgather(outputs, inputs, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> FinishedWork:
        for output, input in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, input)
        return work_of(opts, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> FinishedWork:
        self._engine_for_root(opts.rootRank, Op.GATHER)
        for index, input in enumerate(inputs):
            self._gather_list(outputs[index] if outputs else [], input, Op.GATHER, opts.rootRank)
        return work_of(opts, [tensor for output in outputs for tensor in output])

    def _gather_list(self, output: list[Tensor], input: Tensor, op: Op, root: int | None) -> None:
        engine = self.engine
        engine.refresh()
        nbytes = input.nbytes
        header = pack_header(op, dtype_field=dtype_field(input), nbytes=nbytes, root=root or 0)
        receiving = root is None or root == engine.rank
        if receiving:
            self._check_list(output, input, op)
        source = input.contiguous()
        rows = [row if row.is_contiguous() else row.contiguous() for row in output]
        targets = [row.data_ptr() for row in rows]
        if root is None:
            engine.all_gather(source.data_ptr(), nbytes, targets, header)
        elif not engine.local or receiving:
            engine.gather(source.data_ptr(), nbytes, targets, root, header)
        if receiving:
            self._finish_rows(output, rows)

    def _check_list(self, tensors: list[Tensor], like: Tensor, op: Op) -> None:
        if len(tensors) != self.engine.size:
            raise UserInputError(f"{op.name.lower()} needs {self.engine.size} tensors, got {len(tensors)}")
        for tensor in tensors:
            if tensor.nbytes != like.nbytes or tensor.dtype != like.dtype:
                raise UserInputError(
                    f"{op.name.lower()} needs tensors of {like.dtype} and {like.nbytes} bytes, "
                    f"got {tensor.dtype} and {tensor.nbytes}"
                )

    def _finish_rows(self, output: list[Tensor], rows: list[Tensor]) -> None:
        """Zero the absent floating rows; copy back what was gathered beside a strided output."""
        for rank in self.engine.absent:
            if rows[rank].dtype.is_floating_point:
                rows[rank].zero_()
        for row, target in zip(rows, output, strict=True):
            if row is not target:
                target.copy_(row)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> FinishedWork:
        root = opts.rootRank
        engine = self._engine_for_root(root, Op.SCATTER)
        for index, output in enumerate(outputs):
            header = pack_header(Op.SCATTER, dtype_field=dtype_field(output), nbytes=output.nbytes, root=root)
            sources: list[Tensor] = []
            if root == engine.rank:
                self._check_list(inputs[index], output, Op.SCATTER)
                sources = [tensor.contiguous() for tensor in inputs[index]]
            elif engine.local:
                continue
            target = output if output.is_contiguous() else output.contiguous()
            addresses = [tensor.data_ptr() for tensor in sources]
            engine.scatter(target.data_ptr(), output.nbytes, addresses, root, header)
            if target is not output:
                output.copy_(target)
        return work_of(opts, outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [n] = the combined row "my rank" of the inputs [size * n]."""
        if input.nbytes != output.nbytes * self.engine.size or output.dtype != input.dtype:
            raise UserInputError(
                f"reduce_scatter input is {input.dtype} of {input.nbytes} bytes, "
                f"{self.engine.size} rows of {output.dtype} and {output.nbytes} bytes are needed"
            )
        source = input.contiguous()
        begin, nbytes = source.data_ptr(), output.nbytes
        addresses = range(begin, begin + nbytes * self.engine.size, nbytes) if nbytes else (begin,) * self.engine.size
        rows = source.view(self.engine.size, -1) if nbytes else source
        self._reduce_scatter(output, addresses, rows, opts)
        return work_of(opts, [output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> FinishedWork:
        for output, input in zip(outputs, inputs, strict=True):
            self._check_list(input, output, Op.REDUCE_SCATTER)
            rows = [tensor.contiguous() for tensor in input]
            self._reduce_scatter(output, [row.data_ptr() for row in rows], rows, opts)
        return work_of(opts, outputs)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> FinishedWork:
        for output, input in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, input, opts)
        return work_of(opts, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(
        self, output: Tensor, addresses: Sequence[int], rows: Sequence[Tensor] | Tensor, opts: Any
    ) -> None:
        engine = self.engine
        engine.refresh()
        reduction = reduction_of(opts, output)
        header = pack_header(
            Op.REDUCE_SCATTER, dtype_field=dtype_field(output), nbytes=output.nbytes, reduction=reduction
        )
        if not output.nbytes:
            return
        target = output if output.is_contiguous() else output.contiguous()
        if not engine.reduce_scatter(target.view(-1), addresses, reduction, header):
            target.view(-1).copy_(rows[engine.rank].reshape(-1))
        if target is not output:
            output.copy_(target)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        opts: Any = None,
    ) -> FinishedWork:
        """Splits count rows (dim 0) for each rank; empty means even."""
        source = input.contiguous()
        target = output if output.is_contiguous() else output.contiguous()
        uneven = bool(output_split_sizes or input_split_sizes)
        sends = self._split(source, input_split_sizes)
        receives = self._split(target, output_split_sizes)
        self._all_to_all(sends, receives, input, uneven)
        if target.dtype.is_floating_point:
            for rank in self.engine.absent:
                zero_bytes(*receives[rank])
        if target is not output:
            output.copy_(target)
        return work_of(opts, [output])

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> FinishedWork:
        sources = [tensor.contiguous() for tensor in inputs]
        targets = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in outputs]
        sizes = {tensor.nbytes for tensor in (*sources, *targets)}
        self._all_to_all(
            [(tensor.data_ptr(), tensor.nbytes) for tensor in sources],
            [(tensor.data_ptr(), tensor.nbytes) for tensor in targets],
            inputs[0],
            uneven=len(sizes) > 1,
        )
        self._finish_rows(outputs, targets)
        return work_of(opts, outputs)

    def _all_to_all(
        self, sends: list[tuple[int, int]], receives: list[tuple[int, int]], like: Tensor, uneven: bool
    ) -> None:
        engine = self.engine
        engine.refresh()
        # Sizes may differ between ranks, so the header names none when they are exchanged anyway.
        nbytes = 0 if uneven else sends[engine.rank][1]
        header = pack_header(Op.ALL_TO_ALL, dtype_field=dtype_field(like), nbytes=nbytes)
        engine.all_to_all(sends, receives, header, uneven=uneven)

    def _split(self, tensor: Tensor, sizes: list[int] | None) -> list[tuple[int, int]]:
        size, rows = self.engine.size, tensor.shape[0] if tensor.dim() else 1
        if not sizes:
            if rows % size:
                raise UserInputError(f"{rows} rows cannot be split evenly among {size} ranks")
            sizes = [rows // size] * size
        if len(sizes) != size or sum(sizes) != rows:
            raise UserInputError(f"splits {sizes} do not divide {rows} rows among {size} ranks")
        row_bytes = tensor.nbytes // rows if rows else 0
        address, parts = tensor.data_ptr(), []
        for count in sizes:
            parts.append((address, count * row_bytes))
            address += count * row_bytes
        return parts

    def barrier(self, opts: Any = None) -> FinishedWork:
        self.engine.refresh()
        timeout = opts.timeout.total_seconds() if opts is not None else -1.0
        self.engine.barrier(timeout if timeout > 0 else None)
        return FINISHED

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier with its own deadline. Its error names every rank that did not come, whatever `wait_all_ranks`."""
        self.engine.refresh()
        self.engine.barrier(None if timeout is None else timeout.total_seconds())

    def _engine_for_root(self, root: int, op: Op) -> GroupEngine:
        engine = self.engine
        engine.refresh()
        if not engine.local:
            engine.require_present(root, op)
        return engine


def make_group(
    region: CollectiveRegion, ranks: tuple[int, ...], timeout: timedelta | None
) -> ElasticProcessGroup | None:
    """A group of these ranks; None when this rank is not one of them. Takes a channel either way, as all ranks do.

    Raises:
        UserInputError: no channel is left.
    """
    channel = region.take_channel() if len(ranks) > 1 else None
    timeout_s = (timeout or _DEFAULT_TIMEOUT).total_seconds()
    if region.group_type is not None:
        made: ElasticProcessGroup | None = region.group_type(region, ranks, channel, timeout_s)
        return made
    return ElasticProcessGroup(region, ranks, channel, timeout_s) if region.rank in ranks else None
