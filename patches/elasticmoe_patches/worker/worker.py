"""The process in a rank: what it holds besides SGLang's scheduler, and how it comes in and goes.

Started by the IMM in a forked standby. One rank a process; `current_worker` is how hooks find it.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elasticmoe_patches.worker.aborts import RecentAborts
from elasticmoe_patches.worker.device import await_first_members, boots_alone, open_windows, prepare_to_join
from elasticmoe_patches.worker.migration import MigrationInbox
from elasticmoe_patches.worker.ready_pipe import ReadyPipe
from elasticmoe_sglang.comm.commit_barrier import CommitBarrier, Decision
from elasticmoe_sglang.comm.control_page import WorkerState
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.process_group import init_elastic, install_backend
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.comm.server_region import open_region
from elasticmoe_sglang.errors import CommitError, ElasticMoEError, WorkerError
from elasticmoe_sglang.faults import point
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.runtime import Runtime, current_runtime
from elasticmoe_sglang.wire import to_worker as sm
from elasticmoe_sglang.wire.join_spec import JoinSpec, decode_join_spec
from elasticmoe_sglang.wire.to_hmm import ModelSpec
from elasticmoe_sglang.wire.to_imm import Enter
from elasticmoe_sglang.worker.agent import WorkerAgent
from elasticmoe_sglang.worker.idle import IdleWait
from elasticmoe_sglang.worker.kv import WorkerKv
from elasticmoe_sglang.worker.pause import PauseMeter
from elasticmoe_sglang.worker.weights import WorkerWeights

if TYPE_CHECKING:
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

logger = logging.getLogger(__name__)

_FENCES = 16


class RankRetired(BaseException):
    """Unwinds SGLang's event loop in a retiring rank; not an Exception, so that SGLang does not take it for a crash."""


