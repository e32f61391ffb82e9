"""The IMM as a real process: standbys, ranks, deaths."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.lifeline import Lifeline
from elasticmoe_sglang.wire.seqpacket import send_packet
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, WorkerExited, WorkerNote
from elasticmoe_sglang.wire.to_imm import Assign, Assigned, KillWorker, Population, Query, Refused, Register
from elasticmoe_sglang.wire.to_worker import JoinSpec
from tests.helpers.limits import no_more_processes

STANDBYS = 2


@contextlib.contextmanager
def running_imm(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], ImmClient]]:
    """An IMM and a client of it. `folder` gets its socket and the lifeline of all that it forks."""
    path, lifeline = str(folder / "imm.sock"), Lifeline.hold(str(folder / "lifeline"))
    process = start(folder, *arguments)
    client = ImmClient(path, timeout_s=20)
    try:
        yield process, client
    finally:
        client.close()
        lifeline.cut()
        process.wait(10)


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    files = [str(folder / "imm.sock"), str(folder / "lifeline")]
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.imm_main", *files, str(STANDBYS), *arguments])


@pytest.fixture
def imm(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], ImmClient]]:
    with running_imm(tmp_path) as running:
        yield running


def expect(client: ImmClient, kind: type, timeout_s: float = 10.0, *, of: int | None = None):
    """The next message of this kind, and of this rank where one is given."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        message = client.receive(left)
        if isinstance(message, kind) and of in (None, getattr(message, "rank", None)):
            return message
    raise AssertionError(f"no {kind.__name__} within {timeout_s} s")


def population(client: ImmClient, until=lambda p: True) -> Population:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        client.send(Query())
        found = expect(client, Population)
        if until(found):
            return found
        time.sleep(0.02)
    raise AssertionError("the expected population was not reached")


def told(client: ImmClient, until) -> Population:
    """The next that is sent unasked."""
    while not until(found := expect(client, Population)):
        pass
    return found


def assign(client: ImmClient, rank: int, order: str) -> None:
    client.send(Register(rank=rank, arguments=order.encode()))
    client.send(Assign(join_spec=join_spec(rank)))


def join_spec(rank: int) -> JoinSpec:
    return JoinSpec(rank=rank, members=(0, rank), epoch=1, joining_rank=True, operation_id=f"to-{rank}")


def test_standbys_wait_and_one_takes_a_rank(imm) -> None:
    process, client = imm
    before = population(client, lambda p: len(p.standbys) == STANDBYS)
    assign(client, 1, "hang")
    assigned = expect(client, Assigned)
    assert assigned.rank == 1 and assigned.pid in before.standbys
    note = expect(client, WorkerNote)
    facts = json.loads(note.note)
    assert (facts["order"], facts["change"], facts["ppid"]) == ("hang", "to-1", process.pid)
    after = population(client, lambda p: len(p.standbys) == STANDBYS)
    assert after.ranks == {1: assigned.pid}
    assert assigned.pid not in after.standbys


def test_it_forks_beside_threads_that_are_known_to_be_safe(tmp_path: Path) -> None:
    with running_imm(tmp_path, "thread=safe_background") as (_, client):
        assert len(population(client, lambda p: len(p.standbys) == STANDBYS).standbys) == STANDBYS


def test_it_does_not_fork_beside_any_other_thread_and_names_it(tmp_path: Path) -> None:
    with running_imm(tmp_path, "thread=importer") as (_, client):
        assign(client, 1, "hang")
        refused = expect(client, Refused)
        assert refused.rank == 1 and "importer" in refused.reason and "cannot fork safely" in refused.reason
        assert not population(client).standbys


def test_a_collection_in_a_rank_leaves_out_what_the_imm_imported(imm) -> None:
    _, client = imm
    assign(client, 1, "hang")
    # Python itself and the IMM's imports are some ten thousand objects.
    assert json.loads(expect(client, WorkerNote).note)["collectable"] < 1000


def test_never_more_processes_than_ranks(imm) -> None:
    _, client = imm
    for rank in range(4):
        assign(client, rank, "hang")
    assert population(client, lambda p: len(p.ranks) == 4).standbys == []


@pytest.mark.parametrize(("order", "status"), [("exit:0", 0), ("exit:5", 5), ("raise", 1), ("quit", 7)])
def test_the_end_of_a_rank_is_reported_and_the_imm_goes_on(imm, order: str, status: int) -> None:
    _, client = imm
    assign(client, 2, order)
    exited = expect(client, WorkerExited)
    assert (exited.rank, exited.status) == (2, status)
    assign(client, 2, "hang")
    assert population(client, lambda p: 2 in p.ranks)


