"""Metrics and traces as SGLang's own flags ask for them, and what SGLang's tokenizer sees of its streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.observer import Observer
from elasticmoe_sglang.metrics.streams import StreamMeter

OUTPUT_AT = "elasticmoe_output_at"
"""Attribute of SGLang's ReqState: when a streamed request had its last output."""


def stream_meter(tokenizer_manager: Any) -> StreamMeter | None:
    """The meter of this tokenizer's streams; None without --enable-metrics."""
    if not tokenizer_manager.enable_metrics:
        return None

    def open_streams() -> list[float]:
        # Copying is atomic in CPython: another thread asks.
        states = list(tokenizer_manager.rid_to_state.values())
        return [at for state in states if (at := getattr(state, OUTPUT_AT, None)) is not None]

    return StreamMeter(open_streams)


def observers(tokenizer_manager: Any, config: ElasticConfig, streams: StreamMeter | None) -> list[Observer]:
    """Those that --enable-metrics and --enable-trace ask for."""
    found: list[Observer] = []
    if streams is not None:
        from elasticmoe_sglang.metrics.exporter import Metrics

        model_name = tokenizer_manager.served_model_name
        found.append(Metrics(model_name=model_name, ep_size=config.ep_size, streams=streams))
    if tokenizer_manager.enable_trace:
        from elasticmoe_sglang.tracing import Spans

        found.append(Spans())
    return found


def note_output(streams: StreamMeter | None, state: Any, finish: Mapping[str, Any] | None) -> None:
    """A request had an output.

    Args:
        state: SGLang's ReqState. finish: its finish reason; None: it goes on.
    """
    if streams is None:
        return
    if finish is not None and finish["type"] == "abort" and not state.abort_sent:
        status = finish.get("status_code")
        if status is not None and status >= 500:  # without a status somebody asked for it
            arrived = state.time_stats.created_time
            streams.failed(arrived, refused=status == 503 and not state.output_ids)
    if getattr(state.obj, "stream", False):
        setattr(state, OUTPUT_AT, streams.output(getattr(state, OUTPUT_AT, None)))
