"""A running server: who can reach its processes, and what it can be told that ranks which join would not know."""

from __future__ import annotations

import socket
import stat
import time
from pathlib import Path

import psutil
import pytest
import requests

from elasticmoe_patches.runtime_state import REFUSED
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.load import settled
from tests.helpers.shared import Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("steady")]

ANSWER = 4
_QUIET_S = 3.0


@pytest.fixture
def server(shared: Shared) -> ElasticServer:
    return shared.steady()


def connections(server: ElasticServer, kind: str) -> list[tuple[psutil.Process, object]]:
    """All sockets of all processes of the server."""
    found = []
    for process in [psutil.Process(server.pid), *server.processes()]:
        try:
            found += [(process, connection) for connection in process.net_connections(kind)]
        except psutil.NoSuchProcess:
            continue
    return found


def test_no_process_can_be_reached_over_a_network_but_the_http_server(server: ElasticServer) -> None:
    """SGLang's own sockets carry pickles; torch's store would be a listener too."""
    server.must_scale(RANKS)
    listening = {
        (each.laddr.port, process.pid)
        for process, each in connections(server, "inet")
        if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and each.laddr)
    }
    assert listening == {(server.port, server.pid)}
    server.must_scale(2)


def test_sockets_are_in_a_folder_of_the_user_and_for_the_user_alone(server: ElasticServer) -> None:
    folder = Path(server.status()["memory"]["endpoint"].removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    bound = {each.laddr for _, each in connections(server, "unix") if each.laddr}
    assert {Path(path).parent for path in bound} == {folder}, bound
    names = {Path(path).name for path in bound}
    ranks = {f"sgl-rank-{rank}.sock" for rank in range(RANKS)} | {f"peer-{rank}.sock" for rank in (0, 1)}
    sglang = {f"sgl-{name}.sock" for name in ("tokenizer", "controller", "detokenizer")}
    assert names >= ranks | sglang | {"hmm.sock", "coord.sock", "imm.sock"}
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir() if path.is_socket()}
    assert set(modes.values()) == {"0o600"}, modes


def test_what_ranks_that_join_would_not_know_is_refused_with_a_sentence(server: ElasticServer) -> None:
    before = server.generate([5, 6, 7], ANSWER)["output_ids"]
    for endpoint in REFUSED:
        for path, methods in endpoint.routes:
            path = path.replace("{method}", "enable")
            for method in methods:
                response = requests.request(method, server.url + path, headers=server.headers, json={}, timeout=30)
                assert response.status_code == 400, f"{method} {path}: {response.text}"
                assert response.json() == {"error": f"{path} is not supported by an elastic server: {endpoint.why}"}
                assert requests.request(method, server.url + path, json={}, timeout=30).status_code == 401
    assert server.generate([5, 6, 7], ANSWER)["output_ids"] == before


def test_the_log_level_reaches_a_rank_that_joins(server: ElasticServer) -> None:
    """SGLang logs a batch at level INFO."""

    def batches() -> int:
        for seed in range(3 * RANKS):
            server.generate([seed + 3, 6, 7], ANSWER)
        return len([line for line in server.log_lines("Prefill batch") if " DP2 " in line])

    try:
        assert server.post("/configure_logging", {"log_level": "warning"}).status_code == 200
        server.must_scale(3)
        silent = batches()
        time.sleep(_QUIET_S)
        assert batches() == silent
    finally:
        assert server.post("/configure_logging", {"log_level": "info"}).status_code == 200
    settled(lambda: batches() > silent, 30, "rank 2 logs its batches")
    server.must_scale(2)


def test_what_no_other_rank_needs_is_carried_out(server: ElasticServer) -> None:
    for method, path in (("GET", "/freeze_gc"), ("GET", "/set_trace_level?level=0"), ("POST", "/flush_cache")):
        response = requests.request(method, server.url + path, headers=server.headers, timeout=60)
        assert response.status_code == 200, f"{path}: {response.text}"
    server.must_scale(3)
    assert len(server.generate([5, 6, 7], ANSWER)["output_ids"]) == ANSWER
    server.must_scale(2)
