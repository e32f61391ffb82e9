"""The coordinator's two ports over a small model of HMM and ranks, which checks order and exactly-once itself.

A fault is (call, how): the call is a method's name with its rank, as in "boot 2" or "begin"; how is one of
`raise_before` (nothing happened yet), `raise_after` (it happened, the answer was lost) and `hang` (half done, never
returns). Columns are blocks (rank, column); a rank maps blocks, the HMM holds them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.observer import Observer
from elasticmoe_sglang.coordinator.status import (
    CommitReport,
    DeviceMemory,
    MemoryStatus,
    Moved,
    PullReport,
    RankInfo,
    RankState,
    Withdrawal,
)
from elasticmoe_sglang.coordinator.steps import WorkerGone, WorkerUp
from elasticmoe_sglang.errors import HmmUnavailable, WorkerError
from elasticmoe_sglang.planner import ColumnMove, TransitionPlan, View, initial_placement
from elasticmoe_sglang.wire.to_worker import JoinSpec

COLUMN = 1000
DENSE = 5000
KV_CHUNKS = 10


class InjectedFault(Exception):
    """Deliberately not one of our own errors: the coordinator has to stand any."""


@dataclass
class FakeCluster:
    """Both ports in one object, since ranks and HMM act on the same blocks."""

    capacity: int = 4
    active: Sequence[int] = (0, 1)
    columns: int = 8
    budget: int = 1 << 30
    faults: Mapping[str, str] = field(default_factory=dict)
    hmm_answers: bool = True
    commit_verdict: str | None = None
    kv_chunk: int = 0
    """Bytes of a chunk of KV; a rank keeps two at least."""
    popularity: Sequence[int] | None = None
    """Tokens that are routed to each column between two questions; None: the ranks do not count."""
    redundant: int = 0
    """The server's redundant_experts."""

    def __post_init__(self) -> None:
        placement = initial_placement(self.columns, self.active)
        membership = Membership(ranks=tuple(self.active), epoch=0, capacity=self.capacity)
        self.committed = View(membership=membership, placement=placement)
        self.states = [RankState.ACTIVE if rank in self.active else RankState.STANDBY for rank in range(self.capacity)]
        self.held = {(owner, column) for column, owner in enumerate(placement.owners)}
        self.mapped = set(self.held)
        self.open: dict[str, set[tuple[int, int]]] = {}
        self.kv = dict.fromkeys(self.active, KV_CHUNKS)
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.routed: tuple[int, ...] = ()
        self.counted = 0

    def coordinator(self, *, observer: Observer | None = None, **deadlines: float) -> Coordinator:
        config = ElasticConfig(
            ep_size=len(self.active), max_ep_size=self.capacity, redundant_experts=self.redundant, **deadlines
        )  # type: ignore[arg-type]
        pids = {rank: 100 + rank for rank in self.active}
        self.driven = Coordinator(
            config=config, view=self.committed, pids=pids, memory=self, workers=self, observer=observer
        )
        return self.driven

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
        for rank in range(self.capacity):
            columns = COLUMN * sum(owner == rank for owner, _ in self.held)
            dense = DENSE if self.states[rank] is RankState.ACTIVE else 0
            kv = self.kv_chunk * self.kv.get(rank, 0)
            by_kind = {"column": columns, "dense": dense, "kv": kv}
            used = columns + dense + kv
            devices.append(DeviceMemory(device=rank, budget=self.budget, used=used, peak=used, by_kind=by_kind))
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
        blocks = self.open.pop(txn, set())
        assert not blocks & self.mapped, "the HMM would free blocks that a rank still maps"
        self.held -= blocks
        await self._leave("rollback", how)
        return [0] * self.capacity

    async def count_routed(self, ranks: Sequence[int]) -> dict[int, list[int]]:
        await self._leave("count_routed", await self._enter("count_routed"))
        assert tuple(ranks) == self.committed.ranks
        if self.popularity is None:
            raise WorkerError("this server does not count routed tokens", rank=ranks[0])
        self.counted += 1
        turns = {rank: self.committed.placement.shared_by(rank) for rank in ranks}
        computed = {rank: [0] * self.columns for rank in ranks}
        for column, holder in self.committed.placement.held():
            _, holders = turns[holder].get(column, (0, 1))
            computed[holder][column] = self.counted * self.popularity[column] // holders
        return computed

    def least_kv_bytes(self) -> int:
        return 2 * self.kv_chunk

    async def shrink_kv(self, plan: TransitionPlan) -> dict[int, int]:
        how = await self._enter("shrink_kv")
        for rank in plan.survivors:
            self.kv[rank] -= len(plan.incoming(rank))
            await asyncio.sleep(0)
            if how == "hang":
                break
        await self._leave("shrink_kv", how)
        return dict.fromkeys(plan.joining, KV_CHUNKS)

    async def grow_kv(self) -> None:
        how = await self._enter("grow_kv")
        assert not self.open, "KV would take what the transaction still has"
        self.kv = dict.fromkeys(self.committed.ranks, KV_CHUNKS)
        await self._leave("grow_kv", how)

    def ranks(self) -> list[RankInfo]:
        return [RankInfo(rank=rank, state=state, device=rank, pid=100 + rank) for rank, state in enumerate(self.states)]

    def view(self) -> View:
        return self.committed

    async def kill(self, rank: int, pid: int, *, stalled: bool) -> None:
        raise AssertionError("nobody has stalled")

    def lose(self, rank: int) -> None:
        """The rank's worker dies."""
        self.states[rank] = RankState.STANDBY
        self.mapped = {block for block in self.mapped if block[0] != rank}
        self.driven.post(WorkerGone(rank=rank, pid=100 + rank))

    async def drop_kv(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.kv.pop(rank, None)

    async def spread_waiting(self, ranks: Sequence[int], joining: Sequence[int]) -> int:
        assert set(joining) <= set(self.routed)
        return 2

    async def resend(self, operation_id: str, forget: Sequence[int]) -> int:
        return 3

    async def route(self, ranks: Sequence[int]) -> None:
        self.routed = tuple(ranks)

    async def pauses(self, ranks: Sequence[int]) -> dict[int, float]:
        return {rank: 1.0 + rank for rank in ranks}

    async def boot(self, join_spec: JoinSpec) -> PullReport:
        rank = join_spec.rank
        call = f"boot {rank}"
        how = await self._enter(call)
        assert self.states[rank] is RankState.STANDBY
        self.states[rank] = RankState.JOINING
        self.driven.post(WorkerUp(rank=rank, pid=100 + rank))
        assert rank in join_spec.members and join_spec.joining_rank
        holders = {column: holder for holder, column in sorted(self.held)}
        moves = [ColumnMove(column=column, source=holders[column], target=rank) for column in join_spec.held]
        return await self._take(call, how, rank, join_spec.txn, moves)

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        call = f"pull {rank}"
        how = await self._enter(call)
        assert self.states[rank] is RankState.ACTIVE
        return await self._take(call, how, rank, txn, moves)

    async def _take(self, call: str, how: str | None, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        for index, move in enumerate(moves):
            assert move.target == rank and (move.source, move.column) in self.held
            if how == "hang" and index == len(moves) // 2:
                break
            self.open[txn].add((rank, move.column))
            self.held.add((rank, move.column))
            self.mapped.add((rank, move.column))
            await asyncio.sleep(0)
        await self._leave(call, how)
        short = how == "short"
        return PullReport(columns=len(moves) - short, bytes=(len(moves) - short) * COLUMN)

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        how = await self._enter(f"drop {rank}")
        self.mapped -= {(rank, move.column) for move in moves}
        await self._leave(f"drop {rank}", how)

    async def commit_ranks(self, plan: TransitionPlan, attempt: int, expires: float) -> CommitReport:
        how = await self._enter("ranks.commit")
        if self.commit_verdict is not None:
            return CommitReport(committed=False, reason=self.commit_verdict)
        if how == "hang":
            await self._leave("ranks.commit", how)
        for column, holder in plan.after.placement.held():
            assert (holder, column) in self.mapped, "a table would point at a column that is not there"
        self.committed = plan.after
        for rank in plan.joining:
            self.states[rank] = RankState.ACTIVE
        for rank in plan.retiring:
            self.states[rank] = RankState.RETIRING
        await self._leave("ranks.commit", how)
        return CommitReport(committed=True, pause_ms=dict.fromkeys(plan.before.ranks, 0.5))

    async def withdraw(self, plan: TransitionPlan, attempt: int) -> Withdrawal:
        return Withdrawal(committed=self.committed == plan.after)

    async def commit(self, txn: str) -> list[int]:
        how = await self._enter("hmm.commit")
        self.open.pop(txn, None)
        await self._leave("hmm.commit", how)
        return [0] * self.capacity

    async def migrate(self, rank: int, operation_id: str) -> Moved:
        assert self.states[rank] is RankState.RETIRING
        return Moved(requests=3, recomputed=1)

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        how = await self._enter(f"release {rank}")
        blocks = {(rank, column) for column in columns}
        again = self.calls[f"release {rank}"] > 1
        assert again or blocks <= self.held
        if self.states[rank] is RankState.ACTIVE:
            assert again or blocks <= self.mapped
            self.mapped -= blocks
        else:
            assert not blocks & self.mapped, "released before its rank has let go"
        self.held -= blocks
        await self._leave(f"release {rank}", how)

    async def dismiss(self, rank: int) -> None:
        how = await self._enter(f"dismiss {rank}")
        if self.states[rank] is RankState.ACTIVE:
            raise WorkerError("an active rank was dismissed", rank=rank)
        self.states[rank] = RankState.STANDBY
        self.mapped = {block for block in self.mapped if block[0] != rank}
        self.driven.post(WorkerGone(rank=rank, pid=100 + rank))
        await self._leave(f"dismiss {rank}", how)

    def check_settled(self, coordinator: Coordinator) -> None:
        """No transaction is open, and what is held and mapped is what the placement says, no more and no less."""
        placed = {(holder, column) for column, holder in coordinator.view.placement.held()}
        assert not self.open
        assert self.mapped == placed
        assert self.kv == dict.fromkeys(self.committed.ranks, KV_CHUNKS)
        assert self.held == placed
        assert coordinator.view == self.committed and self.routed in ((), self.committed.ranks)
        active = [rank for rank, state in enumerate(self.states) if state is RankState.ACTIVE]
        assert tuple(active) == self.committed.ranks
        others = {state for state in self.states if state is not RankState.ACTIVE}
        assert others <= {RankState.STANDBY}
