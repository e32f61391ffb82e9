"""The elastic process group: a torch.distributed backend whose groups keep their size while ranks come and go.

    init_elastic(region, rank=rank, world_size=capacity)

registers it as backend "elastic" and makes the default group. SGLang believes that the world has `capacity` ranks; a
collective runs over the active ranks only. After that `torch.distributed.new_group` makes elastic groups whatever
backend is named. No group reads or writes a rendezvous store, so each process gets one of its own (`HashStore`) and
waits for nobody.

Rows of absent ranks in an output (all_gather, gather): floating-point rows become zero, integer and bool rows stay as
the caller filled them. SGLang prefills its scheduler metadata (int64) with an idle row for ranks that are not there,
and hidden states of an absent rank must be finite and the same everywhere. AVG divides by the number of present ranks.
A broadcast, gather or reduce whose root is absent raises `RankInactive`, except in a group in which only this rank is
present: there it is local and nothing changes.

Carried is what SGLang calls at the settings an elastic server allows, and what torch's object collectives need. The
rest of torch's interface (`_NOT_CARRIED`) raises `UnsupportedFeature`.

Numerics: reductions go in rank order and give every rank the same bits; float16 and bfloat16 are summed in float32.
Collectives run to their end in the calling thread; one thread at a time per group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from elasticmoe_sglang.comm.copying import zero_bytes
from elasticmoe_sglang.comm.engine import GroupEngine
from elasticmoe_sglang.comm.header import Op, Reduction, dtype_field, pack_header
from elasticmoe_sglang.comm.reduce import check_reduction
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError

BACKEND_NAME = "elastic"
_DEFAULT_TIMEOUT = timedelta(minutes=30)  # torch.distributed's own
# The stubs do not know that these can be subclassed, nor what is assigned to the module below.
_GroupBase: Any = dist.ProcessGroup
_WorkBase: Any = dist._Work  # type: ignore[attr-defined]
_c10d: Any = distributed_c10d

_NOT_CARRIED = (
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "recv",
    "recv_anysource",
    "reduce_scatter",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Methods by which torch would reach collectives that no setting of an elastic server leads to."""

_RedOp = dist.ReduceOp.RedOpType
_REDUCTIONS: dict[Any, Reduction] = {getattr(_RedOp, reduction.name): reduction for reduction in Reduction}


def reduction_of(opts: Any, tensor: Tensor) -> Reduction:
    """The reduction that torch's options ask for. Raises UserInputError when the values cannot be combined so."""
    if opts is None:
        return Reduction.SUM
    op = getattr(opts.reduceOp, "op", opts.reduceOp)
    reduction = _REDUCTIONS.get(op)
    if reduction is None:
        raise UserInputError(f"reduction {op} is not supported")
    if reduction is not Reduction.SUM or tensor.is_complex():
        check_reduction(reduction, tensor.dtype)
    return reduction


class FinishedWork(_WorkBase):  # type: ignore[misc]
    """The handle of a collective, which is over when its call returns. `result`: the output tensors."""

    def __init__(self, result: list[Any] | None = None) -> None:
        super().__init__()
        self._result = [] if result is None else result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> list[Any]:
        return self._result

    def synchronize(self) -> None:
        return

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._result)
        return future


_FINISHED = FinishedWork()


def work_of(opts: Any, result: list[Any]) -> FinishedWork:
    """The handle of a collective that is over; one of its own only where the caller asked for it."""
    return FinishedWork(result) if opts is not None and opts.asyncOp else _FINISHED


