"""Which of the requests that wait on a rank go to ranks that join."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.worker.requests import ORIGIN, give_up_waiting

pytestmark = pytest.mark.process


def request(
    rid: str, *, prompt: int = 10, tokens: int = 10, begun: int = 0, kv: bool = False, rank: int | None = None
) -> Any:
    req = SimpleNamespace(
        rid=rid,
        output_ids=[1] * begun,
        origin_input_ids=[1] * prompt,
        sampling_params=SimpleNamespace(max_new_tokens=tokens),
        kv=SimpleNamespace(holds_kv=kv, kv_committed_len=0),
        seqlen=prompt + begun,
        finished=lambda: False,
    )
    setattr(req, ORIGIN, SimpleNamespace(routed_dp_rank=rank))
    return req


def scheduler(waiting: list[Any], running: list[Any] | None = None, chunked: Any = None) -> Any:
    return SimpleNamespace(
        waiting_queue=list(waiting),
        running_batch=SimpleNamespace(reqs=running or []),
        last_batch=None,
        chunked_req=chunked,
        grammar_manager=SimpleNamespace(grammar_queue=[]),
    )


def left(found: Any) -> list[str]:
    return [req.rid for req in found.waiting_queue]


def test_they_go_in_turn_so_that_the_first_do_not_all_wait_on_one_rank() -> None:
    here = scheduler([request(str(i)) for i in range(8)], running=[request("r", begun=1)])
    assert give_up_waiting(here, 0.5) == ["0", "2", "4", "6"]
    assert left(here) == ["1", "3", "5", "7"]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_about_that_share_of_all_work_goes(share: float) -> None:
    waiting = [request(str(i), prompt=10 + 37 * i % 400, tokens=5 + i % 7) for i in range(60)]
    work = {req.rid: len(req.origin_input_ids) + req.sampling_params.max_new_tokens for req in waiting}
    given = give_up_waiting(scheduler(waiting), share)
    largest = max(work.values())
    assert abs(sum(work[rid] for rid in given) - share * sum(work.values())) <= largest


def test_what_runs_counts_as_work_that_stays() -> None:
    """All that waits goes to a rank that has nothing yet."""
    here = scheduler([request("a"), request("b")], running=[request(f"r{i}", begun=1, tokens=100) for i in range(8)])
    assert give_up_waiting(here, 0.5) == ["a", "b"] and left(here) == []


def test_what_has_begun_stays_in_its_place() -> None:
    moved = request("moved", begun=3)
    chunked = request("chunked", prompt=500, kv=True)
    here = scheduler([moved, request("a"), request("b", kv=True), request("c")], chunked=chunked)
    assert give_up_waiting(here, 0.5) == ["a", "c"]
    assert left(here) == ["moved", "b"]


def test_what_was_sent_to_this_rank_on_purpose_stays() -> None:
    running = [request("r", begun=1, tokens=1000)]
    here = scheduler([request("a", rank=0), request("b"), request("c", rank=1)], running)
    assert give_up_waiting(here, 0.5) == ["b"] and left(here) == ["a", "c"]


def test_the_only_request_of_an_idle_rank_stays() -> None:
    here = scheduler([request("a")])
    assert give_up_waiting(here, 0.5) == [] and left(here) == ["a"]
