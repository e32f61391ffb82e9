"""A server in which faults are made to happen: arming them, and telling when it is whole again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

from elasticmoe_sglang.faults import FAULT_FILE
from tests.helpers.elastic import ElasticServer

SETTLED_WITHIN_S = 30.0


def arm(run_dir: Path, point: str, rank: int, action: str) -> None:
    """`rank` does `action` when it reaches `point`, once."""
    (run_dir / "fault.new").write_text(f"{point} {rank} {action}")
    (run_dir / "fault.new").rename(run_dir / FAULT_FILE)  # never seen half written


def armed(run_dir: Path) -> bool:
    """The fault has not happened yet."""
    return (run_dir / FAULT_FILE).exists()


def disarm(run_dir: Path) -> None:
    (run_dir / FAULT_FILE).unlink(missing_ok=True)


def ask_for(server: ElasticServer, body: dict[str, Any]) -> dict[str, Any]:
    """The operation; asked for again while the server refuses because it is still recovering."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        response = server.post("/scale_elastic_ep", body)
        if response.status_code == 200:
            operation: dict[str, Any] = response.json()
            return operation
        assert response.status_code in (409, 503), response.text
        assert time.monotonic() < deadline, f"still refused: {response.text}"
        time.sleep(0.1)


def change(server: ElasticServer, size: int) -> dict[str, Any]:
    """A change without a fault, which is done."""
    operation = ask_for(server, {"new_ep_size": size, "wait": True})
    assert operation["phase"] == "done", f"{operation['error']}\n{server.log_tail(200)}"
    return operation


def imbalance(status: dict[str, Any]) -> str | None:
    """What the HMM's ledger has that the placement does not explain, or the other way round; None when they agree."""
    memory = status["memory"]
    if not memory["available"]:
        return str(memory["error"])
    if memory["column_bytes"] is None:
        return "the HMM knows no model yet"
    devices = {rank["rank"]: rank["device"] for rank in status["ranks"]}
    for device in memory["devices"]:
        hot = [rank["rank"] for rank in status["ranks"] if rank["state"] == "hot"]
        here = [rank for rank in (*status["membership"], *hot) if devices[rank] == device["device"]]
        copies = {int(column): ranks for column, ranks in status["copies"].items()}
        holders = [{owner, *copies.get(column, ())} for column, owner in enumerate(status["placement"])]
        columns = sum(device["device"] in {devices[rank] for rank in ranks} for ranks in holders)
        parts = {rank % status["attention_tp"] for rank in here}
        wanted = {"column": columns * memory["column_bytes"], "dense": len(parts) * memory["dense_bytes"]}
        held = dict(device["by_kind"])
        kv = held.pop("kv", 0)
        if {kind: size for kind, size in wanted.items() if size} != held or bool(kv) != bool(here):
            return f"device {device['device']} holds {device['by_kind']}, wanted {wanted}, and KV for ranks {here}"
    return None


def whole(server: ElasticServer) -> bool:
    """The server has come to rest: ledger and placement agree, every member has a living process, and ranks that were
    lost are back."""
    status = server.status()
    members = [rank for rank in status["ranks"] if rank["rank"] in status["membership"]]
    return (
        imbalance(status) is None
        and status["running"] is None
        and status["membership"] == status["target_ranks"]
        and {rank["state"] for rank in members} == {"active"}
        and all(rank["pid"] is not None and psutil.pid_exists(rank["pid"]) for rank in members)
    )
