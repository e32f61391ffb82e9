"""The HMM and its clients as processes: deaths survived, files private, nothing leaked."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elasticmoe_sglang.errors import (
    BlockNotFound,
    HmmUnavailable,
    UserInputError,
)
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.config import Endpoint, HmmConfig
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.server import HmmServer
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from tests.helpers.hmm_clients import BUDGETS, MIB, MODEL, PAGE, Other, descriptors, eventually, used

pytestmark = pytest.mark.usefixtures("gives_all_back")


# Deaths --------------------------------------------------------------------------------------------------------------


def test_a_killed_client_loses_its_transaction_and_leases_but_no_committed_block(
    hmm: HmmProcess, client: HmmClient
) -> None:
    program = f"""
[mine] = client.allocate(0, 'kv', nbytes={PAGE})
va = mapped(mine)
ctypes.memmove(va.base, b'kept', 4)
txn = client.begin('doomed')
blocks = client.allocate(1, 'kv', nbytes={10 * PAGE}, txn=txn)
other = mapped(blocks[0])
tell(mine.block_id); wait()
"""
    with Other(hmm.endpoint, program) as other:
        block_id = int(other.says())
        assert used(client) == [PAGE, 10 * PAGE]
        other.process.send_signal(signal.SIGKILL)
        eventually(lambda: used(client) == [PAGE, 0])
    status = client.status()
    assert not status.txns and [c.name for c in status.clients] == ["rank-0"]
    [handle] = client.handles([block_id])
    assert os.pread(handle.native, 4, 0) == b"kept"
    client.backend.close(handle)


def test_released_memory_stays_charged_until_the_last_client_unmapped_it(hmm: HmmProcess, client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=4 * PAGE)
    program = (
        f"va = mapped(client.lookup()[0])\ntell('m'); wait()\nbackend.unmap(va.base, {4 * PAGE})\ntell('u'); wait()"
    )
    with Other(hmm.endpoint, program) as other:
        assert other.says() == "m"
        client.release([block.block_id])
        status = client.status()
        assert (status.blocks, status.retired_blocks, status.devices[0].used) == (0, 1, 4 * PAGE)
        with pytest.raises(BlockNotFound):
            client.handles([block.block_id])
        other.go_on()
        assert other.says() == "u"
        # The HMM hears of it on another socket than the one that asks.
        eventually(lambda: client.status().retired_blocks == 0)
        assert used(client)[0] == 0


def test_a_forked_child_is_told_to_make_its_own_client_and_keeps_nobody_attached(
    hmm: HmmProcess, client: HmmClient
) -> None:
    program = """
client.status()
child = os.fork()
if child == 0:
    try:
        client.status()
    except Exception as error:
        tell(f'{type(error).__name__}: {error}')
    with HmmClient(client.endpoint, name='child') as mine:
        mine.status()
    wait()  # outlives its parent
    os._exit(0)
