"""Metrics and traces as SGLang's own flags ask for them, and what SGLang's tokenizer sees of its streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.observer import Observer, Observers
from elasticmoe_sglang.metrics.exporter import Metrics
from elasticmoe_sglang.metrics.streams import StreamMeter
from elasticmoe_sglang.tracing import Spans

OUTPUT_AT = "elasticmoe_output_at"
"""Attribute of SGLang's ReqState: when a streamed request had its last output."""


@dataclass(frozen=True, kw_only=True)
class Observability:
    """What SGLang's flags ask for.

    Attributes:
        streams, metrics: None without --enable-metrics.
        observer: for the coordinator; tells nobody where neither flag was given.
    """

    streams: StreamMeter | None
    metrics: Metrics | None
    observer: Observers


def observability(tokenizer_manager: Any, config: ElasticConfig) -> Observability:
    """Create what `--enable-metrics` and `--enable-trace` ask for, once a process."""
    streams, metrics, observers = None, None, list[Observer]()
    if tokenizer_manager.enable_metrics:
        streams = StreamMeter(lambda: _last_outputs(tokenizer_manager))
        metrics = Metrics(model_name=tokenizer_manager.served_model_name, ep_size=config.ep_size, streams=streams)
        observers.append(metrics)
    if tokenizer_manager.enable_trace:
        observers.append(Spans())
    return Observability(streams=streams, metrics=metrics, observer=Observers(observers))


def _last_outputs(tokenizer_manager: Any) -> list[float]:
    # Copying is atomic in CPython: the coordinator's thread asks.
    states = list(tokenizer_manager.rid_to_state.values())
    return [at for state in states if (at := getattr(state, OUTPUT_AT, None)) is not None]


def note_output(observed: Observability | None, state: Any, finish: Mapping[str, Any] | None) -> None:
    """A request had an output.

    Args:
        state: SGLang's ReqState. finish: its finish reason; None: it goes on.
    """
    if observed is None or observed.streams is None:
        return
    streams = observed.streams
    if finish is not None and finish["type"] == "abort" and not state.abort_sent:
        status = finish.get("status_code")
        if status is not None and status >= 500:  # without a status somebody asked for it
            arrived = state.time_stats.created_time
            streams.failed(arrived, refused=status == 503 and not state.output_ids)
    if getattr(state.obj, "stream", False):
        setattr(state, OUTPUT_AT, streams.output(getattr(state, OUTPUT_AT, None)))
