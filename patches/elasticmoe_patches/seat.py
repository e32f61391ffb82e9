"""The process in a seat: what it holds besides SGLang's scheduler, and how it comes in and goes.

Started by the IMM in a forked standby. One seat a process; `current_seat` is how hooks find it.
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

from elasticmoe_patches.ready_pipe import ReadyPipe
from elasticmoe_patches.seat_device import await_first_members, boots_alone, open_windows, prepare_to_join
from elasticmoe_patches.srt.managers.aborts import RecentAborts
from elasticmoe_patches.srt.managers.handover import Arrivals
from elasticmoe_sglang.errors import CommitError, ElasticMoEError, SeatError
from elasticmoe_sglang.faults import point
from elasticmoe_sglang.hmm.protocol import ModelSpec
from elasticmoe_sglang.imm.messages import Enter
from elasticmoe_sglang.imm.zygote import StandbyChannel
from elasticmoe_sglang.runtime import Runtime, current_runtime
from elasticmoe_sglang.seats import messages as sm
from elasticmoe_sglang.seats.ablation import connect
from elasticmoe_sglang.seats.agent import SeatAgent
from elasticmoe_sglang.seats.control import SeatState
from elasticmoe_sglang.seats.fabric import Fabric
from elasticmoe_sglang.seats.gate import CommitGate, Decision
from elasticmoe_sglang.seats.idle import IdleWait
from elasticmoe_sglang.seats.kv import SeatKv
from elasticmoe_sglang.seats.membership import Membership
from elasticmoe_sglang.seats.memory import SeatMemory
from elasticmoe_sglang.seats.pause import PauseMeter
from elasticmoe_sglang.seats.process_group import init_elastic, install_backend
from elasticmoe_sglang.seats.region import open_region
from elasticmoe_sglang.seats.ticket import SeatTicket, decode_ticket

if TYPE_CHECKING:
    from elasticmoe_sglang.seats.cuda_fabric import CudaFabric

logger = logging.getLogger(__name__)

_FENCES = 16


class SeatLeft(BaseException):
    """Unwinds SGLang's event loop in a leaver; not an Exception, so that SGLang does not take it for a crash."""


