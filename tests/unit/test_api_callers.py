"""What others' clients find at our routes: SGLang's, vLLM's, and orchestrators'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from elasticmoe_sglang.api.elastic_ep import safe_to_terminate
from elasticmoe_sglang.coordinator.status import RankInfo, RankState
from tests.helpers.fake_api import serving
from tests.helpers.fake_cluster import FakeCluster

pytestmark = pytest.mark.process

INSTANCE = "server-7"


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving(FakeCluster(), INSTANCE) as client:
        yield client


def post(client: TestClient, status: int, **body: Any) -> dict[str, Any]:
    answer = client.post("/scale_elastic_ep", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


# ---- SGLang ----


def sglang_state(client: TestClient) -> dict[str, Any]:
    answer = client.get("/is_scaling_elastic_ep")
    assert answer.status_code == 200
    names = ("is_scaling_elastic_ep", "effective_ep_size", "pending_ep_size", "scale_phase", "last_error")
    return {name: answer.json()[name] for name in names}


IDLE = {
    "is_scaling_elastic_ep": False,
    "effective_ep_size": 2,
    "pending_ep_size": None,
    "scale_phase": "idle",
    "last_error": None,
}


def test_sglangs_request_is_accepted_with_200_before_anything_has_happened() -> None:
    with serving(FakeCluster(faults={"boot 2": "hang"}), INSTANCE) as client:
        answer = post(client, 200, new_ep_size=3)
        assert (answer["old_ep_size"], answer["new_ep_size"]) == (2, 3) and answer["message"]
        assert sglang_state(client) == IDLE | {
            "is_scaling_elastic_ep": True,
            "pending_ep_size": 3,
            "scale_phase": "waiting_for_cohort",
        }


def test_sglangs_state_names_how_the_latest_change_ended(client: TestClient) -> None:
    assert sglang_state(client) == IDLE
    post(client, 200, new_ep_size=4, wait=True)
    assert sglang_state(client) == IDLE | {"effective_ep_size": 4, "scale_phase": "serving_expanded"}
    post(client, 200, new_ep_size=1, wait=True)
    assert sglang_state(client) == IDLE | {"effective_ep_size": 1, "scale_phase": "serving_shrunk"}


def test_sglangs_state_after_a_failure() -> None:
    with serving(FakeCluster(faults={"boot 2": "raise_after"}), INSTANCE) as client:
        error = post(client, 200, new_ep_size=3, wait=True)["error"]
        assert "boot 2" in error
        assert sglang_state(client) == IDLE | {"scale_phase": "failed", "last_error": error}


def test_unknown_fields_are_ignored_and_named(client: TestClient) -> None:
    answer = post(client, 200, new_ep_size=3, wait=True, pause_children=True, expected_joining_member_ids=["pod-5"])
    assert answer["phase"] == "done"
    assert answer["warnings"] == [
        'the field "pause_children" is unknown and was ignored',
        'the field "expected_joining_member_ids" is unknown and was ignored',
    ]
    assert post(client, 200, new_ep_size=3)["warnings"] == []


# ---- vLLM ----


def vllm_state(client: TestClient) -> dict[str, Any]:
    answer = client.post("/is_scaling_elastic_ep")
    assert answer.status_code == 200
    names = ("is_scaling_elastic_ep", "phase", "epoch", "error", "requested_data_parallel_size")
    return {name: answer.json()[name] for name in names}


VLLM_IDLE = {
    "is_scaling_elastic_ep": False,
    "phase": "idle",
    "epoch": 0,
    "error": None,
    "requested_data_parallel_size": None,
}


@pytest.mark.parametrize("drain_timeout", [{}, {"drain_timeout": 120}])
def test_vllms_request_is_answered_when_the_size_is_reached(client: TestClient, drain_timeout: dict[str, int]) -> None:
    assert vllm_state(client) == VLLM_IDLE
    answer = post(client, 200, new_data_parallel_size=4, **drain_timeout, unheard_of=1)
    assert answer["message"] == "Scaled to 4 data parallel engines"
    assert answer["warnings"] == ['the field "unheard_of" is unknown and was ignored']
    assert (answer["phase"], answer["effective_data_parallel_size"], answer["epoch"]) == ("completed", 4, 1)
    assert client.get("/elastic_ep/status").json()["membership"] == [0, 1, 2, 3]
    assert vllm_state(client) == VLLM_IDLE | {"phase": "completed", "epoch": 1, "requested_data_parallel_size": 4}


def test_vllms_request_is_answered_with_408_when_its_time_is_over_and_the_change_goes_on() -> None:
    with serving(FakeCluster(faults={"boot 2": "hang"}), INSTANCE) as client:
        answer = post(client, 408, new_data_parallel_size=3, drain_timeout=1)
        assert "still preparing after 1 seconds and goes on" in answer["error"]
        assert f"/elastic_ep/operations/{answer['operation_id']} tells" in answer["error"]
        assert client.get(f"/elastic_ep/operations/{answer['operation_id']}").json()["phase"] == "preparing"
        assert vllm_state(client) == VLLM_IDLE | {
            "is_scaling_elastic_ep": True,
            "phase": "preparing",
            "requested_data_parallel_size": 3,
        }


@pytest.mark.parametrize(
    ("fault", "sentence"), [("boot 2", "was rolled back: .*boot 2"), ("grow_kv", "failed: epoch 1 serves, but .*grow")]
)
def test_vllms_request_is_answered_with_500_and_the_reason(fault: str, sentence: str) -> None:
    with serving(FakeCluster(faults={fault: "raise_after"}), INSTANCE) as client:
        answer = post(client, 500, new_data_parallel_size=3)
        assert re.search(sentence, answer["error"]), answer["error"]
        assert vllm_state(client)["phase"] == "failed"
        assert vllm_state(client)["error"] in answer["error"]


def test_vllms_request_while_another_runs() -> None:
    with serving(FakeCluster(faults={"boot 2": "hang"}), INSTANCE) as client:
        running = post(client, 200, new_ep_size=3)["operation_id"]
        assert post(client, 409, new_data_parallel_size=1)["operation_id"] == running


@pytest.mark.parametrize("value", [0, -1, "2", 2.0, True, None, [2]])
def test_vllms_request_with_a_wrong_size(client: TestClient, value: object) -> None:
    answer = post(client, 400, new_data_parallel_size=value)
    assert "new_data_parallel_size must be a positive integer" in answer["error"]


# ---- orchestrators ----


def test_a_request_for_another_instance_is_refused(client: TestClient) -> None:
    status = client.get("/elastic_ep/status").json()
    assert (status["instance_id"], status["topology_generation"]) == (INSTANCE, 0)
    refused = post(client, 409, new_ep_size=3, expected_instance_id="server-6")
    assert "'server-6'" in refused["error"] and refused["instance_id"] == INSTANCE
    assert post(client, 200, new_ep_size=3, expected_instance_id=INSTANCE)["instance_id"] == INSTANCE


def test_a_request_for_another_generation_is_refused(client: TestClient) -> None:
    assert post(client, 200, new_ep_size=3, expected_generation=0, wait=True)["topology_generation"] == 1
    refused = post(client, 409, new_ep_size=4, expected_generation=0)
    assert "generation 0, the current one is 1" in refused["error"] and refused["topology_generation"] == 1
    assert post(client, 200, new_ep_size=4, expected_generation=1, wait=True)["topology_generation"] == 2


def test_a_lost_answer_is_asked_for_again_with_the_generation_of_the_first_time(client: TestClient) -> None:
    body = {"new_ep_size": 3, "expected_generation": 0, "operation_id": "resize-42", "wait": True}
    first = post(client, 200, **body)
    assert post(client, 200, **body) == first and first["topology_generation"] == 1
    # A restarted server does not know the operation, and must not start it again.
    post(client, 409, **body, expected_instance_id="server-6")


def test_null_is_no_identity(client: TestClient) -> None:
    answer = post(client, 200, new_ep_size=3, operation_id=None, expected_instance_id=None, expected_generation=None)
    assert answer["warnings"] == [] and answer["operation_id"]


def test_chosen_victims_leave_and_come_back(client: TestClient) -> None:
    post(client, 200, new_ep_size=4, wait=True)
    degraded = post(client, 200, retire_ranks=[2], wait=True)
    assert (degraded["retiring"], degraded["ranks_after"]) == ([2], [0, 1, 3])
    status = client.get("/elastic_ep/status").json()
    assert status["safe_to_terminate_ranks"] == [2]
    assert [rank["device"] for rank in status["ranks"]] == [0, 1, 2, 3]
    restored = post(client, 200, restore_ranks=[2], wait=True)
    assert (restored["joining"], restored["ranks_after"]) == ([2], [0, 1, 2, 3])
    assert restored["target"] == {"restore_ranks": [2]}
    assert client.get("/is_scaling_elastic_ep").json()["safe_to_terminate_ranks"] == []


def test_a_rank_of_a_change_that_runs_is_not_safe_to_terminate() -> None:
    with serving(FakeCluster(faults={"boot 3": "hang"}), INSTANCE) as client:
        assert client.get("/is_scaling_elastic_ep").json()["safe_to_terminate_ranks"] == [2, 3]
        post(client, 200, restore_ranks=[3])
        state = client.get("/is_scaling_elastic_ep").json()
        assert (state["safe_to_terminate_ranks"], state["active_ranks"]) == ([2], [0, 1])


@pytest.mark.parametrize("state", RankState)
def test_only_ranks_at_rest_are_safe_to_terminate(state: RankState) -> None:
    rank = RankInfo(rank=3, state=state, device=3)
    at_rest = state in (RankState.HOT, RankState.STANDBY, RankState.STARTING, RankState.INACTIVE)
    assert safe_to_terminate([rank], []) == ([3] if at_rest else [])
    assert safe_to_terminate([rank], [3]) == []
