"""Replicas of several ranks: which targets are legal, who is lost with whom, and what is sized and told together."""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.region import channels_of
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.engine import Engine
from elasticmoe_sglang.coordinator.incarnations import Incarnations
from elasticmoe_sglang.coordinator.migration import OutputFences, migrate
from elasticmoe_sglang.errors import PlanError, UserInputError, WorkerError
from elasticmoe_sglang.planner import (
    DeviceRoom,
    ModelNeeds,
    RestoreRanks,
    RetireRanks,
    ScaleTo,
    Target,
    View,
    extra_bytes,
    initial_placement,
    plan_loss,
    plan_target,
)
from elasticmoe_sglang.wire.to_coordinator import REPLICA_LOST, Retired, WorkerExited
from elasticmoe_sglang.wire.to_worker import MapMigrated, ReleaseMigrated, Resumed
from elasticmoe_sglang.worker.kv import Resized, ResizeJobs
from tests.helpers.engine_world import DEADLINES

CONFIG = ElasticConfig(ep_size=2, max_ep_size=6, attention_tp=2)


def view(*ranks: int, capacity: int = 6) -> View:
    membership = Membership(ranks=ranks, epoch=3, capacity=capacity)
    return View(membership=membership, placement=initial_placement(12, ranks))


# Targets and losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "ranks"),
    [
        (ScaleTo(size=2), (0, 1)),
        (ScaleTo(size=6), (0, 1, 2, 3, 4, 5)),
        (RetireRanks(ranks=(5, 4)), (0, 1)),
        (RestoreRanks(ranks=(2, 3)), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_ranks_join_and_retire_by_replicas(target: Target, ranks: tuple[int, ...]) -> None:
    plan = plan_target(view(0, 1, 4, 5), target, replica_size=2)
    assert plan.after.ranks == ranks
    assert plan.after.placement.is_balanced_over(ranks)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (
            ScaleTo(size=3),
            "the EP size 3 is not possible on this server. It has 6 ranks: ask for a multiple of 2, the ranks of an "
            "attention replica, up to 6",
        ),
        (ScaleTo(size=8), "the EP size 8 is not possible on this server. It has 6 ranks: ask for a multiple of 2"),
        (
            RetireRanks(ranks=(4,)),
            "rank 4 cannot be named without rank 5 of its attention replica. Ranks that can be retired now: 4 and 5",
        ),
        (RetireRanks(ranks=(1,)), "rank 1 cannot be named without rank 0 of its attention replica"),
        (RetireRanks(ranks=(2, 3)), "ranks 2, 3 are not active. Ranks that can be retired now: 4 and 5"),
        (
            RestoreRanks(ranks=(2,)),
            "rank 2 cannot be named without rank 3 of its attention replica. Ranks that can be restored now: 2 and 3",
        ),
    ],
)
def test_parts_of_a_replica_are_refused_with_what_is_legal(target: Target, sentence: str) -> None:
    with pytest.raises(PlanError) as refused:
        plan_target(view(0, 1, 4, 5), target, replica_size=2)
    assert str(refused.value).startswith(sentence)


def test_the_replica_of_rank_0_does_not_retire() -> None:
    with pytest.raises(PlanError, match="Only the replica of rank 0 is active, so none can be retired now"):
        plan_target(view(0, 1), RetireRanks(ranks=(4, 5)), replica_size=2)


def test_who_shares_a_replica_with_a_lost_rank_is_lost_too() -> None:
    plan = plan_loss(view(0, 1, 2, 3, 4, 5), [3], replica_size=2)
    assert plan.lost == (2, 3) and plan.survivors == plan.after.ranks == (0, 1, 4, 5)
    assert {move.source for move in plan.moves} == {2, 3}


