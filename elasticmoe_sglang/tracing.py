"""OpenTelemetry spans of changes and recoveries, for SGLang's tracer provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.coordinator.status import Operation, Phase

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

_NS_PER_MS = 1_000_000


class Spans(Observer):
    """One trace for each change and each recovery, written when it has ended: a span `elasticmoe.change` with a child
    for each phase, or a span `elasticmoe.recovery`. Changes that had nothing to change have none.

    Args:
        provider: None: the process's own, which may be set later.
        clock_ns: Unix time in nanoseconds.
    """

    def __init__(self, provider: TracerProvider | None = None, clock_ns: Callable[[], int] = time.time_ns) -> None:
        from opentelemetry import trace

        self._tracer = trace.get_tracer("elasticmoe", tracer_provider=provider)
        self._clock_ns = clock_ns

    def on_operation_ended(self, operation: Operation) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if not (operation.joining or operation.retiring or operation.moves):
            return
        end = self._clock_ns()
        start = end - _nanoseconds(operation.timings.total_ms)
        span = self._tracer.start_span("elasticmoe.change", start_time=start, attributes=_attributes(operation))
        if operation.phase is not Phase.DONE:
            span.set_status(Status(StatusCode.ERROR, operation.error))
        inside = set_span_in_context(span)
        began = start
        for phase, spent in _phases(operation):
            child = self._tracer.start_span(f"elasticmoe.{phase}", context=inside, start_time=began)
            began += spent
            child.end(began)
        span.end(end)

    def on_recovered(self, recovery: Recovery) -> None:
        end = self._clock_ns()
        span = self._tracer.start_span(
            "elasticmoe.recovery",
            start_time=end - int(recovery.seconds * 1e9),
            attributes={
                "elasticmoe.dead_ranks": recovery.dead,
                "elasticmoe.ranks": recovery.ranks,
                "elasticmoe.epoch": recovery.epoch,
                "elasticmoe.requests_resent": recovery.requests_resent,
            },
        )
        span.end(end)


def _attributes(operation: Operation) -> dict[str, str | int | float | list[int]]:
    attributes: dict[str, str | int | float | list[int]] = {
        "elasticmoe.operation_id": operation.operation_id,
        "elasticmoe.cause": operation.cause.value,
        "elasticmoe.outcome": operation.phase.value,
        "elasticmoe.old_ep_size": operation.old_ep_size,
        "elasticmoe.new_ep_size": operation.new_ep_size,
        "elasticmoe.joining_ranks": operation.joining,
        "elasticmoe.retiring_ranks": operation.retiring,
        "elasticmoe.epoch": operation.epoch,
        "elasticmoe.columns_moved": operation.columns_moved,
        "elasticmoe.bytes_moved": operation.bytes_moved,
        "elasticmoe.requests_moved": operation.moved_requests,
    }
    if operation.max_pause_ms is not None:
        attributes["elasticmoe.max_pause_ms"] = operation.max_pause_ms
    return attributes


def _phases(operation: Operation) -> Iterator[tuple[str, int]]:
    """Phase and nanoseconds of each phase that was reached, in order."""
    timings = operation.timings
    for phase, spent_ms in (
        ("planned", timings.planned_ms),
        ("preparing", timings.preparing_ms),
        ("committing", timings.committing_ms),
        ("finishing", timings.finishing_ms),
    ):
        if spent_ms is not None:
            yield phase, _nanoseconds(spent_ms)


def _nanoseconds(milliseconds: float | None) -> int:
    return int((milliseconds or 0.0) * _NS_PER_MS)
