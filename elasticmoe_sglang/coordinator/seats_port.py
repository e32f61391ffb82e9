"""The coordinator's `SeatsPort` over the real processes: IMM, seat agents, and SGLang's message ways for the commit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.departure import Departure, OutputFences, hand_over, handed_over, picture
from elasticmoe_sglang.coordinator.kv_pools import KvPools
from elasticmoe_sglang.coordinator.ports import BootTicket, CommitReport, PullReport
from elasticmoe_sglang.coordinator.recovery import RecoveryPlan
from elasticmoe_sglang.coordinator.seat_lines import Heard, SeatLines
from elasticmoe_sglang.coordinator.views import SeatInfo
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.hmm.client import AsyncHmmClient
from elasticmoe_sglang.imm import messages as imm
from elasticmoe_sglang.planner import ColumnMove, Placement, ScalePlan
from elasticmoe_sglang.seats import messages as sm
from elasticmoe_sglang.seats.control import ControlPage
from elasticmoe_sglang.seats.membership import Membership
from elasticmoe_sglang.seats.ticket import SeatTicket, encode_ticket

logger = logging.getLogger(__name__)

# How long after the commit the seats' measured pauses are waited for; an idle server reports none.
_PAUSE_REPORT_S = 0.1
# How long a seat that others miss may live on before it counts as stalled.
_STALLED_S = 0.3


class ProcessSeats:
    """Args:
    send_command: puts an encoded CommitCommand on SGLang's way to all seats.
    send_route: tells SGLang's controller which seats get new requests.
    send_recover_route: the same after a seat's death, with a fence into every seat's queue; returns the requests
        that were open when it was sent.
    send_again: sends these requests to seats again, as far as they are still open; returns how many.
    on_seat_lost: an occupied seat's process ended although it was not to leave (seat, sentence).
    """

    def __init__(
        self,
        *,
        config: ElasticConfig,
        lines: SeatLines,
        hmm: AsyncHmmClient,
        control: ControlPage,
        placement: Placement,
        send_command: Callable[[bytes], Awaitable[None]],
        send_route: Callable[[Sequence[int]], Awaitable[None]],
        send_recover_route: Callable[[str, Sequence[int]], Awaitable[set[str]]],
        send_again: Callable[[set[str]], Awaitable[int]],
        on_seat_lost: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self._lines = lines
        self._hmm = hmm
        self._control = control
        self._kv = KvPools(config, lines, hmm, resize_s=config.commit_deadline_s)
        self._placement = placement
        self._send_command = send_command
        self._send_route = send_route
        self._send_recover_route = send_recover_route
        self._send_again = send_again
        self._on_seat_lost = on_seat_lost
        self._pids: dict[int, int] = {}
        self._standbys: list[int] = []
        self._hellos: dict[int, sm.Hello] = {}
        self._booting: set[int] = set()
        self._departures: dict[int, Departure] = {}
        self.fences = OutputFences()
        self._resending = asyncio.Lock()
        self._attempt = 0
        self.pauses: dict[int, float] = {}

    # -- what is known ------------------------------------------------------------------------------------------

    def heard(self, message: Heard) -> None:
        """Keep the picture of who is where; called for every message."""
        if isinstance(message, imm.Population):
            self._pids, self._standbys = dict(message.seats), list(message.standbys)
        elif isinstance(message, imm.Assigned):
            self._pids[message.seat] = message.pid
        elif isinstance(message, imm.SeatExited):
            self._pids.pop(message.seat, None)
            self._hellos.pop(message.seat, None)
            self._kv.forget(message.seat)
            self._check_loss(message)
        elif isinstance(message, sm.Hello):
            self._hellos[message.seat] = message
            self._kv.learn(message.seat, message.kv)
        elif isinstance(message, sm.Paused):
            self.pauses[message.seat] = message.pause_ms
        elif isinstance(message, sm.Broken) and message.culprit in self._pids.keys() - self._booting:
            # Dead, and its exit is on its way; or it stands still, and then it has to go.
            culprit = message.culprit
            asyncio.get_running_loop().call_later(_STALLED_S, self._end_stalled, culprit, self._pids[culprit])

    def _check_loss(self, message: imm.SeatExited) -> None:
        expected = message.seat in self._departures or message.seat in self._booting
        if not expected and message.seat in self.membership().seats:
            self._on_seat_lost(
                message.seat, f"seat {message.seat} (pid {message.pid}) was serving and ended with {message.status}"
            )

    def _end_stalled(self, seat: int, pid: int) -> None:
        if self._pids.get(seat) == pid:
            logger.error("seat %d (pid %d) stands still; its process is ended", seat, pid)
            self._lines.tell_imm(imm.KillSeat(seat=seat))

    def membership(self) -> Membership:
        return self._control.read_membership()

    def seats(self) -> Sequence[SeatInfo]:
        return picture(
            self._config,
            occupied=self.membership().seats,
            pids=self._pids,
            standbys=self._standbys,
            booting=self._booting,
            leaving=self._departures.keys(),
            hellos=self._hellos,
            kv=self._control.kv,
            kv_bytes=self._kv.held(),
        )

    # -- KV -----------------------------------------------------------------------------------------------------

    def least_kv_bytes(self) -> int:
        return self._kv.least_bytes()

    async def make_room(self, plan: ScalePlan) -> Mapping[int, int]:
        return await self._kv.make_room(plan, seats=plan.after.seats, joining=plan.joining, leaving=plan.leaving)

    async def fill_kv(self) -> None:
        await self._kv.fill(lambda: (self.membership().seats, self._placement))

    async def grow_kv(self, when: Callable[[], bool]) -> None:
        """Between changes: nobody gives anything up, and nothing is done unless `when` says so."""
        await self._kv.fill(lambda: (self.membership().seats, self._placement) if when() else None, only_grow=True)

    # -- prepare ------------------------------------------------------------------------------------------------

    async def boot(self, seat: int, ticket: BootTicket) -> PullReport:
        self._booting.add(seat)
        device = self._config.device_of
        message = SeatTicket(
            seat=seat,
            members=ticket.membership.seats,
            epoch=ticket.membership.epoch,
            joiner=True,
            placement=ticket.placement.owners,
            sources={move.column: device(move.source) for move in ticket.moves},
            dense_source=device(0),
            kv_chunks=ticket.kv_chunks,
            txn=ticket.txn,
            operation_id=ticket.operation_id,
        )
        self._lines.forget(lambda heard: getattr(heard, "seat", None) == seat)
        self._lines.tell_imm(imm.Assign(seat=seat, ticket=encode_ticket(message)))
        started = time.monotonic()
        hello = await self._lines.expect(sm.Hello, seat=seat)
        if hello.checkpoint_bytes:
            logger.warning("seat %d read %d bytes of the checkpoint to join", seat, hello.checkpoint_bytes)
        return PullReport(columns=len(ticket.moves), bytes=hello.pulled_bytes, seconds=time.monotonic() - started)

    async def pull(self, seat: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        pulls = tuple(sm.ColumnPull(column=move.column, source=self._config.device_of(move.source)) for move in moves)
        await self._lines.tell_seat(seat, sm.PullColumns(operation_id=txn, txn=txn, columns=pulls))
        pulled = await self._lines.expect(sm.Pulled, seat=seat, operation_id=txn)
        return PullReport(columns=pulled.columns, bytes=pulled.bytes, seconds=pulled.seconds)

    async def drop(self, seat: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        if seat not in self._pids:
            return  # it died, and its mappings with it
        columns = tuple(move.column for move in moves)
        await self._lines.tell_seat(seat, sm.DropColumns(operation_id=f"drop-{txn}", columns=columns, release=False))
        await self._lines.expect(sm.Dropped, seat=seat, operation_id=f"drop-{txn}")

    # -- commit -------------------------------------------------------------------------------------------------

    async def commit(self, plan: ScalePlan, deadline_s: float) -> CommitReport:
        self._attempt += 1
        operation_id = f"{plan.after.epoch}.{self._attempt}"
        command = sm.CommitCommand(
            operation_id=operation_id,
            before=plan.before.seats,
            members=plan.after.seats,
            epoch=plan.after.epoch,
            attempt=self._attempt,
            placement=plan.placement_after.owners,
            expires=time.monotonic() + deadline_s,
        )
        self.pauses = {}
        for seat in plan.leaving:
            self._departures[seat] = Departure(operation_id=operation_id, survivors=plan.survivors)
        try:
            await self._send_command(sm.encode_command(command))
            reports = await asyncio.gather(
                *(self._lines.expect(sm.Committed, seat=seat, operation_id=operation_id) for seat in command.before)
            )
        except BaseException:
            # Whether it has happened is read from the control page by the caller.
            await self._settle(plan, self.membership().epoch == plan.after.epoch)
            raise
        committed = all(report.committed for report in reports)
        await self._settle(plan, committed)
        if not committed:
            reason = next((report.reason for report in reports if report.reason), "the gate decided to abort")
            return CommitReport(committed=False, epoch=plan.before.epoch, reason=reason)
        await self._wait_for_pauses(plan)
        pauses = {report.seat: self.pauses.get(report.seat, report.gate_ms) for report in reports}
        return CommitReport(committed=True, epoch=plan.after.epoch, pause_ms=pauses)

    async def _settle(self, plan: ScalePlan, committed: bool) -> None:
        if committed:
            self._placement = plan.placement_after
            self._booting -= set(plan.joining)
            # At once, not with the rest of finishing: clients of the moved requests are waiting.
            for seat in plan.leaving:
                departure = self._departures[seat]
                departure.handover = asyncio.get_running_loop().create_task(self._hand_over(seat, departure))
        else:
            for seat in plan.leaving:
                self._departures.pop(seat, None)
        for seat in self.membership().seats:
            if (
                seat not in self._pids
            ):  # a leaver that stays after all, or a joiner, whose end was no surprise until now
                self._on_seat_lost(seat, f"seat {seat} ended during the change and is a member after it")
        await self._send_route((plan.after if committed else plan.before).seats)

    async def _wait_for_pauses(self, plan: ScalePlan) -> None:
        deadline = time.monotonic() + _PAUSE_REPORT_S
        while time.monotonic() < deadline and not set(plan.survivors) <= set(self.pauses):
            await asyncio.sleep(0.01)

    # -- finish -------------------------------------------------------------------------------------------------

    async def release(self, seat: int, columns: Sequence[int]) -> None:
        if seat in self._pids:
            operation = f"release-{seat}-{time.monotonic_ns()}"
            await self._lines.tell_seat(
                seat, sm.DropColumns(operation_id=operation, columns=tuple(columns), release=True)
            )
            await self._lines.expect(sm.Dropped, seat=seat, operation_id=operation)
        device = self._config.device_of(seat)
        # A column that another seat of the same device took over stays where it is.
        gone = [c for c in columns if self._config.device_of(self._placement.owners[c]) != device]
        blocks = await self._hmm.lookup(kind="column", device=device, columns=gone) if gone else []
        if blocks:
            await self._hmm.release([block.block_id for block in blocks])

    async def dismiss(self, seat: int) -> int:
        departure = self._departures.get(seat)
        if departure is None or departure.handover is None:
            await self._cancel_joiner(seat)
            return 0
        moved = await departure.handover
        if seat in self._pids:
            await self._lines.expect(imm.SeatExited, seat=seat, exits=False)
        del self._departures[seat]
        await self._release_dense(seat)
        await self._kv.drop([seat])
        return moved

    async def _hand_over(self, seat: int, departure: Departure) -> int:
        """Let the survivors go on with the leaver's requests once its last tokens have been delivered."""
        try:
            left = await self._lines.expect(sm.Left, seat=seat, operation_id=departure.operation_id)
        except SeatError as error:
            logger.error("a leaver died while handing over; its requests are sent again: %s", error)
            departure.died = True
            # What another leaver has on its way is nowhere to be found, and must not be sent again.
            await handed_over(self._departures.values())
            return await self._resend(f"resend-{departure.operation_id}-{seat}", forget=seat)
        return await hand_over(self._lines, self.fences, departure, left)

    # -- another HMM ----------------------------------------------------------------------------------------------

    async def offer_memory(self) -> int:
        """Have every seat offer what it maps to the HMM that answers now. Returns how many blocks it did not have."""
        operation_id = f"offer-{time.monotonic_ns()}"
        seats = [seat for seat in self.membership().seats if seat in self._pids]
        for seat in seats:
            await self._lines.tell_seat(seat, sm.OfferMemory(operation_id=operation_id))
        offered = await asyncio.gather(
            *(self._lines.expect(sm.Offered, seat=seat, operation_id=operation_id) for seat in seats)
        )
        return sum(message.blocks for message in offered)

    # -- a seat's death -----------------------------------------------------------------------------------------

    async def recover(self, plan: RecoveryPlan, deadline_s: float) -> int:
        """Go on as planned; returns how many of the dead seats' requests were sent again.

        Raises:
            SeatError: it did not work out, for example because another seat has died: plan anew.
        """
        self._attempt += 1
        operation_id = f"recover-{plan.membership.epoch}.{self._attempt}"
        await handed_over(self._departures.values())
        await self._kv.drop(plan.dead)
        first = await self._kv.make_room(plan, seats=plan.membership.seats, joining=plan.replaced)
        await asyncio.gather(
            *(self._replace(seat, plan, operation_id, first.get(seat, 0)) for seat in plan.replaced),
            *(self._take_over(seat, plan, operation_id) for seat in plan.survivors if plan.incoming(seat)),
        )
        members = plan.membership.seats
        command = sm.Recover(
            operation_id=operation_id,
            members=members,
            epoch=plan.membership.epoch,
            attempt=self._attempt,
            placement=plan.placement.owners,
            expires=time.monotonic() + deadline_s,
        )
        for seat in plan.survivors:
            await self._lines.tell_seat(seat, command)
        opened = await self._send_recover_route(operation_id, members)
        here = await self._recovered(operation_id, members)
        self._placement = plan.placement
        self._booting -= set(plan.replaced)
        sent = await self._send_again(opened - here)
        await self._release_dead(plan)
        await self.fill_kv()
        return sent

    async def _recovered(self, operation_id: str, members: Sequence[int]) -> set[str]:
        reports = await asyncio.gather(
            *(self._lines.expect(sm.Recovered, seat=seat, operation_id=operation_id) for seat in members)
        )
        absent = [report.seat for report in reports if not report.committed]
        if absent:
            raise SeatError(f"seats {absent} did not pass the gate", operation=operation_id)
        # What has ended on a member is on none of them, and open until its last output has passed.
        await self.fences.wait(operation_id, members)
        return {rid for report in reports for rid in report.rids}

    async def _replace(self, seat: int, plan: RecoveryPlan, operation_id: str, kv_chunks: int) -> None:
        """A standby takes the dead seat's place; its weights are still on its device."""
        self._booting.add(seat)
        ticket = SeatTicket(
            seat=seat,
            members=plan.membership.seats,
            epoch=plan.membership.epoch,
            joiner=True,
            placement=plan.placement.owners,
            attempt=self._attempt,
            kv_chunks=kv_chunks,
            operation_id=operation_id,
        )
        self._lines.forget(lambda heard: getattr(heard, "seat", None) == seat)
        self._lines.tell_imm(imm.Assign(seat=seat, ticket=encode_ticket(ticket)))
        await self._lines.expect(sm.Hello, seat=seat)

    async def _take_over(self, seat: int, plan: RecoveryPlan, operation_id: str) -> None:
        pulls = tuple(
            sm.ColumnPull(column=move.column, source=self._config.device_of(move.source))
            for move in plan.incoming(seat)
        )
        await self._lines.tell_seat(seat, sm.PullColumns(operation_id=operation_id, txn="", columns=pulls))
        await self._lines.expect(sm.Pulled, seat=seat, operation_id=operation_id)

    async def _resend(self, operation_id: str, *, forget: int) -> int:
        """Send again what is open and on no seat, with the membership as it is."""
        async with self._resending:  # a seat counts for one operation at a time
            members = self.membership().seats
            for member in members:
                await self._lines.tell_seat(member, sm.CountRequests(operation_id=operation_id, forget=forget))
            opened = await self._send_recover_route(operation_id, members)
            return await self._send_again(opened - await self._recovered(operation_id, members))

    async def _release_dead(self, plan: RecoveryPlan) -> None:
        for seat in plan.dead:
            if seat not in plan.replaced:
                await self.release(seat, [move.column for move in plan.moves if move.source == seat])
                await self._release_dense(seat)

    async def _cancel_joiner(self, seat: int) -> None:
        try:
            if seat in self._pids:
                self._lines.tell_imm(imm.KillSeat(seat=seat))
                await self._lines.expect(imm.SeatExited, seat=seat, exits=False)
        finally:
            self._booting.discard(seat)

    async def _release_dense(self, seat: int) -> None:
        """The last seat of a device takes the device's copy of the dense weights along."""
        device = self._config.device_of(seat)
        if any(self._config.device_of(other) == device for other in self.membership().seats):
            return
        blocks = await self._hmm.lookup(kind="dense", device=device)
        if blocks:
            await self._hmm.release([block.block_id for block in blocks])
