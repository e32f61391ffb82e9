"""What the hooks in SGLang's tokenizer hand to the policy. The real objects come in tests/e2e/test_policy.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches import measure
from elasticmoe_sglang.policy.estimator import Estimator, Sample
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import PolicySettings, parse_slo

SLO = "ttft=1s,itl=50ms"


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[RequestMeter]:
    made = RequestMeter()
    monkeypatch.setattr(measure, "METER", made)
    yield made


def tokenizer(rids: dict[str, float], loads: dict[int, SimpleNamespace] | None = None) -> Any:
    states = {rid: SimpleNamespace(time_stats=SimpleNamespace(created_time=at)) for rid, at in rids.items()}
    reader = SimpleNamespace(read=(loads or {}).get)
    return SimpleNamespace(rid_to_state=states, load_snapshot_reader=reader)


def request(rid: str, **fields: Any) -> Any:
    return SimpleNamespace(rid=rid, input_ids=[1, 2, 3], sampling_params=object(), stream=True, **fields)


def batch(rids: list[str], lengths: list[int], reasons: list[Any], ids: list[list[int]] | None) -> Any:
    return SimpleNamespace(rids=rids, completion_tokens=lengths, finished_reasons=reasons, output_ids=ids)


def test_a_request_from_its_arrival_to_its_end(meter: RequestMeter) -> None:
    now = measure.time.perf_counter()
    here = tokenizer({"a": now - 0.5, "gone": now, "HEALTH_CHECK_1": now})
    measure.arrived(here, request("a"))
    measure.arrived(here, request("unknown"))
    measure.arrived(here, request("HEALTH_CHECK_1"))
    measure.arrived(here, SimpleNamespace(rid="gone", input_ids=[1]))  # an embedding: nothing is generated
    measure.output(SimpleNamespace(rids=["gone"], embeddings=[[0.1]], finished_reasons=[{"type": "stop"}]))
    measure.output(batch(["HEALTH_CHECK_1"], [1], [{"type": "length"}], [[5]]))
    measure.output(batch(["a"], [1], [None], [[5]]))
    measure.output(batch(["a"], [3], [{"type": "length"}], [[6, 7]]))
    made = Estimator(parse_slo(SLO))
    made.sampled(now + 1.0, Sample(ranks=1, running=0, waiting=0))
    meter.drain(now + 1.0, made)
    found = made.snapshot(now + 4.0, PolicySettings(slo=SLO))
    assert found is not None
    assert (found.output_tokens, found.prompt_tokens, found.attainment) == (3.0, 3.0, 1.0)
    assert made.latencies(now + 4.0)[0].p50 == pytest.approx(0.5, rel=0.1)


def test_an_abort_without_output(meter: RequestMeter) -> None:
    now = measure.time.perf_counter()
    measure.arrived(tokenizer({"a": now}), request("a"))
    measure.aborted(SimpleNamespace(rid="a"))
    made = Estimator(parse_slo(SLO))
    made.sampled(now, Sample(ranks=1, running=0, waiting=1))
    meter.drain(now + 1.0, made)
    found = made.snapshot(now + 5.0, PolicySettings(slo=SLO))
    assert found is not None and found.first_late == 0


def load(running: int, waiting: int, used: int) -> SimpleNamespace:
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=waiting, num_used_tokens=used, max_total_num_tokens=100,
        max_running_requests=8,
    )  # fmt: skip


def test_the_sample_is_of_the_active_ranks() -> None:
    loads = {0: load(3, 1, 50), 1: load(9, 9, 99), 2: load(2, 0, 10)}
    active = [0, 2]
    sample = measure.sample_of(tokenizer({}, loads), lambda: active)
    assert sample() == Sample(ranks=2, running=5, waiting=1, kv_use=0.3, slots=8)
    active.append(3)  # which has not published anything yet
    assert sample() is None


@pytest.mark.process
def test_health_checks_are_named_as_sglang_names_them() -> None:
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    assert measure.HEALTH_CHECK == HEALTH_CHECK_RID_PREFIX
