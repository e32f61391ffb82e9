"""The HTTP routes over the fake cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient

from elasticmoe_sglang.api.router import build_router, mount
from tests.helpers.fake_cluster import FakeCluster


@contextmanager
def serving(cluster: FakeCluster, instance_id: str | None = None) -> Iterator[TestClient]:
    app = FastAPI()
    mount(app, build_router(cluster.coordinator(prepare_deadline_s=5, commit_deadline_s=5), instance_id=instance_id))
    with TestClient(app) as client:
        yield client
