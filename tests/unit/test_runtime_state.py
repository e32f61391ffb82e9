"""Everything that SGLang's server can be told while it runs is in the table, and what is refused is refused."""

from __future__ import annotations

import asyncio
import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from elasticmoe_patches import runtime_state
from elasticmoe_patches.runtime_state import KEPT, REFUSED, REPLAYED
from elasticmoe_sglang.api.refusals import build_refusals
from elasticmoe_sglang.api.router import mount
from elasticmoe_sglang.errors import UnsupportedFeature

pytestmark = pytest.mark.process

READS = {
    "/",
    *("/ready", "/health", "/health_generate", "/ping", "/metrics", "/v1/loads"),
    *("/get_model_info", "/model_info", "/get_server_info", "/server_info"),
    *("/get_remote_instance_transfer_engine_info", "/remote_instance_transfer_engine_info"),
    *(
        "/list_external_corpora",
        "/get_hicache_l3_cache_layout",
        "/v1/models",
        "/v1/models/{model:path}",
        "/api/tags",
        "/api/show",
    ),
    *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
}
REQUESTS = {
    *("/generate", "/encode", "/classify", "/invocations", "/vertex_generate", "/api/chat", "/api/generate"),
    *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/v1/score", "/v1/decisions"),
    *("/v1/tokenize", "/tokenize", "/v1/detokenize", "/detokenize", "/v1/audio/transcriptions", "/v1/realtime"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/rerank", "/rerank"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/systemone"),
    *("/parse_function_call", "/separate_reasoning"),
}
OURS = {"/scale_elastic_ep", "/is_scaling_elastic_ep"}
READING_CALLS = {
    *("init_communicators", "update_control_communicator_fan_out", "get_internal_state", "get_loads"),
    *("list_external_corpora", "get_hicache_l3_cache_layout"),
}
ROUTES = [(path, method) for endpoint in REFUSED for path, methods in endpoint.routes for method in methods]


def test_every_route_of_sglangs_server_is_in_the_table() -> None:
    """A route that a later SGLang adds has to be looked at."""
    from sglang.srt.entrypoints.http_server import app

    told = {path for endpoint in (*REFUSED, *REPLAYED, *KEPT) for path, _ in endpoint.routes}
    found = {str(getattr(route, "path", "")) for route in _flat(app.routes)}
    assert found - READS - REQUESTS - OURS - told == set()
    # The dumper's route is there only with an environment variable.
    assert told - found == {"/dumper/{method}"}


def _flat(routes: Any) -> list[Any]:
    """FastAPI may keep an included router as one route."""
    found = []
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        found += _flat(inner.routes) if inner is not None and not hasattr(route, "path") else [route]
    return found


def test_every_method_that_controls_ranks_is_in_the_table() -> None:
    from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    told = {name for endpoint in (*REFUSED, *REPLAYED, *KEPT) for name in endpoint.calls}
    methods = {name for name, _ in inspect.getmembers(TokenizerControlMixin, inspect.isfunction) if name[0] != "_"}
    assert methods - READING_CALLS - told == set()
    assert all(hasattr(TokenizerManager, name) for name in told)


def test_a_refused_endpoint_answers_with_its_sentence_before_sglangs_own() -> None:
    app = FastAPI()
    called: list[str] = []
    for path, method in ROUTES:
        app.add_api_route(path, lambda path=path: called.append(path), methods=[method])
    mount(app, build_refusals(runtime_state.refused_routes()))
    client = TestClient(app)
    for path, method in ROUTES:
        path = path.replace("{method}", "enable")
        response = client.request(method, path)
        assert response.status_code == 400, path
        assert response.json()["error"].startswith(f"{path} is not supported by an elastic server: ")
    assert called == []


def test_the_status_of_the_hierarchical_cache_can_still_be_asked_for() -> None:
    assert ("/hicache/storage-backend", "GET") not in ROUTES


@pytest.mark.parametrize("name", [name for endpoint in REFUSED for name in endpoint.calls])
def test_a_refused_call_raises_and_changes_nothing(name: str) -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager: Any = object.__new__(TokenizerManager)
    manager.is_pause = False
    runtime_state.refuse_calls(manager)
    with pytest.raises(UnsupportedFeature, match=f"{name} is not supported by an elastic server: "):
        asyncio.run(getattr(manager, name)(object()))
    assert manager.is_pause is False


def test_the_log_level_is_sent_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.io_struct import ConfigureLoggingReq
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    sent: list[Any] = []
    monkeypatch.setattr(TokenizerManager, "_dispatch_to_scheduler", lambda _self, message: sent.append(message))
    manager: Any = object.__new__(TokenizerManager)
    manager.request_logger = SimpleNamespace(configure=lambda **_: None)
    runtime_state.remember_log_level(manager)
    runtime_state.replay(manager)
    assert sent == []
    level = logging.getLogger().level
    try:
        manager.configure_logging(ConfigureLoggingReq(log_level="warning"))
        with pytest.raises(ValueError, match="NOISE"):
            manager.configure_logging(ConfigureLoggingReq(log_level="noise"))
        manager.configure_logging(ConfigureLoggingReq(log_requests=False))
    finally:
        logging.getLogger().setLevel(level)
    sent.clear()
    runtime_state.replay(manager)
    assert [message.log_level for message in sent] == ["warning"]
