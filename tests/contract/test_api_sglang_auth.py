"""Our routes behind SGLang's own key middleware: who may call them is what SGLang says of its admin requests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from elasticmoe_sglang.api.feed import Feed
from elasticmoe_sglang.api.page import PATH, render_page, serve_page
from elasticmoe_sglang.api.router import build_router, mount
from elasticmoe_sglang.live_figures import LiveFigures
from elasticmoe_sglang.policy.controller import PolicyController
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import PolicySettings
from tests.helpers.fake_cluster import FakeCluster

REQUESTS = [
    ("POST", "/scale_elastic_ep", {"new_ep_size": 2}),
    ("GET", "/elastic_ep/operations", None),
    ("GET", "/elastic_ep/status", None),
    ("GET", "/elastic_ep/policy", None),
    ("POST", "/elastic_ep/policy", {"min_ep_size": 2}),
    ("GET", "/is_scaling_elastic_ep", None),
    ("POST", "/is_scaling_elastic_ep", None),
]


@pytest.fixture(scope="module")
def auth() -> ModuleType:
    """sglang.srt.utils.auth, loaded alone: it needs nothing of SGLang, which takes seconds to import."""
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.origin is not None
    path = Path(sglang.origin).parent / "srt" / "utils" / "auth.py"
    spec = importlib.util.spec_from_file_location("sglang_auth", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


KEYS = [
    (None, None, None, True),
    (None, "admin", None, False),
    (None, "admin", "wrong", False),
    (None, "admin", "admin", True),
    ("user", None, None, False),
    ("user", None, "user", True),
    ("user", "admin", "user", False),
    ("user", "admin", "admin", True),
]
keys = pytest.mark.parametrize(("api_key", "admin_api_key", "sent", "allowed"), KEYS)


@pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")
@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
@keys
def test_keys(
    auth: ModuleType,
    method: str,
    path: str,
    body: dict[str, int] | None,
    api_key: str | None,
    admin_api_key: str | None,
    sent: str | None,
    allowed: bool,
) -> None:
    app = FastAPI()
    protect = auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL)
    coordinator = FakeCluster().coordinator()
    policy = PolicyController(coordinator, PolicySettings(), max_ep_size=4, sample=lambda: None, meter=RequestMeter())
    mount(app, build_router(coordinator, protect, policy=policy))
    auth.add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    with TestClient(app) as client:
        headers = {"Authorization": f"Bearer {sent}"} if sent else {}
        answer = client.request(method, path, json=body, headers=headers)
    assert answer.status_code == (200 if allowed else 401)


@pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")
@keys
def test_keys_of_the_page_and_its_events(
    auth: ModuleType, api_key: str | None, admin_api_key: str | None, sent: str | None, allowed: bool
) -> None:
    """The document is open: a browser can send no key with an address. The events, and with them all data, are not."""
    coordinator = FakeCluster().coordinator()
    feed = Feed(coordinator, LiveFigures(), ending=lambda: True)  # or the stream would go on
    app = FastAPI()
    mount(app, build_router(coordinator, auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL), feed=feed))
    serve_page(app)
    auth.add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    with TestClient(app) as client:
        assert client.get(PATH).content == render_page()
        headers = {"Authorization": f"Bearer {sent}"} if sent else {}
        assert client.get("/elastic_ep/events", headers=headers).status_code == (200 if allowed else 401)
