"""The controller with a real coordinator over the fake cluster, and its route: acting, shadowing, holding, telling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from elasticmoe_sglang.api.router import build_router, mount
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import HmmUnavailable, OperationInProgress, StaleRequest, UserInputError
from elasticmoe_sglang.planner import ScaleTo
from elasticmoe_sglang.policy.controller import DECISIONS_KEPT, OWN, PolicyController
from elasticmoe_sglang.policy.decision import Action
from elasticmoe_sglang.policy.estimator import Sample
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings
from elasticmoe_sglang.policy.view import PolicyView
from tests.helpers import clock
from tests.helpers.fake_cluster import FakeCluster

SLO = "ttft=1s,itl=500ms,attainment=0.9"
ON = PolicySettings(slo=SLO, autoscale=Autoscale.ON, hold_s=60.0)


class Rig:
    """A controller whose clock and load the test sets; a step is one second."""

    def __init__(self, settings: PolicySettings = ON, *, wait_s: float = 5.0, **cluster: Any) -> None:
        self.cluster = FakeCluster(**cluster)
        self.coordinator: Coordinator = self.cluster.coordinator(prepare_deadline_s=5, commit_deadline_s=5)
        self.meter = RequestMeter()
        self.now = 1000.0
        self.waiting = 0
        self._running = 0
        self._number = 0
        self.policy = PolicyController(
            self.coordinator, settings, max_ep_size=4, sample=self.sample, meter=self.meter,
            clock=lambda: self.now, wait_s=wait_s,
        )  # fmt: skip

    def sample(self) -> Sample | None:
        ranks = len(self.coordinator.view.ranks)
        return Sample(ranks=ranks, running=self._running, waiting=self.waiting, slots=4)

    def serve(self, requests: int, tokens: int = 20) -> None:
        """So many requests come and are answered within the next second."""
        self._running = min(requests, 1)
        for _ in range(requests):
            rid = str(self._number)
            self._number += 1
            self.meter.arrived(self.now + 0.1, rid, 10, True)
            self.meter.output(self.now + 0.2, [rid], [[1]], [1], [None])
            self.meter.output(self.now + 0.6, [rid], [[1] * (tokens - 1)], [tokens], [{"type": "stop"}])

    async def steps(self, seconds: int, requests: int = 2) -> None:
        for _ in range(seconds):
            self.serve(requests)
            self.now += 1.0
            await self.policy.step()
            await self.settle()

    async def settle(self) -> None:
        """A change that was asked for ends, unless something hangs."""
        for _ in range(100):
            if self.coordinator.running is not None:
                await asyncio.sleep(0.001)

    async def ask_for_more(self) -> None:
        """A queue that makes the policy start a change, which has not ended."""
        await self.steps(5)
        self.waiting = 40
        for _ in range(2):
            self.serve(2)
            self.now += 1.0
            await self.policy.step()
        assert self.coordinator.running is not None

    @property
    def size(self) -> int:
        return len(self.coordinator.view.ranks)


def run(main: Coroutine[Any, Any, None]) -> None:
    clock.run(asyncio.wait_for(main, 20))


def test_on_it_grows_under_a_queue_and_shrinks_when_it_is_gone() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.steps(5)
        assert rig.size == 2
        rig.waiting = 40
        await rig.steps(3)
        assert rig.size == 4
        grown = next(decision for decision in rig.policy.view().decisions if decision.action is Action.GROW)
        assert grown.acted and "40 requests wait" in grown.because and grown.inputs is not None
        [operation] = rig.coordinator.operations()
        assert operation.operation_id.startswith("policy-") and operation.phase is Phase.DONE
        rig.waiting = 0
        await rig.steps(80, requests=0)
        assert rig.size == 1
        view = rig.policy.view()
        assert view.decisions_total["grow"] == 1 and view.decisions_total["shrink"] == 2
        assert (view.ranks, view.desired_ranks, view.held_until) == (1, 1, None)

    run(main())


def test_in_shadow_mode_it_decides_and_does_nothing() -> None:
    async def main() -> None:
        rig = Rig(PolicySettings(slo=SLO, autoscale=Autoscale.SHADOW))
        rig.waiting = 40
        await rig.steps(10)
        view = rig.policy.view(limit=3)
        assert rig.size == 2 and rig.coordinator.operations() == []
        assert [decision.action for decision in view.decisions] == [Action.GROW] * 3
        assert view.desired_ranks == 4 and not any(decision.acted for decision in view.decisions)
        assert view.queue_length == 40 and view.state == view.decisions[0].because

    run(main())


def test_off_it_measures_only() -> None:
    async def main() -> None:
        rig = Rig(PolicySettings())
        await rig.steps(20)
        view = rig.policy.view()
        assert (view.state, view.decisions, view.desired_ranks) == ("off", [], None)
        assert view.arrivals_per_s == pytest.approx(2.0, rel=0.2) and view.attainment is None
        assert view.ttft.p50 == pytest.approx(0.1, rel=0.1)
        assert view.tokens_per_s_per_rank == pytest.approx(view.tokens_per_s / 2) != 0

    run(main())


def test_a_manual_request_wins_and_holds_the_policy() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.steps(5)
        operation = await rig.policy.submit(ScaleTo(size=3))
        await rig.coordinator.wait(operation.operation_id)
        rig.waiting = 40
        await rig.steps(55)
        assert rig.size == 3
        view = rig.policy.view()
        assert "a manual request holds the policy" in view.state and view.held_until is not None
        await rig.steps(10)
        assert rig.size == 4

    run(main())


def test_a_manual_request_for_the_generation_before_the_policys_own_change_is_refused() -> None:
    """It waits for that change, which raises the generation."""

    async def main() -> None:
        rig = Rig()
        await rig.steps(5)
        before = rig.coordinator.view.epoch
        own = await rig.coordinator.submit(ScaleTo(size=3), f"{OWN}1")
        assert not own.phase.ended
        with pytest.raises(StaleRequest, match=f"generation {before}"):
            await rig.policy.submit(ScaleTo(size=4), expected_epoch=before)
        assert rig.size == 3
        operation = await rig.policy.submit(ScaleTo(size=4), "again", expected_epoch=rig.coordinator.view.epoch)
        await rig.coordinator.wait(operation.operation_id)
        assert (await rig.policy.submit(ScaleTo(size=4), "again", expected_epoch=before)).phase.ended
        assert rig.size == 4

    run(main())


def test_turning_it_on_ends_a_hold_also_of_a_change_that_has_just_ended() -> None:
    async def main() -> None:
        rig = Rig(PolicySettings(slo=SLO, autoscale=Autoscale.SHADOW))
        await rig.steps(5)
        operation = await rig.policy.submit(ScaleTo(size=3))
        await rig.coordinator.wait(operation.operation_id)
        assert rig.policy.view().held_until is not None
        rig.policy.set({"autoscale": "on"})
        rig.waiting = 40
        await rig.steps(20)
        assert rig.size == 4

    run(main())


def test_a_request_that_did_not_come_through_the_policy_holds_it_too() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.steps(5)
        await rig.coordinator.wait((await rig.coordinator.submit(ScaleTo(size=3))).operation_id)
        rig.waiting = 40
        await rig.steps(20)
        assert rig.size == 3 and "a manual request" in rig.policy.view().state

    run(main())


def test_a_manual_request_waits_for_the_policy_s_own_change() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.ask_for_more()
        operation = await rig.policy.submit(ScaleTo(size=1), "mine")
        assert (operation.old_ep_size, operation.new_ep_size) == (4, 1)
        await rig.coordinator.wait("mine")
        await rig.steps(20)
        assert rig.size == 1

    run(main())


def test_a_manual_request_does_not_wait_for_ever() -> None:
    async def main() -> None:
        rig = Rig(wait_s=0.05, faults={"boot 2": "hang"})
        await rig.ask_for_more()
        with pytest.raises(OperationInProgress, match="did not end within"):
            await rig.policy.submit(ScaleTo(size=1))
        await rig.coordinator.close()

    run(main())


def test_nothing_is_decided_while_the_memory_is_not_whole() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.steps(5)
        await rig.coordinator.hold_memory(HmmUnavailable("no HMM answers"))
        rig.waiting = 40
        await rig.steps(5)
        assert rig.size == 2 and "the HMM does not answer" in rig.policy.view().state
        rig.coordinator.release_memory()
        await rig.steps(2)
        assert rig.size == 4

    run(main())


def test_a_change_that_fails_is_not_repeated_at_once() -> None:
    async def main() -> None:
        rig = Rig(faults={"boot 2": "raise_before"})
        await rig.steps(5)
        rig.waiting = 40
        await rig.steps(12)
        for operation in rig.coordinator.operations():
            assert (await rig.coordinator.wait(operation.operation_id)).phase is Phase.ROLLED_BACK
        assert len(rig.coordinator.operations()) == 1 and "was not possible" in rig.policy.view().state
        await rig.steps(8)
        assert len(rig.coordinator.operations()) == 2

    run(main())


def test_a_refusal_is_told() -> None:
    async def main() -> None:
        rig = Rig(hmm_answers=False)
        await rig.steps(5)
        rig.waiting = 40
        await rig.steps(2)
        refused = [d for d in rig.policy.view().decisions if d.action is Action.GROW]
        assert len(refused) == 1 and "refused: nobody answers" in refused[0].because and not refused[0].acted

    run(main())


def test_it_remembers_the_last_thousand() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.steps(DECISIONS_KEPT + 50, requests=0)
        view = rig.policy.view(limit=5000)
        assert len(view.decisions) == DECISIONS_KEPT
        assert sum(view.decisions_total.values()) == DECISIONS_KEPT + 50
        assert msgspec.json.decode(msgspec.json.encode(view), type=PolicyView) == view

    run(main())


def test_a_second_that_fails_is_told_and_not_the_last() -> None:
    async def main() -> None:
        rig = Rig()
        broken = rig.sample
        rig.policy._sampler = lambda: 1 // 0  # type: ignore[assignment]
        loop = asyncio.create_task(rig.policy.run())
        await asyncio.sleep(2.5)
        assert rig.policy.view().state.startswith("the policy cannot decide: ZeroDivisionError")
        rig.policy._sampler = broken
        rig.now += 1.0
        await asyncio.sleep(1.5)
        assert "cannot" not in rig.policy.view().state
        loop.cancel()

    run(main())


def test_settings_change_at_run_time() -> None:
    async def main() -> None:
        rig = Rig(PolicySettings())
        rig.waiting = 40
        await rig.steps(5)
        with pytest.raises(UserInputError, match="there is no SLO"):
            rig.policy.set({"autoscale": "on"})
        with pytest.raises(UserInputError, match="larger than the maximum of 4"):
            rig.policy.set({"min_ep_size": 5})
        view = rig.policy.set({"autoscale": "on", "slo": SLO, "min_ep_size": 3})
        assert view.mode is Autoscale.ON and view.settings.slo == SLO
        rig.waiting = 0
        await rig.steps(2)
        assert rig.size == 3

    run(main())


# -- the route --------------------------------------------------------------------------------------------------------


def client(rig: Rig) -> TestClient:
    app = FastAPI()
    mount(app, build_router(rig.coordinator, policy=rig.policy))
    return TestClient(app)


def test_the_policy_over_http() -> None:
    with client(Rig()) as http:
        shown = msgspec.json.decode(http.get("/elastic_ep/policy").content, type=PolicyView)
        assert (shown.mode, shown.settings, shown.max_ep_size) == (Autoscale.ON, ON, 4)
        answer = http.post("/elastic_ep/policy", json={"autoscale": "shadow", "min_ep_size": 2})
        assert answer.status_code == 200 and answer.json()["settings"]["min_ep_size"] == 2
        assert http.get("/elastic_ep/policy?limit=0").json()["mode"] == "shadow"
        scaled = http.post("/scale_elastic_ep", json={"new_ep_size": 3, "wait": True})
        assert scaled.status_code == 200 and scaled.json()["phase"] == "done"
        assert http.get("/elastic_ep/policy").json()["held_until"] is not None


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"speed": 1}', b'{"autoscale": "maybe"}', b'{"slo": null}', b"\xff"])
def test_impossible_settings_answer_400_and_change_nothing(body: bytes) -> None:
    with client(Rig()) as http:
        answer = http.post("/elastic_ep/policy", content=body)
        assert answer.status_code == 400 and answer.json().keys() == {"error"}
        assert http.get("/elastic_ep/policy").json()["settings"] == json.loads(msgspec.json.encode(ON))


@pytest.mark.parametrize("limit", ["-1", "x", "1001", "1e3", "", "9" * 400])
def test_an_impossible_limit_answers_400(limit: str) -> None:
    with client(Rig()) as http:
        assert "limit must be" in http.get("/elastic_ep/policy", params={"limit": limit}).json()["error"]