tell(child)
os._exit(0)
"""
    with Other(hmm.endpoint, program) as other:
        lines = sorted([other.says(), other.says()])
        assert "A forked child makes its own HmmClient" in lines[1]
        other.process.wait(10)
        eventually(lambda: [c.name for c in client.status().clients] == ["rank-0"])
        other.go_on()
        other.process.communicate()


def test_a_dead_hmm_is_reported_at_once_and_a_new_one_is_found(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/run/hmm.sock"
    client = HmmClient(endpoint, name="rank-0", timeout_s=5, backend=CpuBackend())
    with pytest.raises(HmmUnavailable, match=r"no HMM answers.*elasticmoe hmm --endpoint"):
        client.status()
    with spawn_hmm(endpoint, [MIB], log_path=tmp_path / "log") as first:
        instance = client.status().instance
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        [handle] = client.handles([block.block_id])
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(5)
        started = time.monotonic()
        with pytest.raises(HmmUnavailable):
            client.status()
        assert time.monotonic() - started < 3
        assert os.pread(handle.native, 4, 0) == bytes(4)  # the client's memory is still its own
    with spawn_hmm(endpoint, [MIB], log_path=tmp_path / "log"):  # stale files are no obstacle
        assert client.connect(wait_s=5).instance != instance
        client.backend.close(handle)  # belongs to the dead one; the new one must not hear of it
        assert client.status().counters.malformed == 0
        client.close()


def test_a_call_in_flight_ends_when_the_hmm_dies(tmp_path: Path) -> None:
    with spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [MIB], log_path=tmp_path / "log") as process:
        client = HmmClient(process.endpoint, name="rank-0")
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        killer = threading.Timer(0.2, process.process.kill)
        killer.start()
        with pytest.raises(HmmUnavailable, match="is gone"):
            client.wait_sealed([block.block_id], 30)
        killer.join()
        client.close()


def test_a_stopped_hmm_costs_a_deadline_and_no_more(hmm: HmmProcess) -> None:
    with HmmClient(hmm.endpoint, name="hasty", timeout_s=0.3) as client:
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        os.kill(hmm.pid, signal.SIGSTOP)
        try:
            for call in (client.status, lambda: client.handles([block.block_id])):
                started = time.monotonic()
                with pytest.raises(HmmUnavailable, match=r"did not answer .* in time"):
                    call()
                assert 0.3 <= time.monotonic() - started < 3
        finally:
            os.kill(hmm.pid, signal.SIGCONT)
        # The answers that came too late are dropped, descriptors and leases with them.
        [handle] = client.handles([block.block_id])
        assert client.status().clients[0].leases == 1
        client.backend.close(handle)
        assert client.status().clients[0].leases == 0


# The process and its files -------------------------------------------------------------------------------------------


def test_files_are_private_and_names_are_not_abstract(hmm: HmmProcess) -> None:
    endpoint = Endpoint.parse(hmm.endpoint)
    assert stat.S_IMODE(endpoint.commands.parent.stat().st_mode) == 0o700
    for path in (endpoint.commands, endpoint.handles, endpoint.lock):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bound = [line.split()[-1] for line in Path(f"/proc/{hmm.pid}/net/unix").read_text().splitlines()]
    assert str(endpoint.commands) in bound and str(endpoint.handles) in bound
    for wrong in ("ipc://@hmm", "tcp://127.0.0.1:1", "/tmp/x", f"ipc:///tmp/{'x' * 120}"):
        with pytest.raises(UserInputError):
            HmmClient(wrong, name="x")


def test_one_endpoint_has_one_hmm(hmm: HmmProcess, tmp_path: Path) -> None:
    with pytest.raises(HmmUnavailable, match="ended with status 2 before it was ready"):
        spawn_hmm(hmm.endpoint, BUDGETS, log_path=tmp_path / "second.log")
    assert "an HMM already serves at" in (tmp_path / "second.log").read_text()
    with HmmClient(hmm.endpoint, name="x") as client:
        assert client.status().pid == hmm.pid


def test_a_folder_open_to_others_and_files_in_the_way_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(UserInputError, match=f"is open to others.*chmod 700 {folder}"):
        HmmServer(HmmConfig(endpoint=f"ipc://{folder}/hmm.sock", budgets=(MIB,)))
    folder.chmod(0o700)
    (folder / "hmm.sock").write_text("precious")
    with pytest.raises(UserInputError, match="is in the way and is no socket"):
        HmmServer(HmmConfig(endpoint=f"ipc://{folder}/hmm.sock", budgets=(MIB,)))
    assert (folder / "hmm.sock").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: int) -> None:
    process = spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [MIB], log_path=tmp_path / "log")
    os.kill(process.pid, number)
    assert process.process.wait(5) == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_it_ends_with_its_parent_and_only_when_asked_to(tmp_path: Path) -> None:
    program = f"""