def test_a_killed_rank_reports_its_signal(imm) -> None:
    _, client = imm
    assign(client, 3, "hang")
    pid = expect(client, Assigned).pid
    os.kill(pid, signal.SIGKILL)
    exited = expect(client, WorkerExited)
    assert (exited.pid, exited.status) == (pid, -signal.SIGKILL)


def test_signals_to_the_whole_group_end_neither_the_imm_nor_its_children(imm) -> None:
    """Ctrl-C and a supervisor's SIGTERM: running requests need them until the launcher ends."""
    process, client = imm
    assign(client, 1, "hang")
    expect(client, WorkerNote)
    found = population(client, lambda p: len(p.standbys) == STANDBYS)
    for number in (signal.SIGTERM, signal.SIGINT):
        for pid in (process.pid, *found.ranks.values(), *found.standbys):
            os.kill(pid, number)
    time.sleep(0.2)
    assert population(client) == found and process.poll() is None


def test_many_ends_at_once_do_not_harm_the_imm(imm) -> None:
    """Line closed and death noticed in one round of the loop once ended the IMM, and with it every rank."""
    process, client = imm
    for _ in range(5):
        for rank in range(4):
            assign(client, rank, "hang")
        found = population(client, lambda p: len(p.ranks) == 4)
        for pid in found.ranks.values():
            os.kill(pid, signal.SIGKILL)
        population(client, lambda p: not p.ranks)
    assert process.poll() is None


def test_kill_rank_ends_a_joining_rank(imm) -> None:
    _, client = imm
    assign(client, 3, "hang")
    expect(client, WorkerNote)
    client.send(KillWorker(rank=3))
    assert expect(client, WorkerExited).status == -signal.SIGKILL


def test_a_killed_standby_is_replaced(imm) -> None:
    _, client = imm
    victim = population(client, lambda p: len(p.standbys) == STANDBYS).standbys[0]
    os.kill(victim, signal.SIGKILL)
    after = population(client, lambda p: len(p.standbys) == STANDBYS and victim not in p.standbys)
    assert victim not in after.standbys


def test_a_standby_counts_when_it_is_ready_and_a_ready_one_is_taken_first(tmp_path: Path) -> None:
    """As on a GPU, where standbys are programs that import for themselves."""
    ready = tmp_path / "ready"
    ready.mkdir()
    with running_imm(tmp_path, str(ready)) as (_, client):
        first, second = population(client, lambda p: len(p.starting) == STANDBYS).starting
        assert population(client).standbys == []
        (ready / str(second)).touch()
        assert told(client, lambda p: p.standbys == [second]).starting == [first]
        assign(client, 1, "hang")
        assert expect(client, Assigned).pid == second
        # It is replaced by one that has to start too, and nobody is ready for the next rank.
        assert len(population(client, lambda p: second not in p.standbys).starting) == STANDBYS
        assign(client, 2, "hang")
        assert expect(client, Assigned, of=2).pid == first
        with pytest.raises(AssertionError, match="no WorkerNote"):
            while expect(client, WorkerNote, 0.3).rank != 2:
                pass
        (ready / str(first)).touch()
        assert json.loads(expect(client, WorkerNote).note)["change"] == "to-2"
        assert first not in population(client, lambda p: p.ranks == {1: second, 2: first}).standbys


def test_what_cannot_be_done_is_refused(imm) -> None:
    _, client = imm
    client.send(Assign(join_spec=join_spec(0)))
    assert "never registered" in expect(client, Refused).reason
    assign(client, 0, "hang")
    expect(client, Assigned)
    client.send(Assign(join_spec=join_spec(0)))
    assert "taken" in expect(client, Refused).reason
    send_packet(client.sock, b"\xc1 not msgpack")
    assert "is no message" in expect(client, Refused).reason
    send_packet(client.sock, FROM_IMM.pack(WorkerExited(rank=0, pid=1, status=0)))
    assert "not a valid message" in expect(client, Refused).reason


def test_standbys_end_with_the_imm_and_ranks_go_on(imm) -> None:
    process, client = imm
    assign(client, 1, "hang")
    expect(client, WorkerNote)
    found = population(client, lambda p: len(p.ranks) == 1 and len(p.standbys) == STANDBYS)
    process.kill()
    process.wait()
    with pytest.raises(WorkerError, match="has gone"):
        while client.receive(5) is not None:
            pass
    ended(found.standbys)
    assert runs(found.ranks[1])


