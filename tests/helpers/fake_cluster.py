"""The coordinator's two ports over a small model of HMM and seats, which checks order and exactly-once itself.

A fault is (call, how): the call is a method's name with its seat, as in "boot 2" or "begin"; how is one of
`raise_before` (nothing happened yet), `raise_after` (it happened, the answer was lost) and `hang` (half done, never
returns). Columns are blocks (seat, column); a seat maps blocks, the HMM holds them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator import (
    BootTicket,
    CommitReport,
    Coordinator,
    DeviceMemory,
    MemoryStatus,
    PullReport,
    SeatInfo,
    SeatState,
)
from elasticmoe_sglang.errors import HmmUnavailable, SeatError
from elasticmoe_sglang.planner import ColumnMove, ScalePlan, initial_placement
from elasticmoe_sglang.seats.membership import Membership

COLUMN = 1000
DENSE = 5000
KV_CHUNKS = 10


class InjectedFault(Exception):
    """Deliberately not one of our own errors: the coordinator has to stand any."""


@dataclass
class FakeCluster:
    """Both ports in one object, since seats and HMM act on the same blocks."""

    capacity: int = 4
    occupied: Sequence[int] = (0, 1)
    columns: int = 8
    budget: int = 1 << 30
    faults: Mapping[str, str] = field(default_factory=dict)
    hmm_answers: bool = True
    commit_verdict: str | None = None
    kv_chunk: int = 0
    """Bytes of a chunk of KV; a seat keeps two at least."""

    def __post_init__(self) -> None:
        placement = initial_placement(self.columns, self.occupied)
        self.members = Membership(seats=tuple(self.occupied), epoch=0, capacity=self.capacity)
        self.states = [
            SeatState.OCCUPIED if seat in self.occupied else SeatState.STANDBY for seat in range(self.capacity)
        ]
        self.held = {(owner, column) for column, owner in enumerate(placement.owners)}
        self.mapped = set(self.held)
        self.open: dict[str, set[tuple[int, int]]] = {}
        self.kv = dict.fromkeys(self.occupied, KV_CHUNKS)
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []

    def coordinator(self, **deadlines: float) -> Coordinator:
        config = ElasticConfig(ep_size=len(self.occupied), max_ep_size=self.capacity, **deadlines)  # type: ignore[arg-type]
        placement = initial_placement(self.columns, self.occupied)
        return Coordinator(config=config, membership=self.members, placement=placement, memory=self, seats=self)

    async def _enter(self, call: str) -> str | None:
        """Count the call and do what its fault says has to be done first; returns the fault."""
        self.calls[call] += 1
        self.log.append(call)
        await asyncio.sleep(0)
        how = self.faults.get(call)
        if how == "raise_before":
            raise InjectedFault(call)
        return how

    async def _leave(self, call: str, how: str | None) -> None:
        if how == "raise_after":
            raise InjectedFault(call)
        if how == "hang":
            await asyncio.Event().wait()

    async def status(self) -> MemoryStatus:
        if not self.hmm_answers:
            raise HmmUnavailable("nobody answers at ipc:///hmm.sock")
        devices = []
        for seat in range(self.capacity):
            columns = COLUMN * sum(owner == seat for owner, _ in self.held)
            dense = DENSE if self.states[seat] is SeatState.OCCUPIED else 0
            kv = self.kv_chunk * self.kv.get(seat, 0)
            by_kind = {"column": columns, "dense": dense, "kv": kv}
            used = columns + dense + kv
            devices.append(DeviceMemory(device=seat, budget=self.budget, used=used, peak=used, by_kind=by_kind))
        return MemoryStatus(
            available=True,
            endpoint="ipc:///hmm.sock",
            pid=1,
            devices=devices,
            column_bytes=COLUMN,
            dense_bytes=DENSE,
        )

    async def begin(self, operation_id: str) -> str:
        how = await self._enter("begin")
        if how is not None:
            # A begin that fails leaves nothing open, whatever the HMM did in between: its port promises so.
            await self._leave("begin", how)
        txn = f"txn-{operation_id}"
        assert txn not in self.open
        self.open[txn] = set()
        return txn

    async def rollback(self, txn: str) -> list[int]:
        how = await self._enter("rollback")
        blocks = self.open.pop(txn)
        assert not blocks & self.mapped, "the HMM would free blocks that a seat still maps"
        self.held -= blocks
        await self._leave("rollback", how)
        return [0] * self.capacity

    def least_kv_bytes(self) -> int:
        return 2 * self.kv_chunk

    async def make_room(self, plan: ScalePlan) -> dict[int, int]:
        how = await self._enter("make_room")
        for seat in plan.survivors:
            self.kv[seat] -= len(plan.incoming(seat))
            await asyncio.sleep(0)
            if how == "hang":
                break
        await self._leave("make_room", how)
        return dict.fromkeys(plan.joining, KV_CHUNKS)

    async def fill_kv(self) -> None:
        how = await self._enter("fill_kv")
        assert not self.open, "KV would take what the transaction still has"
        self.kv = dict.fromkeys(self.members.seats, KV_CHUNKS)
        await self._leave("fill_kv", how)

    def seats(self) -> list[SeatInfo]:
        return [SeatInfo(seat=seat, state=state, device=seat, pid=100 + seat) for seat, state in enumerate(self.states)]

    def membership(self) -> Membership:
        return self.members

    async def boot(self, seat: int, ticket: BootTicket) -> PullReport:
        call = f"boot {seat}"
        how = await self._enter(call)
        assert self.states[seat] is SeatState.STANDBY
        self.states[seat] = SeatState.BOOTING
        return await self._take(call, how, seat, ticket.txn, ticket.moves)

    async def pull(self, seat: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        call = f"pull {seat}"
        how = await self._enter(call)
        assert self.states[seat] is SeatState.OCCUPIED
        return await self._take(call, how, seat, txn, moves)

    async def _take(self, call: str, how: str | None, seat: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        for index, move in enumerate(moves):
            assert move.target == seat and (move.source, move.column) in self.held
            if how == "hang" and index == len(moves) // 2:
                break
            self.open[txn].add((seat, move.column))
            self.held.add((seat, move.column))
            self.mapped.add((seat, move.column))
            await asyncio.sleep(0)
        await self._leave(call, how)
        short = how == "short"
        return PullReport(columns=len(moves) - short, bytes=(len(moves) - short) * COLUMN, seconds=0.001)

    async def drop(self, seat: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        how = await self._enter(f"drop {seat}")
        self.mapped -= {(seat, move.column) for move in moves}
        await self._leave(f"drop {seat}", how)

    async def commit(self, plan: ScalePlan | str, deadline_s: float = 0) -> CommitReport | list[int]:  # type: ignore[override]
        if isinstance(plan, str):
            return await self._commit_memory(plan)
        how = await self._enter("seats.commit")
        if self.commit_verdict is not None:
            return CommitReport(committed=False, epoch=plan.before.epoch, reason=self.commit_verdict)
        if how == "hang":
            await self._leave("seats.commit", how)
        for column, owner in enumerate(plan.placement_after.owners):
            assert (owner, column) in self.mapped, "a table would point at a column that is not there"
        self.members = plan.after
        for seat in plan.joining:
            self.states[seat] = SeatState.OCCUPIED
        for seat in plan.leaving:
            self.states[seat] = SeatState.LEAVING
        await self._leave("seats.commit", how)
        pause = {seat: 1.0 + seat for seat in plan.after.seats}
        return CommitReport(committed=True, epoch=plan.after.epoch, pause_ms=pause)

    async def _commit_memory(self, txn: str) -> list[int]:
        how = await self._enter("hmm.commit")
        del self.open[txn]
        await self._leave("hmm.commit", how)
        return [0] * self.capacity

    async def release(self, seat: int, columns: Sequence[int]) -> None:
        how = await self._enter(f"release {seat}")
        blocks = {(seat, column) for column in columns}
        assert blocks and blocks <= self.held
        if self.states[seat] is SeatState.OCCUPIED:
            assert blocks <= self.mapped
            self.mapped -= blocks
        else:
            assert not blocks & self.mapped, "released before its seat has let go"
        self.held -= blocks
        await self._leave(f"release {seat}", how)

    async def dismiss(self, seat: int) -> int:
        how = await self._enter(f"dismiss {seat}")
        if self.states[seat] is SeatState.OCCUPIED:
            raise SeatError("an occupied seat was dismissed", seat=seat)
        moved = int(self.states[seat] is SeatState.LEAVING)
        self.states[seat] = SeatState.STANDBY
        self.mapped = {block for block in self.mapped if block[0] != seat}
        await self._leave(f"dismiss {seat}", how)
        return moved

    def check_settled(self, coordinator: Coordinator) -> None:
        """No transaction is open, and what is held and mapped is what the placement says, no more and no less."""
        placed = {(owner, column) for column, owner in enumerate(coordinator.placement.owners)}
        assert not self.open
        assert self.mapped == placed
        assert self.kv == dict.fromkeys(self.members.seats, KV_CHUNKS)
        assert self.held == placed
        assert coordinator.membership == self.members
        occupied = [seat for seat, state in enumerate(self.states) if state is SeatState.OCCUPIED]
        assert tuple(occupied) == self.members.seats
        others = {state for state in self.states if state is not SeatState.OCCUPIED}
        assert others <= {SeatState.STANDBY}
        assert self.calls["begin"] >= self.calls["rollback"] + self.calls["hmm.commit"]