import os, threading
from pathlib import Path
from elasticmoe_sglang.hmm.process import spawn_hmm
pids = []
def start(name, bound):
    log = Path({str(tmp_path)!r}, name + '.log')
    pids.append(spawn_hmm(f'ipc://{tmp_path}/{{name}}/h', [1 << 20], exit_with_parent=bound, log_path=log).pid)
# The thread that starts them ends first, which the kernel mistakes for the parent's end.
for arguments in (('bound', True), ('free', False)):
    thread = threading.Thread(target=start, args=arguments); thread.start(); thread.join()
import time; time.sleep(0.5)
print(pids, [Path(f'/proc/{{pid}}/comm').exists() for pid in pids], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pids, alive = (json.loads(part) for part in done.stdout.lower().replace("] [", "]|[").split("|"))
    assert alive == [True, True], done.stderr
    bound, free = pids
    try:
        eventually(lambda: not Path(f"/proc/{bound}").exists() or "Z" in Path(f"/proc/{bound}/stat").read_text())
        with HmmClient(f"ipc://{tmp_path}/free/h", name="x") as client:
            assert client.status().pid == free
    finally:
        os.kill(free, signal.SIGTERM)
    eventually(lambda: not (tmp_path / "free/h").exists())
    assert list((tmp_path / "bound").iterdir()) == []


def test_it_starts_without_torch_and_numpy() -> None:
    program = "import sys, elasticmoe_sglang.hmm.__main__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line(tmp_path: Path) -> None:
    from elasticmoe_sglang.hmm.__main__ import parse_config

    endpoint = f"ipc://{tmp_path}/h"
    config = parse_config(["--endpoint", endpoint, "--budget", "2GiB", "--devices", "3", "--backend", "cpu"])
    assert config == HmmConfig(endpoint=endpoint, budgets=(2 << 30,) * 3)
    assert parse_config(["--endpoint", endpoint, "--budget", "1MiB,2MiB"]).budgets == (MIB, 2 * MIB)
    assert parse_config(["--endpoint", endpoint, "--budget", "1MiB", "--exit-with-parent"]).exit_with_parent
    assert parse_config(["--endpoint", endpoint, "--budget", "1", "--exit-with-parent", "7"]).exit_with_parent == 7
    for arguments in (["--budget", "1MiB,2MiB", "--devices", "3"], ["--budget", "much"], ["--budget", "0"]):
        with pytest.raises(UserInputError):
            parse_config(["--endpoint", endpoint, *arguments])


# Leaks ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_in_the_hmm_after_many_rounds(hmm: HmmProcess) -> None:
    def one_round(number: int) -> None:
        with HmmClient(hmm.endpoint, name=f"round-{number}", backend=CpuBackend()) as client:
            client.register_model(MODEL)
            txn = client.begin(f"op-{number}")
            blocks = client.allocate(0, "column", columns=range(16), txn=txn)
            space = ColumnSpace(client.backend, 16, MODEL.column_bytes)
            for block, handle in zip(blocks, client.handles([b.block_id for b in blocks]), strict=True):
                space.map_column(block.column or 0, handle)
            if number % 2:
                client.commit(txn)
                client.release([block.block_id for block in blocks])
            elif number % 4:
                client.rollback(txn)
            if number % 3:
                space.close()
            # else: the mappings stay, and the client's end returns their leases

    with HmmClient(hmm.endpoint, name="watcher") as watcher:
        one_round(1)
        eventually(lambda: used(watcher) == [0, 0])
        before = descriptors(hmm.pid)
        for number in range(2, 22):
            one_round(number)
            eventually(lambda: used(watcher) == [0, 0])
        eventually(lambda: descriptors(hmm.pid) == before)
        status = watcher.status()
    assert (status.blocks, status.retired_blocks, len(status.txns)) == (0, 0, 0)
    assert status.devices[0].peak == 16 * 3 * PAGE