class Worker:
    """Attributes:
    me, join_spec: which rank this is and how it came in.
    cuda: the windows of a rank on a GPU, from `init_world` on; None on the CPU.
    pending: the commit to carry out at the top of the next iteration.
    arrivals: requests that retiring ranks have sent here.
    aborted: aborts since requests of a retiring rank or of a dead rank have been on their way.
    fences: the last operations whose input fence has been read.
    recoveries: what the coordinator sends after another rank's death.
    counts: operations for which this rank shall say which requests it has.
    pulled: this iteration's input until it has been dealt with; replay: input to be dealt with again.
    sent_again: requests of a dead rank that are to go on here.
    new_batch: the prefill batch that is being put together or run.
    placement: expert column -> rank, with which this process came in.
    kv: the KV cache in HMM memory; None where SGLang's pool has its own.
    warm_up: what a rank on a GPU runs before it serves; None outside that time.
    """

    def __init__(self, runtime: Runtime, join_spec: JoinSpec) -> None:
        config = runtime.config
        self.runtime = runtime
        self.join_spec = join_spec
        self.rank = join_spec.rank
        self.device = config.device_of(join_spec.rank)
        self.started = time.monotonic()
        self.client = HmmClient(runtime.hmm_endpoint, name=f"rank-{self.rank}")
        region = open_region(self.client, config, runtime.run_id)
        self.region = CollectiveRegion(region.fd, self.rank, timeout_s=config.collective_deadline_s)
        region.close()
        self.region.register(WorkerState.STARTING)
        self.alone = join_spec.joining_rank or boots_alone(self)
        if self.alone:
            self.region.solo()
        else:
            self.region.set_membership(self._membership(join_spec.members, join_spec.epoch))
        self.cuda: CudaRegion | None = None
        self.barrier = CommitBarrier(self.region)
        self.memory = WorkerWeights(
            self.client,
            rank=self.rank,
            device=self.device,
            bytes_per_second=config.pull_bandwidth,
            deadline_s=config.prepare_deadline_s,
        )
        self.idle = IdleWait(self.region)
        self.pause = PauseMeter()
        self.inbox = MigrationInbox()
        self.resuming: dict[str, Any] = {}
        self.aborted = RecentAborts()
        self.building: Any = None
        self.pending: sm.CommitCommand | None = None
        self.fences: deque[str] = deque(maxlen=_FENCES)
        self.recoveries: queue.SimpleQueue[sm.Recover] = queue.SimpleQueue()
        self.recovering = False
        self.counts: list[sm.CountRequests] = []
        self.pulled: list[Any] = []
        self.replay: list[Any] = []
        self.sent_again: list[Any] = []
        self.new_batch: Any = None
        self.warm_up: Any = None
        self.left = False
        self.spec: ModelSpec | None = None
        self.placement: Sequence[int] = ()
        self.kv: WorkerKv | None = None
        self.checkpoint_bytes = 0
        self.load_seconds = 0.0
        self.agent = WorkerAgent(
            runtime.paths.coordinator_endpoint,
            self.rank,
            {
                sm.PullColumns: self._pull,
                sm.DropColumns: self._drop,
                sm.OfferMemory: self._offer,
                sm.ResizeKv: self._resize_kv,
                sm.ReleaseMigrated: self._release_migrated,
                sm.Recover: self._recover,
                sm.CountRequests: self._count,
            },
        )
        self.agent.start()

    def _membership(self, ranks: tuple[int, ...], epoch: int) -> Membership:
        return Membership(ranks=ranks, epoch=epoch, capacity=self.runtime.config.max_ep_size)

    def init_world(self, *, world_size: int, rank: int) -> None:
        """torch.distributed over the collective region."""
        self.cuda = open_windows(self)
        install_backend(self.region)
        init_elastic(self.region, rank=rank, world_size=world_size)

    def fault_point(self, name: str) -> None:
        """A place at which tests make faults happen; see faults.py."""
        point(name, self.rank, self.runtime.paths.run_dir)

    # -- the agent's thread -------------------------------------------------------------------------------------

    def _pull(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.PullColumns)
        self.fault_point("pull.started")
        result = self.memory.pull(message.columns, message.txn)
        self.fault_point("pull.done")
        return sm.Pulled(
            rank=self.rank,
            operation_id=message.operation_id,
            columns=result.columns,
            bytes=result.bytes,
            seconds=result.seconds,
        )

    def _drop(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.DropColumns)
        return sm.Dropped(rank=self.rank, operation_id=message.operation_id, columns=self.memory.unmap(message.columns))

    def _offer(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.OfferMemory)
        return sm.Offered(rank=self.rank, operation_id=message.operation_id, blocks=self.client.offer())

    def _release_migrated(self, message: sm.Message) -> None:
        assert isinstance(message, sm.ReleaseMigrated)
        if message.kv_chunks and self.kv is not None:
            try:
                self.inbox.windows[message.retiring_rank] = self.kv.window(message.retiring_rank, message.kv_chunks)
            except ElasticMoEError as error:
                logger.warning(
                    "rank %d: the KV of retiring rank %d is recomputed: %s", self.rank, message.retiring_rank, error
                )
        self.inbox.released.add(message.retiring_rank)
        self.idle.wake_all()

    def _resize_kv(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.ResizeKv)
        if self.kv is None:
            raise WorkerError("this rank's KV cache is not in HMM memory", rank=self.rank)
        done = self.kv.resize(message.chunks, message.timeout_s, self.idle.wake_all)
        return sm.KvResized(
            rank=self.rank,
            operation_id=message.operation_id,
            chunks=self.kv.chunks,
            tokens=done.tokens,
            evicted=done.evicted,
            moved=done.moved,
            retracted=done.retracted,
        )

    def _recover(self, message: sm.Message) -> None:
        assert isinstance(message, sm.Recover)
        self.recoveries.put(message)
        self.idle.wake_all()

    def _count(self, message: sm.Message) -> None:
        assert isinstance(message, sm.CountRequests)
        self.counts.append(message)
        self.idle.wake_all()

    # -- coming in ----------------------------------------------------------------------------------------------

    def say_hello(self, stage: str) -> None:
        """Tell the coordinator what this rank is and what it took to boot."""
        assert self.spec is not None
        self.agent.post(
            sm.Hello(
                rank=self.rank,
                pid=os.getpid(),
                stage=stage,
                columns=self.spec.num_columns,
                column_bytes=self.spec.column_bytes,
                dense_bytes=self.spec.dense_bytes,
                checkpoint_bytes=self.checkpoint_bytes,
                pulled_bytes=self.memory.pulled_bytes,
                boot_s=time.monotonic() - self.started,
                load_s=self.load_seconds,
                kv=self._kv_state(),
            )
        )

    def _kv_state(self) -> sm.KvState | None:
        if self.kv is None:
            return None
        shape = self.kv.shape
        return sm.KvState(
            token_bytes=shape.token_bytes,
            page_tokens=shape.page_tokens,
            chunk_bytes=shape.chunk_bytes,
            cap_tokens=shape.cap_tokens,
            chunks=self.kv.chunks,
        )

    def join(self) -> None:
        """A joining rank, booted and alone: wait at the commit barrier for the commit that brings it in.

        Raises:
            CommitError: the change was given up.
        """
        self.region.control.set_worker_state(self.rank, WorkerState.JOINING)
        self.say_hello("barrier")
        self.fault_point("boot.barrier")
        members = self.join_spec.members
        prepare_to_join(self)
        if self.join_spec.attempt:  # in the place of a dead rank; the survivors come to the commit barrier too
            decision = self.barrier.arrive(
                epoch=self.join_spec.epoch,
                attempt=self.join_spec.attempt,
                participants=members,
                membership=self._membership(members, self.join_spec.epoch),
                timeout_s=self.runtime.config.commit_deadline_s,
            )
        else:
            decision = self.barrier.join(self.join_spec.epoch, timeout_s=self.runtime.config.prepare_deadline_s * 4)
        if decision is not Decision.COMMIT:
            raise CommitError("the change that would have brought this rank in was given up", rank=self.rank)
        self._enter(self.join_spec.members, self.join_spec.epoch)
        self.fault_point("barrier.after")
        logger.info("rank %d joined in epoch %d", self.rank, self.join_spec.epoch)

    def serve(self) -> None:
        """A rank of the server's first membership."""
        if self.alone:
            await_first_members(self)
            self._enter(self.join_spec.members, self.join_spec.epoch)
        self.region.control.set_worker_state(self.rank, WorkerState.ACTIVE)
        self.say_hello("serving")

    def _enter(self, members: tuple[int, ...], epoch: int) -> None:
        self.region.set_membership(self._membership(members, epoch))
        self.client.epoch = epoch
        self.region.control.set_worker_state(self.rank, WorkerState.ACTIVE)

    # -- changing -----------------------------------------------------------------------------------------------

    def pass_barrier(self, command: sm.CommitCommand) -> bool:
        """Meet the others; when all have come, switch membership and placement. True when committed.

        Raises:
            CommitError: the leader has gone.
        """
        started = time.monotonic()
        self.fault_point("barrier.before")
        decision = self.barrier.arrive(
            epoch=command.epoch,
            attempt=command.attempt,
            participants=command.participants,
            membership=self._membership(command.members, command.epoch),
            timeout_s=max(0.0, command.expires - time.monotonic()),
        )
        committed = decision is Decision.COMMIT
        if committed and self.rank in command.members:
            self._enter(command.members, command.epoch)
            self.memory.switch([c for c, owner in enumerate(command.placement) if owner == self.rank])
            if command.retiring:
                self.aborted.clear()
                self.inbox.expect(command.retiring)
        elif committed:
            self.region.solo()
            self.region.control.set_worker_state(self.rank, WorkerState.RETIRING)
        self.agent.post(
            sm.Committed(
                rank=self.rank,
                operation_id=command.operation_id,
                epoch=command.epoch,
                committed=committed,
                barrier_ms=(time.monotonic() - started) * 1e3,
                reason="" if committed else self.barrier.reason,
            )
        )
        if committed:
            self.pause.committed(command.operation_id)
            self.fault_point("barrier.after")
        return committed

    def refuse(self, command: sm.CommitCommand, reason: str) -> None:
        """Tell the coordinator that a commit was not carried out."""
        self.agent.post(
            sm.Committed(
                rank=self.rank,
                operation_id=command.operation_id,
                epoch=command.epoch,
                committed=False,
                barrier_ms=0.0,
                reason=reason,
            )
        )

    def pass_recovery_barrier(self, command: sm.Recover) -> bool:
        """Meet the other survivors; True when this rank is a member of the next epoch."""
        try:
            decision = self.barrier.arrive(
                epoch=command.epoch,
                attempt=command.attempt,
                participants=command.members,
                membership=self._membership(command.members, command.epoch),
                timeout_s=max(0.0, command.expires - time.monotonic()),
            )
        except CommitError as error:
            logger.warning("rank %d: %s", self.rank, error)
            decision = Decision.ABORT
        if decision is Decision.COMMIT:
            self._enter(command.members, command.epoch)
            self.memory.switch([c for c, owner in enumerate(command.placement) if owner == self.rank])
            self.aborted.clear()  # the tokenizer knows of every earlier one when it sends a request again
        else:
            self.agent.post(sm.Recovered(rank=self.rank, operation_id=command.operation_id, committed=False, rids=[]))
        return decision is Decision.COMMIT

    def close(self) -> None:
        self.agent.stop(timeout_s=3.0)
        if self.cuda is not None:
            self.cuda.close()
        self.region.close()
        self.client.close()


