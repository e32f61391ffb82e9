"""Child processes that have SGLang imported already, because they are forks of the main process.

Importing SGLang takes about 15 seconds of a core, and the launch starts three processes that need it: the IMM, the
data-parallel controller and the detokenizer. Forks share the imported pages with the main process too. Forking is only
sound from a single thread, so it happens before the launch starts one; where there are several already, or descriptors
that a fork would keep open, the processes are started as before, by Popen and by multiprocessing's "spawn".
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import context, forkserver, popen_fork, popen_forkserver, reduction, spawn, util
from typing import Any, NoReturn

_HEADER = struct.Struct("!II")
"""Number of descriptors; bytes of the environment, which follows."""
# What the standard library's own start methods use, and its type stubs leave out.
_spawn: Any = spawn
_forkserver: Any = forkserver
_spawn_process: Any = context.SpawnProcess
_duplicated: Any = popen_forkserver._DupFd
_set_spawning: Any = context.set_spawning_popen

_waiting: list[tuple[int, socket.socket]] = []


def possible() -> bool:
    """Whether this process may fork: it has one thread, and no socket or pipe of its own that others wait to see
    closed."""
    if len(os.listdir("/proc/self/task")) > 1:
        return False
    return not any(_is_own_channel(int(name)) for name in os.listdir("/proc/self/fd"))


def _is_own_channel(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
        # What is inheritable was inherited: the programs that this process starts have it too.
        return fd > 2 and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)) and not os.get_inheritable(fd)
    except OSError:  # the listing's own descriptor
        return False


def fork(run: Callable[[], int]) -> int:
    """Fork a child that calls `run` and exits with its result; the child's pid.

    Signals have their default effect in the child, and its standard input is empty, as in a program started anew.
    """
    if not gc.get_freeze_count():
        # A collection writes to every object it visits, and so unshares the page: 40 to 70 MB in each process.
        gc.collect()
        gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid == 0:
        _child(run)
    return pid


def _child(run: Callable[[], int]) -> NoReturn:
    status = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        for _, sock in _waiting:
            sock.close()
        _waiting.clear()
        status = run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


class ForkedProcess:
    """A child by its pid, with the part of `subprocess.Popen` that its starter needs.

    Attributes:
        returncode: as subprocess.Popen's; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for its end."""
        return self._wait(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


# Processes of multiprocessing ----------------------------------------------------------------------------------------


def prepare(number: int, close: Callable[[], None]) -> None:
    """Fork children that wait for a process of multiprocessing to run, see `used`.

    They end with this process if there is none for them.

    Args:
        close: called in each child first, to close what it must not keep open.
    """
    for _ in range(number):
        ours, theirs = socket.socketpair()

        def run(sock: socket.socket = theirs, other: socket.socket = ours) -> int:
            other.close()
            close()
            return _run_one(sock)

        pid = fork(run)
        theirs.close()
        _waiting.append((pid, ours))


def _run_one(sock: socket.socket) -> int:
    header = _receive(sock, _HEADER.size)
    if not header:
        return 0
    descriptors, length = _HEADER.unpack(header)
    _set_environment(json.loads(_receive(sock, length)))
    fds = reduction.recvfds(sock, descriptors) if descriptors else []
    _forkserver._forkserver._inherited_fds = fds
    channel = sock.detach()
    return int(_spawn._main(channel, os.dup(channel)))


def _set_environment(wanted: dict[str, str]) -> None:
    """Only what differs: setproctitle looks for this process's title behind its first environment."""
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: text for name, text in wanted.items() if os.environ.get(name) != text})


def _receive(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer where the other end was closed."""
    received = b""
    while len(received) < count and (more := sock.recv(count - len(received))):
        received += more
    return received


class _Popen(popen_fork.Popen):
    """What multiprocessing's "spawn" sends to a program that it starts goes to a child that waits."""

    method = "spawn"
    DupFd = _duplicated

    def __init__(self, process: Any) -> None:
        self._fds: list[int] = []
        super().__init__(process)

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process: Any) -> None:
        payload = io.BytesIO()
        _set_spawning(self)
        try:
            reduction.dump(_spawn.get_preparation_data(process.name), payload)
            reduction.dump(process, payload)
        finally:
            _set_spawning(None)
        self.pid, sock = _waiting.pop(0)
        # The child's end is closed when it ends.
        self.sentinel = sock.fileno()
        self.finalizer = util.Finalize(self, sock.close)
        environment = json.dumps(dict(os.environ)).encode()
        sock.sendall(_HEADER.pack(len(self._fds), len(environment)) + environment)
        if self._fds:
            reduction.sendfds(sock, self._fds)
        sock.sendall(payload.getbuffer())


def dismiss() -> None:
    """End the children for which there was no process."""
    while _waiting:
        pid, sock = _waiting.pop()
        sock.close()
        os.waitpid(pid, 0)


def _any_waits() -> bool:
    while _waiting and os.waitpid(_waiting[0][0], os.WNOHANG)[0]:  # it has died
        _waiting.pop(0)[1].close()
    return bool(_waiting)


@contextmanager
def used() -> Iterator[None]:
    """Processes that multiprocessing spawns in this context run in the children that `prepare` made, while there are
    any."""
    spawned = _spawn_process._Popen
    _spawn_process._Popen = staticmethod(lambda process: _Popen(process) if _any_waits() else spawned(process))
    try:
        yield
    finally:
        _spawn_process._Popen = staticmethod(spawned)