@pytest.mark.parametrize("lost", [0, 1])
def test_the_replica_of_rank_0_is_replaced_as_a_whole(lost: int) -> None:
    plan = plan_loss(view(0, 1, 2, 3), [lost], replica_size=2)
    assert plan.lost == plan.joining == (0, 1) and plan.after.ranks == (0, 1, 2, 3) and not plan.moves


class Rig:
    """An engine of which only what it starts is looked at. Rank r is served by process 100 + r."""

    def __init__(self, *ranks: int) -> None:
        self.engine = Engine(view(*ranks), {r: 100 + r for r in ranks}, DEADLINES, restore=False, replica_size=2)

    def post(self, event: s.Event, now: float) -> list[s.Step]:
        return [effect.step for effect in self.engine.handle(event, now) if isinstance(effect, s.Start)]


def test_a_living_rank_is_ended_before_its_replica_is_replaced() -> None:
    rig = Rig(0, 1, 2, 3)
    assert rig.post(s.WorkerGone(rank=3, pid=103), 0.0) == [s.Kill(rank=2, pid=102, stalled=False)]
    assert rig.engine.running is None
    rig.post(s.StepEnded(number=1), 0.1)
    rig.post(s.WorkerGone(rank=2, pid=102), 0.2)
    assert rig.engine.running is not None and rig.engine.running.lost == (2, 3)


def test_nobody_is_ended_where_the_rank_has_ended_by_itself() -> None:
    rig = Rig(0, 1, 2, 3, 4, 5)
    rig.engine._alive.pop(2)  # both deaths are heard at once
    steps = rig.post(s.WorkerGone(rank=3, pid=103), 0.0)
    assert not any(isinstance(step, s.Kill) for step in steps)
    assert rig.engine.running is not None and rig.engine.running.after.ranks == (0, 1, 4, 5)


def test_a_rank_that_cannot_be_ended_ends_the_server() -> None:
    rig, now, ended = Rig(0, 1, 2, 3), 0.0, []
    effects = rig.engine.handle(s.WorkerGone(rank=3, pid=103), now)
    for _ in range(int(DEADLINES.finish) + 3):
        for effect in list(effects):
            if isinstance(effect, s.Start):
                effects += rig.engine.handle(s.StepEnded(number=effect.number), now)
        ended += [effect.reason for effect in effects if isinstance(effect, s.EndServer)]
        now += 1.1
        effects = rig.engine.handle(s.Tick(), now)
    assert ended == ["ranks [2] share a replica with lost ranks [3] and could not be ended"]


def test_the_rank_that_leads_a_retiring_replica_hands_its_requests_over() -> None:
    assert CONFIG.leaders_of((2, 3, 4, 5)) == (2, 4)
    assert CONFIG.mates_of(3) == (2, 3) and CONFIG.replicas_of((5, 0, 4)) == (0, 2)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["ep_size", "max_ep_size", "hot_standbys"])
def test_sizes_are_multiples_of_a_replica(setting: str) -> None:
    values: dict[str, Any] = {"ep_size": 2, "max_ep_size": 6, "attention_tp": 2, setting: 3}
    flag = f"--elasticmoe-{setting.replace('_', '-')}"
    with pytest.raises(UserInputError, match=f"{flag} 3 is not a multiple of --elasticmoe-attention-tp 2"):
        ElasticConfig(**values)


def test_every_replica_has_channels_of_its_own() -> None:
    """SGLang makes two groups of each; those of one rank need none."""
    assert channels_of(CONFIG) == channels_of(replace(CONFIG, attention_tp=1)) + 2 * 3


def test_a_joining_rank_needs_its_part_of_the_dense_weights() -> None:
    model = ModelNeeds(column_bytes=10, dense_bytes=100, replica_size=2)
    plan = plan_target(view(0, 1, 2, 3), ScaleTo(size=6), replica_size=2)
    columns = {rank: 10 * len(plan.incoming(rank)) for rank in (4, 5)}

    def extra(*ranks: int) -> int:
        return extra_bytes(plan, model, DeviceRoom(device=0, ranks=ranks, budget=1, used=0, holds_dense=True))

    assert extra(4) == columns[4] + 100  # alone on its device
    assert extra(3, 4) == columns[4] + 100  # rank 3 has the other part
    assert extra(2, 4) == columns[4]
    assert extra(4, 5) == columns[4] + columns[5] + 200