class ElasticProcessGroup(_GroupBase):  # type: ignore[misc]
    """One group. Its methods are those that `torch.distributed` calls, with its options objects.

    Args:
        region: says which ranks are present.
        ranks: rank of each group rank.
        channel: None for a group of one.
        timeout_s: how long a member may be late, unless the region says less.
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

    def _get_backend(self, device: torch.device) -> ElasticProcessGroup:
        """The group is its own backend. Inductor asks for it when its cache has what a rank would compile."""
        if device.type not in {each.type for each in self._device_types}:
            raise RuntimeError(f"the group carries no tensors on {device.type}")
        return self

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

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> FinishedWork:
        """output [n] = the combined row "my rank" of the inputs [size * n]."""
        if input.nbytes != output.nbytes * self.engine.size or output.dtype != input.dtype:
            raise UserInputError(
                f"reduce_scatter input is {input.dtype} of {input.nbytes} bytes, "
                f"{self.engine.size} rows of {output.dtype} and {output.nbytes} bytes are needed"
            )
        engine = self.engine
        engine.refresh()
        reduction = reduction_of(opts, output)
        nbytes = output.nbytes
        header = pack_header(Op.REDUCE_SCATTER, dtype_field=dtype_field(output), nbytes=nbytes, reduction=reduction)
        if nbytes:
            source = input.contiguous()
            target = output if output.is_contiguous() else output.contiguous()
            begin = source.data_ptr()
            rows = range(begin, begin + nbytes * engine.size, nbytes)
            engine.reduce_scatter(target.view(-1), rows, reduction, header)
            if target is not output:
                output.copy_(target)
        return work_of(opts, [output])

    _reduce_scatter_base = reduce_scatter_single

    def barrier(self, opts: Any = None) -> FinishedWork:
        self.engine.refresh()
        timeout = opts.timeout.total_seconds() if opts is not None else -1.0
        self.engine.barrier(timeout if timeout > 0 else None)
        return _FINISHED

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


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: ElasticProcessGroup, *_arguments: Any, **_options: Any) -> NoReturn:
        raise UnsupportedFeature(
            f"the elastic process group does not carry {name}",
            rank=self.engine.region.rank,
            operation=name,
            hint="It carries all_reduce, reduce, broadcast, all_gather, gather, reduce_scatter_single and barrier.",
        )

    return refuse


for _name in _NOT_CARRIED:
    setattr(ElasticProcessGroup, _name, _refusing(_name))


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


# Under torch.distributed

_region: CollectiveRegion | None = None  # of the groups that torch makes by the backend's name


def install_groups(region: CollectiveRegion, group: type[ElasticProcessGroup], device: str = "") -> None:
    """Have every process group over `region` made as a `group`. Before `install_backend` and the first group.

    Args:
        device: type of the devices whose tensors it carries beside the CPU's.
    """

    def make(
        region: CollectiveRegion, ranks: tuple[int, ...], channel: int | None, timeout_s: float
    ) -> ElasticProcessGroup | None:
        return group(region, ranks, channel, timeout_s) if region.rank in ranks else None

    region.group_type, region.group_device = make, device


def install_backend(region: CollectiveRegion) -> None:
    """Register the backend with torch.distributed for CPU tensors, and for a device's if the region's groups carry them
    (`install_cuda_groups`, `install_npu_groups`). Again with another region: that one from now on."""
    global _region
    registered = _region is not None
    _region = region
    if registered:
        return

    def create(options: Any, _backend_options: Any = None) -> ElasticProcessGroup:
        assert _region is not None
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        group = make_group(_region, ranks, options.timeout)
        assert group is not None, "torch.distributed creates a group only on its own ranks"
        return group

    devices = ["cpu", *filter(None, [region.group_device])]
    dist.Backend.register_backend(BACKEND_NAME, create, extended_api=True, devices=devices)
    _install_object_collectives()
    if "default_pg.new_group(" not in inspect.getsource(_c10d):
        _install_new_group()


def init_elastic(region: CollectiveRegion, rank: int, world_size: int, *, timeout: timedelta | None = None) -> None:
    """`torch.distributed.init_process_group` over the region. Waits for nobody.

    Args:
        rank, world_size: the region's rank and capacity.
        timeout: of the default group, torch's own default when None; the region's is used where it is shorter.

    Raises:
        UserInputError: rank or size are not the region's.
    """
    if (rank, world_size) != (region.rank, region.capacity):
        raise UserInputError(
            f"rank {rank} of a world of {world_size} does not fit the collective region of rank {region.rank} of "
            f"{region.capacity}",
            hint="SGLang's ranks are those of the region, and its world is the region's capacity.",
        )
    install_backend(region)
    dist.init_process_group(BACKEND_NAME, store=HashStore(), world_size=world_size, rank=rank, timeout=timeout)


def _install_object_collectives() -> None:
    """Make torch's object collectives work with absent ranks.

    They gather the size of each rank's pickled object into zeros, then the bytes. An absent rank's size stays 0, and 0
    bytes are no pickle: it becomes None here. A real object never pickles to nothing, so other backends see no change.
    `broadcast_object_list` from an absent root in a group in which only this rank is present keeps this rank's objects;
    torch would read a size that nobody sent.
    """
    to_object, broadcast_list = _c10d._tensor_to_object, _c10d.broadcast_object_list

    def tensor_to_object(tensor: Any, tensor_size: Any, group: Any) -> Any:
        return None if int(tensor_size) == 0 else to_object(tensor, tensor_size, group)

    def broadcast_object_list(
        object_list: list[Any], src: int | None = None, group: Any = None, *arguments: Any, **options: Any
    ) -> None:
        target = group or _c10d._get_default_group()
        if isinstance(target, ElasticProcessGroup):
            target.engine.refresh()
            if target.engine.local:
                return
        broadcast_list(object_list, src, group, *arguments, **options)

    _c10d._tensor_to_object = tensor_to_object
    for module in (_c10d, dist):
        setattr(module, "broadcast_object_list", broadcast_object_list)  # noqa: B010


def _install_new_group() -> None:
    """Make `torch.distributed.new_group` under an elastic default group give elastic groups, for torch before 2.13.

    torch 2.13 asks the default group for its subgroups, whatever backend the caller names. Earlier ones build the named
    backend, so that a group of "nccl" would wait for ranks that are not there: here the name is replaced. What asks
    for a group's backend by name then, `monitored_barrier`, is told to take ours too.
    """
    new_group, monitored_barrier = _c10d.new_group, _c10d.monitored_barrier

    def elastic_new_group(
        ranks: Sequence[int] | None = None,
        timeout: timedelta | None = None,
        backend: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        default = _c10d._get_default_group()
        if isinstance(default, ElasticProcessGroup):
            backend = BACKEND_NAME
            engine = default.engine
            if ranks is not None and engine.rank not in ranks:
                # torch makes no group on ranks outside, but all ranks number the channels alike.
                outside = make_group(engine.region, tuple(engine.ranks[rank] for rank in ranks), timeout)
                assert outside is None
        return new_group(ranks, timeout, backend, *arguments, **options)

    def elastic_monitored_barrier(
        group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        chosen = _c10d._get_default_group() if group is None else group
        if isinstance(chosen, ElasticProcessGroup):
            chosen.monitored_barrier(timeout, wait_all_ranks)
        else:
            monitored_barrier(group, timeout, wait_all_ranks)

    for module in (_c10d, dist):
        setattr(module, "new_group", elastic_new_group)  # noqa: B010
        setattr(module, "monitored_barrier", elastic_monitored_barrier)  # noqa: B010