class Seat:
    """Attributes:
    me, ticket: which seat this is and how it came in.
    cuda: the windows of a seat on a GPU, from `init_world` on; None on the CPU.
    pending: the commit to carry out at the top of the next iteration.
    arrivals: requests that leavers have sent here.
    aborted: aborts since requests of a leaver or of a dead seat have been on their way.
    fences: the last operations whose input fence has been read.
    recoveries: what the coordinator sends after another seat's death.
    counts: operations for which this seat shall say which requests it has.
    pulled: this iteration's input until it has been dealt with; replay: input to be dealt with again.
    sent_again: requests of a dead seat that are to go on here.
    new_batch: the prefill batch that is being put together or run.
    placement: expert column -> seat, with which this process came in.
    kv: the KV cache in HMM memory; None where SGLang's pool has its own.
    warm_up: what a seat on a GPU runs before it serves; None outside that time.
    """

    def __init__(self, runtime: Runtime, ticket: SeatTicket) -> None:
        config = runtime.config
        self.runtime = runtime
        self.ticket = ticket
        self.me = ticket.seat
        self.device = config.device_of(ticket.seat)
        self.started = time.monotonic()
        self.client = connect(runtime.hmm_endpoint, name=f"seat-{self.me}", ablations=config.ablations)
        region = open_region(self.client, config, runtime.run_id)
        self.fabric = Fabric(region.fd, self.me, timeout_s=config.collective_deadline_s)
        region.close()
        self.fabric.register(SeatState.BOOTING)
        self.alone = ticket.joiner or boots_alone(self)
        if self.alone:
            self.fabric.solo()
        else:
            self.fabric.set_membership(self._membership(ticket.members, ticket.epoch))
        self.cuda: CudaFabric | None = None
        self.gate = CommitGate(self.fabric)
        self.memory = SeatMemory(
            self.client,
            seat=self.me,
            device=self.device,
            bytes_per_second=config.pull_bandwidth,
            deadline_s=config.prepare_deadline_s,
            peers="peer-copy" not in config.ablations,
        )
        self.idle = IdleWait(self.fabric)
        self.pause = PauseMeter()
        self.arrivals = Arrivals()
        self.adopting: dict[str, Any] = {}
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
        self.kv: SeatKv | None = None
        self.checkpoint_bytes = 0
        self.load_seconds = 0.0
        self.agent = SeatAgent(
            runtime.paths.coordinator_endpoint,
            self.me,
            {
                sm.PullColumns: self._pull,
                sm.DropColumns: self._drop,
                sm.OfferMemory: self._offer,
                sm.ResizeKv: self._resize_kv,
                sm.ReleaseAdopted: self._release_adopted,
                sm.Recover: self._recover,
                sm.CountRequests: self._count,
            },
        )
        self.agent.start()

    def _membership(self, seats: tuple[int, ...], epoch: int) -> Membership:
        return Membership(seats=seats, epoch=epoch, capacity=self.runtime.config.max_ep_size)

    def init_world(self, *, world_size: int, rank: int) -> None:
        """torch.distributed over the fabric."""
        self.cuda = open_windows(self)
        install_backend(self.fabric)
        init_elastic(self.fabric, rank=rank, world_size=world_size)

    def fault_point(self, name: str) -> None:
        """A place at which tests make faults happen; see faults.py."""
        point(name, self.me, self.runtime.paths.run_dir)

    # -- the agent's thread -------------------------------------------------------------------------------------

    def _pull(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.PullColumns)
        self.fault_point("pull.started")
        result = self.memory.pull(message.columns, message.txn)
        self.fault_point("pull.done")
        return sm.Pulled(
            seat=self.me,
            operation_id=message.operation_id,
            columns=result.columns,
            bytes=result.bytes,
            seconds=result.seconds,
        )

    def _drop(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.DropColumns)
        return sm.Dropped(seat=self.me, operation_id=message.operation_id, columns=self.memory.unmap(message.columns))

    def _offer(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.OfferMemory)
        return sm.Offered(seat=self.me, operation_id=message.operation_id, blocks=self.client.offer())

    def _release_adopted(self, message: sm.Message) -> None:
        assert isinstance(message, sm.ReleaseAdopted)
        if message.kv_chunks and self.kv is not None:
            try:
                self.arrivals.windows[message.leaver] = self.kv.window(message.leaver, message.kv_chunks)
            except ElasticMoEError as error:
                logger.warning("seat %d: the KV of leaver %d is recomputed: %s", self.me, message.leaver, error)
        self.arrivals.released.add(message.leaver)
        self.idle.wake_all()

    def _resize_kv(self, message: sm.Message) -> sm.Message:
        assert isinstance(message, sm.ResizeKv)
        if self.kv is None:
            raise SeatError("this seat's KV cache is not in HMM memory", seat=self.me)
        done = self.kv.resize(message.chunks, message.timeout_s, self.idle.wake_all)
        return sm.KvResized(
            seat=self.me,
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
        """Tell the coordinator what this seat is and what it took to boot."""
        assert self.spec is not None
        self.agent.post(
            sm.Hello(
                seat=self.me,
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
        """A joiner, booted and alone: wait at the gate for the commit that brings it in.

        Raises:
            CommitError: the change was given up.
        """
        self.fabric.control.set_seat_state(self.me, SeatState.READY)
        self.say_hello("gate")
        self.fault_point("boot.gate")
        members = self.ticket.members
        prepare_to_join(self)
        if self.ticket.attempt:  # in the place of a dead seat; the survivors come to the gate too
            decision = self.gate.arrive(
                epoch=self.ticket.epoch,
                attempt=self.ticket.attempt,
                participants=members,
                membership=self._membership(members, self.ticket.epoch),
                timeout_s=self.runtime.config.commit_deadline_s,
            )
        else:
            decision = self.gate.join(self.ticket.epoch, timeout_s=self.runtime.config.prepare_deadline_s * 4)
        if decision is not Decision.COMMIT:
            raise CommitError("the change that would have brought this seat in was given up", seat=self.me)
        self._enter(self.ticket.members, self.ticket.epoch)
        self.fault_point("gate.after")
        logger.info("seat %d joined in epoch %d", self.me, self.ticket.epoch)

    def serve(self) -> None:
        """A seat of the server's first membership."""
        if self.alone:
            await_first_members(self)
            self._enter(self.ticket.members, self.ticket.epoch)
        self.fabric.control.set_seat_state(self.me, SeatState.SERVING)
        self.say_hello("serving")

    def _enter(self, members: tuple[int, ...], epoch: int) -> None:
        self.fabric.set_membership(self._membership(members, epoch))
        self.client.epoch = epoch
        self.fabric.control.set_seat_state(self.me, SeatState.SERVING)

    # -- changing -----------------------------------------------------------------------------------------------

    def pass_gate(self, command: sm.CommitCommand) -> bool:
        """Meet the others; when all have come, switch membership and placement. True when committed.

        Raises:
            CommitError: the leader has gone.
        """
        started = time.monotonic()
        self.fault_point("gate.before")
        decision = self.gate.arrive(
            epoch=command.epoch,
            attempt=command.attempt,
            participants=command.participants,
            membership=self._membership(command.members, command.epoch),
            timeout_s=max(0.0, command.expires - time.monotonic()),
        )
        committed = decision is Decision.COMMIT
        if committed and self.me in command.members:
            self._enter(command.members, command.epoch)
            self.memory.switch([c for c, owner in enumerate(command.placement) if owner == self.me])
            if command.leaving:
                self.aborted.clear()
                self.arrivals.expect(command.leaving)
        elif committed:
            self.fabric.solo()
            self.fabric.control.set_seat_state(self.me, SeatState.LEAVING)
        self.agent.post(
            sm.Committed(
                seat=self.me,
                operation_id=command.operation_id,
                epoch=command.epoch,
                committed=committed,
                gate_ms=(time.monotonic() - started) * 1e3,
                reason="" if committed else self.gate.reason,
            )
        )
        if committed:
            self.pause.committed(command.operation_id)
            self.fault_point("gate.after")
        return committed

    def refuse(self, command: sm.CommitCommand, reason: str) -> None:
        """Tell the coordinator that a commit was not carried out."""
        self.agent.post(
            sm.Committed(
                seat=self.me,
                operation_id=command.operation_id,
                epoch=command.epoch,
                committed=False,
                gate_ms=0.0,
                reason=reason,
            )
        )

    def pass_recovery_gate(self, command: sm.Recover) -> bool:
        """Meet the other survivors; True when this seat is a member of the next epoch."""
        try:
            decision = self.gate.arrive(
                epoch=command.epoch,
                attempt=command.attempt,
                participants=command.members,
                membership=self._membership(command.members, command.epoch),
                timeout_s=max(0.0, command.expires - time.monotonic()),
            )
        except CommitError as error:
            logger.warning("seat %d: %s", self.me, error)
            decision = Decision.ABORT
        if decision is Decision.COMMIT:
            self._enter(command.members, command.epoch)
            self.memory.switch([c for c, owner in enumerate(command.placement) if owner == self.me])
            self.aborted.clear()  # the tokenizer knows of every earlier one when it sends a request again
        else:
            self.agent.post(sm.Recovered(seat=self.me, operation_id=command.operation_id, committed=False, rids=[]))
        return decision is Decision.COMMIT

    def close(self) -> None:
        self.agent.stop(timeout_s=3.0)
        if self.cuda is not None:
            self.cuda.close()
        self.fabric.close()
        self.client.close()


_seat: Seat | None = None


def current_seat() -> Seat:
    """The seat of this process."""
    assert _seat is not None, "not a seat process"
    return _seat


def seat_main(channel: StandbyChannel, enter: Enter) -> int:
    """Run SGLang's scheduler in this seat until it leaves. Returns the process's exit status."""
    global _seat
    from elasticmoe_patches.plugin import install_for_process

    install_for_process("seat")
    from sglang.srt.managers.scheduler import run_scheduler_process

    from elasticmoe_patches.srt.managers.io_struct import register_types

    register_types()
    runtime = current_runtime()
    assert runtime is not None
    server_args, port_args, gpu_id = pickle.loads(enter.blob)
    ticket = decode_ticket(enter.ticket)
    _seat = Seat(runtime, ticket)
    ranks = {"display_tp_rank": ticket.seat, "display_dp_rank": ticket.seat, "display_moe_ep_rank": ticket.seat}
    try:
        run_scheduler_process(
            server_args, port_args, gpu_id, ticket.seat, 0, ticket.seat, ReadyPipe(channel, ticket.seat), **ranks
        )
    except SeatLeft:
        logger.info("seat %d left", ticket.seat)
    finally:
        _seat.close()
    if not _seat.left:
        raise SeatError("the scheduler ended", seat=ticket.seat, hint="Its traceback is above")
    return 0