# Processes ------------------------------------------------------------------------------------------------------------


def test_who_ends_with_its_replica_is_not_suspected() -> None:
    incarnations = Incarnations()
    incarnations.assigned(12, 3)
    incarnations.exited(2, 12, REPLICA_LOST, serving=True)
    assert not incarnations.take_suspicion() and incarnations.gone == {(2, 3)}
    assert WorkerExited(rank=2, pid=12, status=REPLICA_LOST).how == "ended with another rank of its attention replica"


class Channel:
    """Notes what ranks are told; the rank that leads a replica answers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, type]] = []

    async def tell_worker(self, rank: int, message: object) -> None:
        self.told.append((rank, type(message)))

    async def wait_for(self, kind: type, *, rank: int, about: Any) -> Resumed:
        return Resumed(rank=rank, operation_id="o", retiring_rank=4, requests=2, with_kv=2, recomputed=0)


def test_all_ranks_of_a_replica_copy_their_parts_of_the_kv() -> None:
    channel, fences = Channel(), OutputFences()
    fences.passed("o", 4)
    retired = Retired(rank=4, operation_id="o", migrated={0: 2, 2: 2}, kv_chunks={0: (1,), 2: ()}, kv_tokens=9)
    moved = asyncio.run(migrate(channel, fences, retired, CONFIG.mates_of))  # type: ignore[arg-type]
    assert moved.requests == 4
    assert [rank for rank, kind in channel.told if kind is MapMigrated] == [0, 1]
    assert sorted(rank for rank, kind in channel.told if kind is ReleaseMigrated) == [0, 1, 2, 3]


# KV resizes that several ranks start together -------------------------------------------------------------------------


def ask(jobs: ResizeJobs, tokens: int, timeout_s: float) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(jobs.ask(tokens, timeout_s, lambda: None))
        except WorkerError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while jobs.claim() is None:
        pass
    jobs.unclaim()
    return thread, outcome


def test_a_claimed_job_is_not_cancelled() -> None:
    jobs = ResizeJobs()
    thread, outcome = ask(jobs, 64, 0.2)
    assert jobs.claim() == 64
    thread.join(0.5)
    assert thread.is_alive() and not outcome
    jobs.run_claimed(lambda tokens: Resized(tokens=tokens, evicted=1))
    thread.join(5)
    assert outcome == [Resized(tokens=64, evicted=1)]


def test_a_job_that_was_given_back_is_cancelled_at_its_deadline() -> None:
    jobs = ResizeJobs()
    thread, outcome = ask(jobs, 64, 0.1)
    thread.join(5)
    assert "did not change its KV capacity to 64 tokens" in str(outcome[0])
    assert jobs.claim() is None


def test_an_error_of_a_claimed_job_is_its_callers() -> None:
    jobs = ResizeJobs()
    thread, outcome = ask(jobs, 64, 5.0)

    def refuse(tokens: int) -> Resized:
        raise WorkerError(f"no room for {tokens}")

    jobs.claim()
    jobs.run_claimed(refuse)
    thread.join(5)
    assert "no room for 64" in str(outcome[0])


def test_every_rank_of_every_size_has_a_place() -> None:
    for size, replicas in itertools.product((1, 2, 3, 4), (2, 3)):
        config = ElasticConfig(ep_size=size, max_ep_size=size * replicas, attention_tp=size)
        for rank in range(config.max_ep_size):
            assert rank in config.mates_of(rank) and config.mates_of(rank)[config.shard_of(rank)] == rank
        assert config.num_replicas == replicas
