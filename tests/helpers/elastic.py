"""An elastic server under test: the real one, on the CPU, and its changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from tests.helpers.server import SglangServer

RANKS = 4


class ElasticServer(SglangServer):
    """SGLang with our flags, two of four ranks active unless told otherwise.

    Args:
        kv_tokens: the most KV tokens of a rank; None: all that its device has room for.
        device: SGLang's name of the kind of device.
    """

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        ep_size: int = 2,
        capacity: int = RANKS,
        admin_key: str | None = None,
        kv_tokens: int | None = 8192,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        own = ["--model-path", str(model), "--device", device, "--skip-server-warmup"]
        own += ["--max-total-tokens", str(kv_tokens)] if kv_tokens is not None else []
        own += ["--elasticmoe-ep-size", str(ep_size), "--elasticmoe-max-ep-size", str(capacity)]
        # A busy machine boots four processes that import SGLang in minutes.
        super().__init__([*own, *args], log=log, start_timeout_s=400, **options)
        self.headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}

    def get(self, path: str, timeout_s: float = 30.0) -> requests.Response:
        return requests.get(self.url + path, headers=self.headers, timeout=timeout_s)

    def post(self, path: str, body: object, timeout_s: float = 120.0) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=self.headers, timeout=timeout_s)

    def scale(self, size: int | None = None, *, retire: Sequence[int] = (), wait: bool = True) -> dict[str, Any]:
        """The operation, ended unless `wait` is False; whether it succeeded is for the caller to look at."""
        body: dict[str, Any] = {"retire_ranks": list(retire)} if retire else {"new_ep_size": size}
        response = self.post("/scale_elastic_ep", {**body, "wait": wait})
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        operation: dict[str, Any] = response.json()
        return operation

    def must_scale(
        self, size: int | None = None, *, retire: Sequence[int] = (), recomputes: bool = False
    ) -> dict[str, Any]:
        """The operation, which is done and has lost nothing: no KV either, unless it `recomputes` for want of room."""
        operation = self.scale(size, retire=retire)
        assert operation["phase"] == "done", f"{operation['phase']}: {operation['error']}\n{self.log_tail()}"
        assert operation["columns_moved"] == operation["columns_planned"]
        assert recomputes or operation["recomputed_requests"] == 0, f"KV was not kept: {operation}\n{self.log_tail()}"
        return operation

    def operation(self, operation_id: str) -> dict[str, Any]:
        response = self.get(f"/elastic_ep/operations/{operation_id}")
        assert response.status_code == 200, response.text
        operation: dict[str, Any] = response.json()
        return operation

    def operations(self) -> list[dict[str, Any]]:
        """The latest operations, newest first."""
        response = self.get("/elastic_ep/operations")
        assert response.status_code == 200, response.text
        operations: list[dict[str, Any]] = response.json()["operations"]
        return operations

    def ended(self, operation_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The operation once it has ended. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (operation := self.operation(operation_id))["phase"] not in ("done", "failed", "rolled_back"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation_id} is still {operation['phase']}")
            time.sleep(0.05)
        return operation

    def status(self) -> dict[str, Any]:
        response = self.get("/elastic_ep/status")
        assert response.status_code == 200, response.text
        status: dict[str, Any] = response.json()
        return status

    def worker_pids(self) -> dict[int, int]:
        """Active ranks and their processes."""
        return {rank["rank"]: rank["pid"] for rank in self.status()["ranks"] if rank["state"] == "active"}


def commit_time(operation: dict[str, Any]) -> float:
    """Unix time at which the operation's phase of committing ended."""
    timings = operation["timings"]
    spent = [timings[f"{phase}_ms"] or 0.0 for phase in ("planned", "preparing", "committing")]
    return float(operation["created_at"]) + sum(spent) / 1000
