"""What SGLang's flags turn on, and what is noted of its requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.observability import OUTPUT_AT, Observability, note_output, observability
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.observer import Observers
from elasticmoe_sglang.metrics.streams import StreamMeter
from elasticmoe_sglang.metrics.table import TABLE


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.streams = StreamMeter(list, self.clock)
        self.observed = Observability(streams=self.streams, metrics=None, observer=Observers([]))

    def failed(self) -> int:
        return self.streams.take_failed(since=9.0, until=11.0)


def request(
    *, stream: bool = True, abort_sent: bool = False, output_ids: tuple[int, ...] = (), arrived: float = 5.0
) -> Any:
    """As much of SGLang's ReqState as is looked at."""
    return SimpleNamespace(
        obj=SimpleNamespace(stream=stream),
        abort_sent=abort_sent,
        output_ids=list(output_ids),
        time_stats=SimpleNamespace(created_time=arrived),
    )


def abort(status: int | None) -> dict[str, Any]:
    return {"type": "abort", "message": "", "status_code": status, "err_type": None}


def test_without_the_flags_nothing_is_registered_and_nothing_noted() -> None:
    from prometheus_client import REGISTRY

    tokenizer = SimpleNamespace(enable_metrics=False, enable_trace=False)
    observed = observability(tokenizer, ElasticConfig(ep_size=1, max_ep_size=2))
    assert observed.streams is None and observed.metrics is None
    assert {family.name for family in REGISTRY.collect()}.isdisjoint(metric.name for metric in TABLE)
    state = request()
    for known in (None, observed):
        note_output(known, state, abort(500))
    assert not hasattr(state, OUTPUT_AT)


def test_outputs_of_streams_are_timed_and_those_of_others_are_not() -> None:
    rig = Rig()
    state, other = request(), request(stream=False)
    for now in (10.0, 10.5):
        rig.clock.now = now
        note_output(rig.observed, state, None)
        note_output(rig.observed, other, None)
    assert rig.streams.longest_gap(10.0, 10.5) == 0.5
    assert getattr(state, OUTPUT_AT) == 10.5 and not hasattr(other, OUTPUT_AT)


@pytest.mark.parametrize(
    ("state", "finish", "lost"),
    [
        pytest.param(request(), abort(500), 1, id="an error of the server's"),
        pytest.param(request(output_ids=(1,)), abort(503), 1, id="refused after it had output"),
        pytest.param(request(), abort(503), 1, id="refused while it waited since before"),
        pytest.param(request(arrived=10.0), abort(503), 0, id="a new request is refused"),
        pytest.param(request(), abort(400), 0, id="an error of the client's"),
        pytest.param(request(), abort(None), 0, id="asked for by prefix, or for all"),
        pytest.param(request(abort_sent=True), abort(500), 0, id="its client had left"),
        pytest.param(request(), {"type": "length", "length": 8}, 0, id="complete"),
        pytest.param(request(), None, 0, id="it goes on"),
    ],
)
def test_a_request_is_lost_when_the_server_ended_it(state: Any, finish: dict[str, Any] | None, lost: int) -> None:
    rig = Rig()
    note_output(rig.observed, state, finish)
    assert rig.failed() == lost
