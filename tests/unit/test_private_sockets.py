"""SGLang's sockets are in the run folder, whatever process asks for them, and closed to other users."""

from __future__ import annotations

import stat
import tempfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from elasticmoe_patches.srt.server_args import private_endpoints
from elasticmoe_sglang.comm.membership import MAX_CAPACITY
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.runtime import _MAX_RUN_DIR, Runtime, new_runtime, only_this_user

pytestmark = pytest.mark.process

LONGEST_PATH = 107
"""Of a Unix socket on Linux."""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = new_runtime(ElasticConfig(ep_size=2, max_ep_size=4, run_dir=str(tmp_path / "run")))
    monkeypatch.setattr("elasticmoe_patches.srt.server_args.current_runtime", lambda: made)
    return made


def endpoints(ports: Any) -> dict[str, str]:
    named = {field.name: getattr(ports, field.name) for field in fields(ports)}
    return {name: value for name, value in named.items() if name.endswith("ipc_name") and value is not None}


def test_no_endpoint_is_a_port_and_all_processes_agree(runtime: Runtime) -> None:
    arguments = SimpleNamespace(nccl_port=None)
    main = endpoints(private_endpoints(arguments))
    ranks = [endpoints(private_endpoints(arguments, rank, None)) for rank in range(4)]
    folder = f"ipc://{runtime.paths.run_dir}/"
    assert all(value.startswith(folder) for each in (main, *ranks) for value in each.values())
    assert len(set(main.values())) == len(main) >= 6
    inputs = [each.pop("scheduler_input_ipc_name") for each in (main, *ranks)]
    assert len(set(inputs)) == 5 and inputs[1:] == [runtime.paths.rank_endpoint(rank) for rank in range(4)]
    assert all(each == main for each in ranks)


def test_a_port_that_the_user_gives_is_kept(runtime: Runtime) -> None:
    assert private_endpoints(SimpleNamespace(nccl_port=12345)).nccl_port == 12345


def test_a_bound_socket_is_for_this_user_alone(runtime: Runtime) -> None:
    endpoint = runtime.paths.rank_endpoint(0)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.bind(endpoint)
        only_this_user(endpoint)
        assert stat.S_IMODE(Path(endpoint.removeprefix("ipc://")).stat().st_mode) == 0o600


def test_the_longest_run_folder_has_room_for_every_socket() -> None:
    with tempfile.TemporaryDirectory() as short:
        folder = Path(short) / ("x" * (_MAX_RUN_DIR - len(short) - 1))
        paths = new_runtime(ElasticConfig(ep_size=2, max_ep_size=4, run_dir=str(folder))).paths
        last = MAX_CAPACITY - 1
        named = [paths.rank_endpoint(last), paths.peer_endpoint(last), paths.sglang_endpoint("detokenizer")]
        for endpoint in (*named, paths.hmm_endpoint, paths.coordinator_endpoint):
            assert len(endpoint.removeprefix("ipc://")) <= LONGEST_PATH
        with pytest.raises(UserInputError, match="too long for a Unix socket"):
            new_runtime(ElasticConfig(ep_size=2, max_ep_size=4, run_dir=f"{folder}x"))