_rank: Worker | None = None


def current_worker() -> Worker:
    """The rank of this process."""
    assert _rank is not None, "not a rank process"
    return _rank


def worker_main(channel: StandbyChannel, enter: Enter) -> int:
    """Run SGLang's scheduler in this rank until it leaves. Returns the process's exit status."""
    global _rank
    from elasticmoe_patches.plugin import install_for_process

    install_for_process("rank")
    from sglang.srt.managers.scheduler import run_scheduler_process

    from elasticmoe_patches.srt.managers.io_struct import register_types

    register_types()
    runtime = current_runtime()
    assert runtime is not None
    server_args, port_args, gpu_id = pickle.loads(enter.blob)
    join_spec = decode_join_spec(enter.join_spec)
    _rank = Worker(runtime, join_spec)
    ranks = {
        "display_tp_rank": join_spec.rank,
        "display_dp_rank": join_spec.rank,
        "display_moe_ep_rank": join_spec.rank,
    }
    try:
        run_scheduler_process(
            server_args,
            port_args,
            gpu_id,
            join_spec.rank,
            0,
            join_spec.rank,
            ReadyPipe(channel, join_spec.rank),
            **ranks,
        )
    except RankRetired:
        logger.info("rank %d left", join_spec.rank)
    finally:
        _rank.close()
    if not _rank.left:
        raise WorkerError("the scheduler ended", rank=join_spec.rank, hint="Its traceback is above")
    return 0