@pytest.mark.parametrize("stopped", [False, True])
def test_everything_ends_with_the_lifeline(tmp_path: Path, stopped: bool) -> None:
    """Also a worker whose IMM has ended, and one that is stopped: the kernel kills them."""
    with running_imm(tmp_path) as (process, client):
        assign(client, 1, "hang")
        expect(client, WorkerNote)
        found = population(client, lambda p: len(p.ranks) == 1 and len(p.standbys) == STANDBYS)
        if stopped:
            os.kill(found.ranks[1], signal.SIGSTOP)
        else:
            process.kill()
    ended([*found.ranks.values(), *found.standbys, process.pid])


def test_a_process_that_comes_late_to_a_cut_lifeline_ends(tmp_path: Path) -> None:
    lifeline = Lifeline.hold(str(tmp_path / "lifeline"))
    lifeline.cut()
    started = start(tmp_path)
    assert started.wait(20) == -signal.SIGKILL


def ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if runs(pid)] == []


def test_without_a_descriptor_nothing_is_lost_but_time(imm) -> None:
    """A refill that fails is tried again, an assignment that fails is refused, and no rank ends for either."""
    process, client = imm
    assign(client, 0, "hang")
    expect(client, WorkerNote)
    found = population(client, lambda p: len(p.standbys) == STANDBYS)
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    held = len(os.listdir(f"/proc/{process.pid}/fd"))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (held, limits[1]))
    for pid in found.standbys:
        os.kill(pid, signal.SIGKILL)
    told(client, lambda p: not p.standbys and not p.starting)
    # One child's descriptors are free now, and no more: a process can be forked for them, or not.
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    assign(client, 1, "hang")
    assert "no process could be started for rank 1" in expect(client, Refused).reason
    with contextlib.suppress(WorkerError):
        ImmClient(client.path, timeout_s=0).close()  # waits to be accepted, and leaves
    assert process.poll() is None and runs(found.ranks[0])
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
    after = population(client, lambda p: len(p.standbys) == STANDBYS)
    assert after.ranks == found.ranks
    assign(client, 1, "hang")
    assert population(client, lambda p: 1 in p.ranks)


def test_a_refill_that_cannot_fork_is_tried_again(imm) -> None:
    process, client = imm
    assign(client, 0, "hang")
    found = population(client, lambda p: len(p.ranks) == 1 and len(p.standbys) == STANDBYS)
    with no_more_processes(process.pid, f"elasticmoe-imm-{os.getpid()}"):
        for pid in found.standbys:
            os.kill(pid, signal.SIGKILL)
        told(client, lambda p: not p.standbys and not p.starting)
        assign(client, 1, "hang")
        assert "Resource temporarily unavailable" in expect(client, Refused).reason
        assert process.poll() is None and runs(found.ranks[0])
    assert population(client, lambda p: len(p.standbys) == STANDBYS).ranks == found.ranks


def test_a_standby_that_ends_at_once_is_not_forked_without_a_pause(tmp_path: Path) -> None:
    with running_imm(tmp_path, "/proc/none/such") as (process, client):
        # Each that starts is killed.
        client.send(Query())
        seen: set[int] = set()
        until = time.monotonic() + 4
        while (left := until - time.monotonic()) > 0:
            message = client.receive(left)
            for pid in set(message.starting if isinstance(message, Population) else ()) - seen:
                seen.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert process.poll() is None
        assert STANDBYS < len(seen) < STANDBYS * 10


def test_a_controller_that_does_not_read_does_not_stop_the_others(imm, tmp_path: Path) -> None:
    process, client = imm
    deaf = ImmClient(client.path)
    deaf.send(Query())
    for _ in range(8):
        client.send(Register(rank=1, arguments=bytes(60_000)))
    assert population(client)
    with pytest.raises(WorkerError, match="has gone"):
        while deaf.receive(5) is not None:
            pass
    deaf.close()
    assert process.poll() is None


def test_an_imm_that_dies_with_a_request_unread_is_gone_too(imm) -> None:
    """Linux answers with a reset, not with end of file, when the dead end of a socket had not read everything."""
    process, client = imm
    population(client, lambda p: len(p.standbys) == STANDBYS)
    process.send_signal(signal.SIGSTOP)
    client.send(Query())
    process.kill()
    process.wait()
    with pytest.raises(WorkerError, match="has gone"):
        while client.receive(5) is not None:
            pass
    with pytest.raises(WorkerError, match="has gone"):
        assign(client, 2, "hang")


def runs(pid: int) -> bool:
    """Not gone, and not a zombie that the machine's first process has yet to bury."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_client_without_an_imm_gives_up_at_its_deadline(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match="does not answer"):
        ImmClient(str(tmp_path / "nobody.sock"), timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_the_socket_is_private(imm, tmp_path: Path) -> None:
    assert (tmp_path / "imm.sock").stat().st_mode & 0o777 == 0o600
    assert isinstance(imm[1].sock, socket.socket)
