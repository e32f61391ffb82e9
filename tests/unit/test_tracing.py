"""Spans of changes and recoveries, as an OpenTelemetry exporter receives them."""

from __future__ import annotations

import pytest

from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.planner import ScaleTo
from elasticmoe_sglang.tracing import Spans
from tests.helpers.fake_cluster import FakeCluster
from tests.unit.test_metrics import recorded, recovery

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import StatusCode  # noqa: E402

NOW = 1_800_000_000_000_000_000


class Rig:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider, lambda: NOW)

    def finished(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def traced(self, operation: Operation) -> dict[str, ReadableSpan]:
        self.spans.on_operation_ended(operation)
        return self.finished()


def test_a_change_is_one_trace_whose_phases_follow_each_other() -> None:
    operation = recorded(FakeCluster(), ScaleTo(size=4))
    spans = Rig().traced(operation)
    names = [f"elasticmoe.{phase}" for phase in ("planned", "preparing", "committing", "finishing")]
    assert list(spans) == [*names, "elasticmoe.change"]
    root = spans["elasticmoe.change"]
    assert root.parent is None and root.status.status_code is StatusCode.UNSET
    assert root.start_time is not None and root.end_time == NOW
    assert operation.timings.total_ms is not None
    assert (NOW - root.start_time) / 1e6 == pytest.approx(operation.timings.total_ms, abs=0.001)
    began = root.start_time
    for name in names:
        span = spans[name]
        assert span.parent is not None and root.context is not None and span.parent.span_id == root.context.span_id
        assert span.start_time == began and span.end_time is not None
        began = span.end_time
    assert abs(began - NOW) < 10_000, "the phases fill the change"
    attributes = root.attributes or {}
    assert attributes["elasticmoe.operation_id"] == operation.operation_id
    assert (attributes["elasticmoe.old_ep_size"], attributes["elasticmoe.new_ep_size"]) == (2, 4)
    assert attributes["elasticmoe.joining_ranks"] == (2, 3)
    assert attributes["elasticmoe.columns_moved"] == operation.columns_moved
    assert attributes["elasticmoe.max_pause_ms"] == 2.0


def test_a_change_that_was_rolled_back_ends_with_its_error_where_it_stopped() -> None:
    spans = Rig().traced(recorded(FakeCluster(faults={"boot 2": "raise_before"}), ScaleTo(size=3)))
    assert list(spans) == ["elasticmoe.planned", "elasticmoe.preparing", "elasticmoe.change"]
    root = spans["elasticmoe.change"]
    assert root.status.status_code is StatusCode.ERROR and "boot 2" in (root.status.description or "")
    assert (root.attributes or {})["elasticmoe.outcome"] == "rolled_back"


def test_nothing_to_change_has_no_trace() -> None:
    assert Rig().traced(recorded(FakeCluster(), ScaleTo(size=2))) == {}


def test_a_recovery_is_one_span() -> None:
    rig = Rig()
    rig.spans.on_recovered(recovery([1, 2], [0, 3], seconds=0.25, resent=7))
    [span] = rig.finished().values()
    assert span.name == "elasticmoe.recovery" and span.start_time == NOW - 250_000_000 and span.end_time == NOW
    attributes = span.attributes or {}
    assert attributes["elasticmoe.dead_ranks"] == (1, 2) and attributes["elasticmoe.requests_resent"] == 7
