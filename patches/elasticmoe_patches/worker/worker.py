"""The worker: what the process that serves a rank holds besides SGLang's scheduler, and its way through a commit.

`WorkerState` (comm/control_page.py) draws its lifecycle. One rank a process; `current_worker` is how hooks find it.
This is a low module: what works on a scheduler as well is above it (kv, commit, recovery, warm_up).
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import zmq

from elasticmoe_patches.worker.device import await_first_members, open_windows
from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_patches.worker.requests import IterationInput
from elasticmoe_sglang.comm.commit_barrier import CommitBarrier, Decision
from elasticmoe_sglang.comm.control_page import WorkerState
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.npu_group import install_npu_groups
from elasticmoe_sglang.comm.process_group import init_elastic, install_backend
from elasticmoe_sglang.comm.region import CollectiveRegion, open_region
from elasticmoe_sglang.errors import CommitError, ElasticMoEError, WorkerError
from elasticmoe_sglang.faults import point
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.planner import Placement, View
from elasticmoe_sglang.runtime import Runtime, only_this_user
from elasticmoe_sglang.wire import to_coordinator, to_worker
from elasticmoe_sglang.wire.to_hmm import ModelSpec
from elasticmoe_sglang.wire.to_worker import JoinSpec
from elasticmoe_sglang.worker.agent import WorkerAgent
from elasticmoe_sglang.worker.idle import IdleWait
from elasticmoe_sglang.worker.kv import WorkerKv
from elasticmoe_sglang.worker.pause import PauseMeter
from elasticmoe_sglang.worker.weights import WorkerWeights

if TYPE_CHECKING:
    import torch

    from elasticmoe_kernels.triton.loads import KernelLoads
    from elasticmoe_patches.worker.replica import Replica
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

logger = logging.getLogger(__name__)

_FENCES = 16
_MAPPED_WITHIN_S = 5.0
_MessageT = TypeVar("_MessageT", bound=to_worker.Request)


class RankRetired(BaseException):
    """Unwinds SGLang's event loop once a retiring rank has sent everything; not an Exception, which SGLang would take
    for a crash."""


@dataclass
class LoadedModel:
    """What the loader found and did.

    Attributes:
        placement: in the membership that this worker joined.
        checkpoint_bytes: read by this worker. seconds: for building the model and filling or attaching its weights.
    """

    spec: ModelSpec
    placement: Placement
    checkpoint_bytes: int = 0
    seconds: float = 0.0


@dataclass
class RecoveryInbox:
    """What arrives after a rank's death, or when another one has joined, until the scheduler's thread gets to it.

    Attributes:
        commands: commits of the view to continue in, from the coordinator.
        counts: operations for which this rank reports which requests it has.
        give_ups: asks for requests that wait here.
        sent_again: requests of the dead rank, or of a full one (ElasticResumeReq), that go on here.
    """

    commands: queue.SimpleQueue[to_worker.CommitCommand] = field(default_factory=queue.SimpleQueue)
    counts: list[to_worker.CountRequests] = field(default_factory=list)
    give_ups: list[to_worker.GiveUpWaiting] = field(default_factory=list)
    sent_again: list[Any] = field(default_factory=list)


def _placement(change: JoinSpec | to_worker.CommitCommand) -> Placement:
    return Placement(owners=change.placement, copies=change.copies)


class Worker:
    """Attributes:
    rank, device: what this process serves, and where.
    join_spec: the change that started this worker.
    shard, leads: place in the attention replica; whether it leads it: receives its requests and sends its outputs.
    mates: ranks of the replica, this one among them; only this one unless attention is tensor-parallel.
    region, barrier: this rank's view of the collective region; its end of the commit barrier.
    cuda: the windows of a rank on a GPU, from `init_world` on; None elsewhere.
    loads: hears of kernels that are loaded; as `cuda`.
    memory: the weights, in HMM memory.
    model: set by the loader.
    routed: int64 [columns] on the device: tokens routed to each column while it was here, over all layers; None: this
        server does not count.
    kv: the KV cache in HMM memory, set by `open_kv`; None where SGLang's pool has memory of its own.
    replica: meetings with its mates, from when it has booted; None: it has no mates.
    boot_chunks: of KV that a hot standby needs while it boots.
    parking: this rank retires and becomes a hot standby.
    idle, pause: the sleep between batches; the meter of a commit's pause.
    iteration: what the current iteration of the event loop works on.
    pending: the commit to carry out at the top of the next iteration.
    fences: the last operations whose input fence has been read.
    inbox, recovery: what other ranks, the coordinator and the tokenizer have sent for the scheduler's thread.
    peer: the socket on which retiring ranks send requests, from `enter_service` on.
    warm_up: called with the scheduler at the top of an iteration instead of reading input; None once it serves.
    stopped: SGLang left its event loop, because the server is being stopped.
    agent: the connection to the coordinator.
    """

    model: LoadedModel
    peer: zmq.Socket[bytes]

    def __init__(self, runtime: Runtime, join_spec: JoinSpec) -> None:
        config = runtime.config
        self.runtime = runtime
        self.join_spec = join_spec
        self.rank = join_spec.rank
        self.device = config.device_of(join_spec.rank)
        self.mates = config.mates_of(self.rank)
        self.shard = config.shard_of(self.rank)
        self.leads = self.shard == 0
        self._started = time.monotonic()
        self.client = HmmClient(runtime.hmm_endpoint, name=f"rank-{self.rank}")
        region = open_region(self.client, config, runtime.run_id)
        self.region = CollectiveRegion(region.fd, self.rank, timeout_s=config.collective_deadline_s)
        region.close()
        self.region.register(WorkerState.STARTING)
        # On a GPU or NPU also the first ranks boot by themselves: none waits for another's compiling and capturing.
        self._kind = self.client.backend.name
        self._boots_alone = join_spec.joining_rank or self._kind != "cpu"
        if self._boots_alone:
            self.region.solo()
        else:
            self.region.set_membership(self._membership(join_spec.members, join_spec.epoch))
        self.cuda: CudaRegion | None = None
        self.loads: KernelLoads | None = None
        self.barrier = CommitBarrier(self.region.control, self.rank)
        self.memory = WorkerWeights(
            self.client,
            rank=self.rank,
            device=self.device,
            shard=self.shard,
            bytes_per_second=config.pull_bandwidth,
            deadline_s=config.prepare_deadline_s,
        )
        self.routed: torch.Tensor | None = None
        self.kv: WorkerKv | None = None
        self.replica: Replica | None = None
        self.boot_chunks = 0
        self.parking = False
        self._told: queue.SimpleQueue[to_worker.Request] = queue.SimpleQueue()
        self.idle = IdleWait(self.region)
        self.pause = PauseMeter()
        self.iteration = IterationInput()
        self.pending: to_worker.CommitCommand | None = None
        self.fences: deque[str] = deque(maxlen=_FENCES)
        self.inbox = MigrationInbox()
        self.recovery = RecoveryInbox()
        self.warm_up: Callable[[Any], None] | None = None
        self.stopped = False
        self.agent = WorkerAgent(
            runtime.paths.coordinator_endpoint,
            self.rank,
            {
                to_worker.PullColumns: self._pull_columns,
                to_worker.DropColumns: self._drop_columns,
                to_worker.OfferMemory: self._offer_memory,
                to_worker.ResizeKv: self._resize_kv,
                to_worker.MapMigrated: self._map_migrated,
                to_worker.ReleaseMigrated: self._release_migrated,
                to_worker.CommitCommand: self._recover,
                to_worker.GiveUpWaiting: self._give_up_waiting,
                to_worker.CountRouted: self._count_routed,
                to_worker.CountRequests: self._count_requests,
                to_worker.Join: self._told.put,
                to_worker.Park: self._told.put,
            },
        )
        self.agent.start()

    def _membership(self, ranks: tuple[int, ...], epoch: int) -> Membership:
        return Membership(ranks=ranks, epoch=epoch, capacity=self.runtime.config.max_ep_size)

    def _set_state(self, state: WorkerState) -> None:
        self.region.control.set_worker_state(self.rank, state)

    def init_world(self, *, world_size: int, rank: int) -> None:
        """Initialise torch.distributed over the collective region. On a GPU or NPU SGLang has set the device by now."""
        if self._kind == "cuda":
            from elasticmoe_kernels.triton.loads import KernelLoads

            self.loads = KernelLoads()
            self.cuda = open_windows(self.client, self.region, self.runtime.config, device=self.device)
        elif self._kind == "npu":
            install_npu_groups(self.region)
        install_backend(self.region)
        init_elastic(self.region, rank=rank, world_size=world_size)

    def check_collectives(self) -> None:
        """Raise what a collective on the GPU has reported since the last membership; see `CudaRegion.check`."""
        if self.cuda is not None:
            self.cuda.check()

    def fault_point(self, name: str) -> None:
        """A place at which tests make faults happen; see faults.py."""
        point(name, self.rank, self.runtime.paths.run_dir)

    # -- the agent's thread -------------------------------------------------------------------------------------

    def _pull_columns(self, message: to_worker.Request) -> to_worker.Reply:
        assert isinstance(message, to_worker.PullColumns)
        self.fault_point("pull.started")
        result = self.memory.pull(message.sources, message.txn)
        self.fault_point("pull.done")
        return to_worker.Pulled(
            rank=self.rank,
            operation_id=message.operation_id,
            columns=result.columns,
            bytes=result.bytes,
            seconds=result.seconds,
        )

    def _drop_columns(self, message: to_worker.Request) -> to_worker.Reply:
        assert isinstance(message, to_worker.DropColumns)
        self.memory.unmap(message.columns)
        return to_worker.Dropped(rank=self.rank, operation_id=message.operation_id)

    def _offer_memory(self, message: to_worker.Request) -> to_worker.Reply:
        assert isinstance(message, to_worker.OfferMemory)
        return to_worker.Offered(rank=self.rank, operation_id=message.operation_id, blocks=self.client.offer())

    def _map_migrated(self, message: to_worker.Request) -> None:
        assert isinstance(message, to_worker.MapMigrated) and self.kv is not None
        retiring_rank, window = message.retiring_rank, None
        started = time.monotonic()
        try:
            # Of a replica's ranks the one at the same place has this rank's part of the KV, in the same rows.
            window = self.kv.window(retiring_rank + self.shard, message.kv_chunks)
            seconds = time.monotonic() - started
            logger.debug("rank %d: %d chunks mapped in %.1f ms", self.rank, len(message.kv_chunks), seconds * 1e3)
        except ElasticMoEError as error:
            logger.warning("rank %d: the KV of retiring rank %d is recomputed: %s", self.rank, retiring_rank, error)
        finally:
            self.inbox.map_window(message.operation_id, retiring_rank, window)

    def _release_migrated(self, message: to_worker.Request) -> None:
        assert isinstance(message, to_worker.ReleaseMigrated)
        if message.mapped:  # perhaps it is being mapped at this moment; without a window the KV is recomputed
            self.inbox.await_mapped(message.operation_id, message.retiring_rank, _MAPPED_WITHIN_S)
        self.inbox.release(message.operation_id, message.retiring_rank)
        self.idle.wake_all()

    def _resize_kv(self, message: to_worker.Request) -> to_worker.Reply:
        assert isinstance(message, to_worker.ResizeKv)
        if self.kv is None:
            raise WorkerError("the KV cache of this rank is not in HMM memory", rank=self.rank)
        self.kv.resize(message.chunks, message.timeout_s, self.idle.wake_all)
        return to_worker.KvResized(rank=self.rank, operation_id=message.operation_id, chunks=self.kv.chunks)

    def _recover(self, message: to_worker.Request) -> None:
        assert isinstance(message, to_worker.CommitCommand)
        self.recovery.commands.put(message)
        self.idle.wake_all()

    def _give_up_waiting(self, message: to_worker.Request) -> None:
        assert isinstance(message, to_worker.GiveUpWaiting)
        self.recovery.give_ups.append(message)
        self.idle.wake_all()

    def _count_routed(self, message: to_worker.Request) -> to_worker.Reply:
        assert isinstance(message, to_worker.CountRouted)
        if self.routed is None:
            raise WorkerError(
                "this server does not count routed tokens",
                rank=self.rank,
                hint="Start it with --elasticmoe-count-routing on",
            )
        return to_worker.Routed(rank=self.rank, operation_id=message.operation_id, tokens=self.routed.tolist())

    def _count_requests(self, message: to_worker.Request) -> None:
        assert isinstance(message, to_worker.CountRequests)
        self.recovery.counts.append(message)
        self.idle.wake_all()

    # -- starting and joining -----------------------------------------------------------------------------------

    def listen(self) -> None:
        """Listen to retiring ranks."""
        self.peer = zmq.Context(io_threads=1).socket(zmq.PULL)
        self.peer.setsockopt(zmq.RCVHWM, 0)
        endpoint = self.runtime.paths.peer_endpoint(self.rank)
        self.peer.bind(endpoint)
        only_this_user(endpoint)
        self.idle.watch(self.peer)

    def enter_service(self) -> None:
        """Booted: become a member, by the commit that a joining rank waits for.

        Raises:
            CommitError: the change was given up. WorkerError: another first rank did not boot.
        """
        if self.join_spec.joining_rank:
            self._join()
            return
        members, epoch = self.join_spec.members, self.join_spec.epoch
        if self._boots_alone:
            self._set_state(WorkerState.JOINING)
            await_first_members(self.region.control, self.rank, members)
            self.region.set_membership(self._membership(members, epoch))
            self.client.epoch = epoch
        self._set_state(WorkerState.ACTIVE)
        self.send_hello()

    def told(self, kind: type[_MessageT]) -> _MessageT:
        """For a rank that is no member: the message of the coordinator that it waits for, however long that takes; the
        process ends with the server.

        Raises:
            WorkerError: another message came.
        """
        message = self._told.get()
        if not isinstance(message, kind):
            raise WorkerError(f"{message} came to a rank that waits for something else", rank=self.rank)
        return message

    def become_hot(self) -> None:
        """Wait outside the membership."""
        self.parking = False
        self.replica = None  # it meets its mates anew when it joins
        self._set_state(WorkerState.HOT)
        self.pause.idle()

    def begin_to_join(self, join_spec: JoinSpec) -> JoinSpec:
        """A hot standby takes part in a change from here on."""
        assert join_spec.rank == self.rank
        self._started = time.monotonic()
        self.join_spec = join_spec
        return join_spec

    def _join(self) -> None:
        members, epoch = self.join_spec.members, self.join_spec.epoch
        self._set_state(WorkerState.JOINING)
        self.send_hello()
        self.fault_point("boot.barrier")
        if self.cuda is not None:  # so that the commit has less to do
            self.cuda.prefetch(tuple(member for member in members if self.region.control.alive(member)))
            self.cuda.drain()
        patience_s = self.runtime.config.prepare_deadline_s * 4
        if self.join_spec.attempt:  # it takes a lost rank's place, perhaps the leader's, and comes by itself
            membership = self._membership(members, epoch)
            decision = self.barrier.arrive(
                epoch=epoch,
                attempt=self.join_spec.attempt,
                participants=members,
                view=View(membership=membership, placement=_placement(self.join_spec)),
                timeout_s=patience_s,
            )
        else:
            decision = self.barrier.join(epoch, timeout_s=patience_s)
        if decision is not Decision.COMMIT:
            raise CommitError("the change for which this rank was started was given up", rank=self.rank)
        self._enter(self.region.control.read_view(), joining=True)
        if self.join_spec.attempt:
            self._report(self.join_spec.operation_id, committed=True)
        self.fault_point("barrier.after")
        logger.info("rank %d joined in epoch %d", self.rank, epoch)

    def send_hello(self) -> None:
        """Tell the coordinator what this rank is and what it took to boot."""
        spec, kv = self.model.spec, self.kv
        self.agent.post(
            to_coordinator.Hello(
                rank=self.rank,
                columns=spec.num_columns,
                checkpoint_bytes=self.model.checkpoint_bytes,
                pulled_bytes=self.memory.pulled_bytes,
                boot_s=time.monotonic() - self._started,
                load_s=self.model.seconds,
                kv=None
                if kv is None
                else to_coordinator.KvState(
                    token_bytes=kv.shape.token_bytes,
                    page_tokens=kv.shape.page_tokens,
                    chunk_bytes=kv.shape.chunk_bytes,
                    cap_tokens=kv.shape.cap_tokens,
                    chunks=kv.chunks,
                    boot_chunks=self.boot_chunks,
                ),
            )
        )

    def _enter(self, view: View, *, joining: bool = False) -> None:
        """Become, or stay, a member. A joining rank's columns are in effect already."""
        self.region.set_membership(view.membership)
        self.client.epoch = view.epoch
        self._set_state(WorkerState.ACTIVE)
        if not joining:
            self.memory.switch(view.placement.columns_of(self.rank), view.placement.shared_by(self.rank))

    # -- commits ------------------------------------------------------------------------------------------------

    def _meet(self, command: to_worker.CommitCommand) -> bool:
        """Meet the other participants; after COMMIT, switch membership and placement. True when committed.

        Raises:
            CommitError: the leader died.
        """
        membership = self._membership(command.members, command.epoch)
        decision = self.barrier.arrive(
            epoch=command.epoch,
            attempt=command.attempt,
            participants=command.participants,
            view=View(membership=membership, placement=_placement(command)),
            timeout_s=max(0.0, command.expires - time.monotonic()),
        )
        if decision is not Decision.COMMIT:
            return False
        if self.rank in command.members:
            view = self.region.control.read_view()
            assert view.epoch == command.epoch, f"epoch {view.epoch} is published, {command.epoch} was committed"
            self._enter(view)
        else:
            self.region.solo()
            self._set_state(WorkerState.RETIRING)
            self.parking = self.rank in command.parking
        return True

    def commit(self, command: to_worker.CommitCommand) -> bool:
        """Carry out a change between two batches. True when committed.

        Raises:
            CommitError: the leader died.
        """
        started = time.monotonic()
        self.fault_point("barrier.before")
        committed = self._meet(command)
        if committed and command.retiring and self.rank in command.members:
            self.inbox.expect(command.operation_id, self.runtime.config.leaders_of(command.retiring))
        barrier_ms = (time.monotonic() - started) * 1e3
        self._report(command.operation_id, committed=committed, barrier_ms=barrier_ms)
        if committed:
            self.pause.committed(command.operation_id)
            self.fault_point("barrier.after")
        return committed

    def commit_recovery(self, command: to_worker.CommitCommand) -> bool:
        """Go on in the next epoch after a loss; False when this attempt was aborted."""
        try:
            committed = self._meet(command)
        except CommitError as error:
            logger.warning("rank %d: %s", self.rank, error)
            committed = False
        if committed:
            self.inbox.aborted.clear()  # the tokenizer knows of every earlier one when it sends a request again
        self._report(command.operation_id, committed=committed)
        return committed

    def refuse_commit(self, command: to_worker.CommitCommand, reason: str) -> None:
        """Tell the coordinator that a commit is not carried out here."""
        self._report(command.operation_id, committed=False, reason=reason)

    def _report(self, operation_id: str, *, committed: bool, barrier_ms: float = 0.0, reason: str = "") -> None:
        self.agent.post(
            to_coordinator.Committed(
                rank=self.rank,
                operation_id=operation_id,
                committed=committed,
                barrier_ms=barrier_ms,
                reason="" if committed else reason or self.barrier.reason,
            )
        )

    def close(self) -> None:
        self.agent.stop(timeout_s=3.0)
        if self.cuda is not None:
            self.cuda.close()
        self.region.close()
        self.client.close()


_worker: Worker | None = None


def start_worker(runtime: Runtime, join_spec: JoinSpec) -> Worker:
    """Make the worker of this process."""
    global _worker
    _worker = Worker(runtime, join_spec)
    return _worker


def current_worker() -> Worker:
    """The worker of this process."""
    assert _worker is not None, "this process serves no rank"
    return _worker
