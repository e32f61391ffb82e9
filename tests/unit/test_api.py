"""The HTTP side against the fake cluster: every status, strict types, and no body that ends in a 500."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.api.router import build_router, mount
from elasticmoe_sglang.api.types import (
    MAX_BODY_BYTES,
    ErrorBody,
    ScaleAnswer,
    ScaleRequest,
    ScalingState,
    ServerStatus,
    VllmAnswer,
    parse_scale_request,
    target_of,
)
from elasticmoe_sglang.coordinator.status import Operation, Phase
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import RestoreRanks, RetireRanks, ScaleTo
from tests.helpers.fake_api import serving
from tests.helpers.fake_cluster import COLUMN, FakeCluster


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving(FakeCluster()) as client:
        yield client


def scale(client: TestClient, **body: Any) -> ScaleAnswer:
    answer = client.post("/scale_elastic_ep", json=body)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ScaleAnswer)


def refusal(client: TestClient, body: Any, status: int) -> str:
    answer = client.post("/scale_elastic_ep", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() - {"instance_id", "topology_generation", "operation_id"} == {"error"}
    return str(answer.json()["error"])


def test_waiting_for_a_size(client: TestClient) -> None:
    operation = scale(client, new_ep_size=3, wait=True)
    assert operation.phase is Phase.DONE
    assert (operation.old_ep_size, operation.new_ep_size, operation.target) == (2, 3, {"new_ep_size": 3})


def test_retire_ranks(client: TestClient) -> None:
    scale(client, new_ep_size=4, wait=True)
    operation = scale(client, retire_ranks=[2, 1], wait=True)
    assert operation.ranks_after == [0, 3] and operation.target == {"retire_ranks": [1, 2]}


def test_a_repeated_request_returns_the_same_operation(client: TestClient) -> None:
    first = scale(client, new_ep_size=4, operation_id="up")
    assert first.phase is Phase.PREPARING and (first.pending_ep_size, first.scale_phase) == (4, "waiting_for_cohort")
    again = scale(client, new_ep_size=4, operation_id="up", wait=True)
    assert again.phase is Phase.DONE and (again.pending_ep_size, again.scale_phase) == (None, "serving_expanded")
    assert again.created_at == first.created_at
    assert scale(client, new_ep_size=4, operation_id="up") == again
    shown = client.get("/elastic_ep/operations/up")
    assert shown.status_code == 200 and msgspec.json.decode(shown.content, type=Operation).timings == again.timings
    assert "another target" in refusal(client, {"new_ep_size": 3, "operation_id": "up"}, 409)


def test_the_same_size_answers_200_at_once(client: TestClient) -> None:
    answer = client.post("/scale_elastic_ep", json={"new_ep_size": 2})
    assert answer.status_code == 200 and answer.json()["message"] == "Nothing had to change."
    assert answer.json()["serving_epoch"] == answer.json()["epoch"]


def test_waiting_for_a_change_that_is_rolled_back_shows_its_phase_and_error() -> None:
    with serving(FakeCluster(faults={"boot 2": "raise_after"})) as client:
        operation = scale(client, new_ep_size=3, wait=True)
        assert operation.phase is Phase.ROLLED_BACK and "boot 2" in str(operation.error)
        assert (operation.epoch, operation.serving_epoch) == (1, 0)
        state = msgspec.json.decode(client.get("/is_scaling_elastic_ep").content, type=ScalingState)
        assert state.scale_phase == "failed" and state.last_error == operation.error


def test_409_while_another_change_runs() -> None:
    with serving(FakeCluster(faults={"boot 2": "hang"})) as client:
        operation_id = scale(client, new_ep_size=3).operation_id
        assert "one change runs at a time" in refusal(client, {"new_ep_size": 1}, 409)
        assert client.post("/scale_elastic_ep", json={"new_ep_size": 1}).json()["operation_id"] == operation_id


def test_400_for_a_size_that_does_not_fit_the_budgets() -> None:
    with serving(FakeCluster(budget=4 * COLUMN + 5000)) as client:
        assert "device 0 needs 3.91 KiB more and has 0 B free" in refusal(client, {"new_ep_size": 1}, 400)


def test_503_without_an_hmm_while_the_status_still_answers() -> None:
    with serving(FakeCluster(hmm_answers=False)) as client:
        assert "Serving goes on" in refusal(client, {"new_ep_size": 3}, 503)
        status = client.get("/elastic_ep/status")
        assert status.status_code == 200 and status.json()["memory"]["available"] is False


def test_404_for_an_unknown_operation(client: TestClient) -> None:
    answer = client.get("/elastic_ep/operations/nobody")
    assert answer.status_code == 404 and "nobody" in answer.json()["error"]


def test_status_and_list_of_operations(client: TestClient) -> None:
    scale(client, new_ep_size=4, wait=True, operation_id="a")
    scale(client, new_ep_size=1, wait=True, operation_id="b")
    status = msgspec.json.decode(client.get("/elastic_ep/status").content, type=ServerStatus)
    assert status.membership == [0] and status.epoch == 2 and set(status.placement) == {0}
    listed = client.get("/elastic_ep/operations").json()["operations"]
    assert [operation["operation_id"] for operation in listed] == ["b", "a"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"new_ep_size": 0}, "new_ep_size must be a positive integer, not 0"),
        ({"new_ep_size": -1}, "positive integer"),
        ({"new_ep_size": "4"}, 'positive integer, not "4"'),
        ({"new_ep_size": True}, "positive integer, not true"),
        ({"new_ep_size": 4.0}, "positive integer, not 4.0"),
        ({"new_ep_size": None}, "positive integer, not null"),
        ({"new_ep_size": [4]}, "positive integer"),
        ({"new_ep_size": 5}, "ask for a size from 1 to 4"),
        ({"new_ep_size": 10**30}, "ask for a size from 1 to 4"),
        ({"new_data_parallel_size": "2"}, "new_data_parallel_size must be a positive integer"),
        ({"new_data_parallel_size": 2, "drain_timeout": 0}, "drain_timeout must be a positive integer, not 0"),
        ({"new_data_parallel_size": 2, "drain_timeout": "x"}, "drain_timeout must be a positive integer"),
        ({"new_ep_size": 2, "drain_timeout": 5}, "goes with new_data_parallel_size"),
        ({"new_ep_size": 4, "new_data_parallel_size": 4}, "given together"),
        ({"new_ep_size": 4, "retire_ranks": [1]}, "given together"),
        ({"retire_ranks": []}, "Ranks that can be retired now: 1"),
        ({"retire_ranks": [0]}, "rank 0 cannot be retired"),
        ({"retire_ranks": [3]}, "rank 3 is not active"),
        ({"retire_ranks": [9]}, "rank 9 is not active"),
        ({"retire_ranks": [-1]}, "rank -1 is not active"),
        ({"retire_ranks": [1, 1]}, "is repeated"),
        ({"retire_ranks": 1}, "retire_ranks must be a list of rank numbers like [1, 3] without rank 0, not 1"),
        ({"retire_ranks": ["1"]}, 'list of rank numbers like [1, 3] without rank 0, not ["1"]'),
        ({"retire_ranks": [True]}, "list of rank numbers"),
        ({"retire_ranks": [1.0]}, "list of rank numbers"),
        ({"retire_ranks": None}, "list of rank numbers"),
        ({"new_ep_size": 4, "wait": 1}, "wait must be true or false"),
        ({"new_ep_size": 4, "wait": None}, "wait must be true or false"),
        ({"new_ep_size": 4, "operation_id": 7}, "operation_id must be a string"),
        ({"new_ep_size": 4, "operation_id": ""}, "letters, digits"),
        ({"new_ep_size": 4, "operation_id": "a" * 200}, "letters, digits"),
        ({"new_ep_size": 4, "expected_instance_id": 7}, "expected_instance_id must be a string"),
        ({"new_ep_size": 4, "expected_generation": -1}, "expected_generation must be a whole number of at least 0"),
        ({"restore_ranks": [1]}, "rank 1 is not inactive. Ranks that can be restored now: 2, 3"),
        ({"restore_ranks": [2, 2]}, "is repeated"),
        ({"restore_ranks": []}, "Ranks that can be restored now: 2, 3"),
        ({"restore_ranks": [4]}, "rank 4 is not inactive"),
        ({"restore_ranks": [2], "retire_ranks": [1]}, "given together"),
        ({"new_ep_sise": 4}, "neither a size nor ranks"),
        ({}, "neither a size nor ranks to retire or to restore"),
        ([], "JSON object, not []"),
        (4, "JSON object, not 4"),
        ("new_ep_size", "JSON object"),
    ],
)
def test_400_says_what_is_allowed(client: TestClient, body: Any, sentence: str) -> None:
    assert sentence in refusal(client, body, 400)
    assert client.get("/elastic_ep/operations").json() == {"operations": []}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"null",
        b'{"new_ep_size": 4',
        b'{"new_ep_size": NaN}',
        b'{"new_ep_size": 1e999}',
        b'{"new_ep_size": ' + b"1" * 5000 + b"}",
        b"\xff\xfe",
        b'{"operation_id": "\\ud800", "new_ep_size": 2}',
        b"[" * 10_000,
        b'{"new_ep_size": 4}' + b" " * MAX_BODY_BYTES,
    ],
    ids=repr,
)
def test_400_for_what_is_no_body(client: TestClient, body: bytes) -> None:
    answer = client.post("/scale_elastic_ep", content=body)
    assert answer.status_code == 400 and '{"new_ep_size": n}' in answer.json()["error"]


def test_our_routes_win_and_run_their_dependencies() -> None:
    calls = []

    async def note() -> None:
        calls.append(True)

    app = FastAPI()

    @app.get("/elastic_ep/status")
    async def upstream() -> str:
        return "upstream"

    mount(app, build_router(FakeCluster().coordinator(), dependencies=[Depends(note)]))
    with TestClient(app) as client:
        assert client.get("/elastic_ep/status").json()["membership"] == [0, 1]
        assert client.get("/openapi.json").status_code == 200
    assert calls == [True]


def test_a_coordinator_in_the_loop_of_another_thread() -> None:
    threads = set()

    class Cluster(FakeCluster):
        async def begin(self, operation_id: str) -> str:
            threads.add(threading.get_ident())
            return await super().begin(operation_id)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        app = FastAPI()
        mount(app, build_router(Cluster().coordinator(), loop=loop))
        with TestClient(app) as client:
            assert scale(client, new_ep_size=3, wait=True).phase is Phase.DONE
            assert client.get("/elastic_ep/status").json()["membership"] == [0, 1, 2]
            assert "from 1 to 4" in refusal(client, {"new_ep_size": 5}, 400)
        assert threads == {thread.ident}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_requests_that_mean_the_same_are_equal_targets() -> None:
    def target(body: Any) -> object:
        return target_of(parse_scale_request(json.dumps(body).encode())[0])

    assert target({"new_ep_size": 3}) == target({"new_data_parallel_size": 3}) == ScaleTo(size=3)
    assert target({"restore_ranks": [3, 2]}) == target({"restore_ranks": [2, 3]}) == RestoreRanks(ranks=(2, 3))
    assert target({"retire_ranks": [2, 1]}) == target({"retire_ranks": [1, 2]}) == RetireRanks(ranks=(1, 2))


KEYS = [*ScaleRequest.__struct_fields__, "other"]
scalars = st.none() | st.booleans() | st.integers() | st.integers(-2, 6) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars | st.lists(st.integers(-2, 6), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
near_requests = st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
bodies = st.one_of(
    st.binary(max_size=200),
    values.map(lambda value: json.dumps(value).encode()),
    near_requests.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda body, cut: json.dumps(body).encode()[:cut], near_requests, st.integers(0, 40)),
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[TestClient]:
    with serving(FakeCluster()) as client:
        yield client


@pytest.mark.process
@given(body=bodies)
@settings(max_examples=400, deadline=None)
def test_no_body_ends_in_a_500(fuzzed: TestClient, body: bytes) -> None:
    answer = fuzzed.post("/scale_elastic_ep", content=body)
    assert answer.status_code in (200, 400, 409)
    if answer.status_code == 200:
        assert set(answer.json()) in (set(ScaleAnswer.__struct_fields__), set(VllmAnswer.__struct_fields__))
    else:
        assert "error" in answer.json() and set(answer.json()) <= set(ErrorBody.__struct_fields__)


@pytest.mark.process
@given(body=bodies)
@settings(max_examples=400, deadline=None)
def test_the_parser_raises_one_kind_of_error(body: bytes) -> None:
    try:
        request, _ = parse_scale_request(body)
    except UserInputError as error:
        assert len(str(error)) < 400
        return
    target_of(request)


@pytest.mark.process
@given(path=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_operation_name_ends_in_a_500(fuzzed: TestClient, path: str) -> None:
    from urllib.parse import quote

    answer = fuzzed.get(f"/elastic_ep/operations/{quote(path, safe='', errors='replace')}")
    assert answer.status_code in (200, 404)
