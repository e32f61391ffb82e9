"""Traces of a live server with SGLang's --enable-trace, as an OTLP collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import settled

pytestmark = pytest.mark.soak  # a server of its own; SGLang's request for these packages is not ours


class Collector:
    """Receives OTLP over HTTP; `spans` are (service, span) as they came."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}/v1/traces"
        self.spans: list[tuple[str, Any]] = []

    def named(self, name: str) -> list[Any]:
        return [span for _, span in list(self.spans) if span.name == name]


@contextmanager
def collector() -> Iterator[Collector]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                service = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                for scope in resource.scope_spans:
                    received.spans += [(service["service.name"], span) for span in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()


def test_a_change_is_a_trace_beside_those_of_requests(tmp_path: Path) -> None:
    for package in ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.exporter.otlp.proto.grpc"):
        pytest.importorskip(package, reason="SGLang's tracing needs opentelemetry-exporter-otlp")
    model = make_tiny_model(tmp_path / "model")
    with collector() as received:
        args = ["--enable-trace", "--otlp-traces-endpoint", received.endpoint]
        env = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "SGLANG_OTLP_EXPORTER_SCHEDULE_DELAY_MILLIS": "100",
        }
        with ElasticServer(model, args, log=tmp_path / "server.log", env=env) as server:
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
            assert server.post("/generate", body).status_code == 200
            operation = server.must_scale(3)
            settled(lambda: received.named("elasticmoe.change"), 30, "the change is a span")
            settled(lambda: received.named("elasticmoe.finishing"), 30, "its last phase is a span")
        [root] = received.named("elasticmoe.change")
        attributes = {attribute.key: attribute.value for attribute in root.attributes}
        assert attributes["elasticmoe.operation_id"].string_value == operation["operation_id"]
        assert attributes["elasticmoe.new_ep_size"].int_value == 3
        assert (root.end_time_unix_nano - root.start_time_unix_nano) / 1e6 == pytest.approx(
            operation["timings"]["total_ms"], abs=0.01
        )
        for phase in ("planned", "preparing", "committing", "finishing"):
            [span] = received.named(f"elasticmoe.{phase}")
            assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        services = {service for service, _ in received.spans}
        assert services == {"sglang"}
        assert any(not span.name.startswith("elasticmoe.") for _, span in received.spans), "requests are traced too"
