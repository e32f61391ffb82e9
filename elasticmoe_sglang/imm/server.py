"""The IMM's process: imports everything a rank needs once, then forks standby processes.

A fork shares the imported pages and takes milliseconds where a fresh interpreter needs several seconds of imports
(docs/adr/0002-imm-forks.md). Forking is only sound from a single thread, so this process starts no thread, opens no
ZMQ context and initialises no device; it checks that before every fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from elasticmoe_sglang.errors import ProtocolError, WorkerError
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.envelope import Codec
from elasticmoe_sglang.wire.seqpacket import listen, peer_credentials, receive_bytes, send_packet
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, FromImm, WorkerExited, WorkerNote
from elasticmoe_sglang.wire.to_worker import ENTER, Enter

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
# SGLang's scheduler sends this to its parent when it hits an exception.
_CHILD_COMPLAINTS = (signal.SIGQUIT, signal.SIGUSR1)

WorkerMain = Callable[["StandbyChannel", Enter], int]
_FROM_CHILD: Codec[to_imm.StandbyReady | WorkerNote] = Codec(to_imm.StandbyReady | WorkerNote)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, and leave it to the parent when that is: Ctrl-C and a
    supervisor's SIGTERM may go to the whole process group, and running requests need this process until they end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class StandbyChannel:
    """A standby's or rank's end of its line to the IMM."""

    sock: socket.socket

    def note(self, rank: int, note: bytes) -> None:
        """Tell every controller something about this rank."""
        send_packet(self.sock, _FROM_CHILD.pack(WorkerNote(rank=rank, note=note)))

    def wait_to_enter(self) -> Enter | None:
        """Say that this process is ready and block until a rank is assigned; None when the IMM has gone."""
        with contextlib.suppress(BrokenPipeError):  # the end of file says so too
            send_packet(self.sock, _FROM_CHILD.pack(to_imm.StandbyReady()))
        frame = receive_bytes(self.sock)
        return ENTER.unpack(frame) if frame else None


@dataclass
class _Child:
    """ready: it has everything imported and waits for `Enter`, or has waited."""

    pid: int
    sock: socket.socket
    rank: int | None = None
    ready: bool = False


class ImmServer:
    """Serves the IMM's socket until its parent ends.

    Args:
        socket_path: where controllers connect (SEQPACKET, mode 0600; peers of another uid are refused).
        worker_main: runs in the forked child once it is assigned a rank; returns the exit status.
        standbys: how many idle processes to keep, never more than there are inactive ranks.
        capacity: number of ranks (max_ep_size).
        become: replaces a forked child by another program that waits at the channel itself (where what ranks import
            does not survive a fork: CUDA). None: the child waits.
    """

    def __init__(
        self,
        socket_path: str,
        worker_main: WorkerMain,
        *,
        standbys: int,
        capacity: int,
        become: Callable[[StandbyChannel], None] | None = None,
    ) -> None:
        self._path = socket_path
        self._worker_main = worker_main
        self._standbys = standbys
        self._capacity = capacity
        self._become = become
        self._arguments: dict[int, bytes] = {}
        self._children: dict[int, _Child] = {}
        self._controllers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)
        self._listener = listen(socket_path)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Runs until killed (its parent's end does that)."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for complaint in _CHILD_COMPLAINTS:
            signal.signal(complaint, lambda *_: None)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._reap)
        # A rank's collections need not visit what was imported here: with SGLang's modules that takes half of a
        # joining rank's boot, and because a visit writes to the object, it unshares its page.
        gc.collect()
        gc.freeze()
        self._refill()
        logger.info("IMM ready at %s with %d standbys", self._path, len(self._idle()))
        while True:
            for key, _ in self._selector.select():
                key.data(key.fileobj)

    # -- children -----------------------------------------------------------------------------------------------

    def _idle(self) -> list[_Child]:
        return [child for child in self._children.values() if child.rank is None]

    def _refill(self) -> None:
        assigned = sum(child.rank is not None for child in self._children.values())
        while len(self._idle()) < min(self._standbys, self._capacity - assigned):
            self._fork()
        self._tell(self._population())

    def _population(self) -> to_imm.Population:
        idle = self._idle()
        return to_imm.Population(
            ranks={child.rank: child.pid for child in self._children.values() if child.rank is not None},
            standbys=[child.pid for child in idle if child.ready],
            starting=[child.pid for child in idle if not child.ready],
        )

    def _fork(self) -> _Child:
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise WorkerError(
                f"the IMM has {threads} threads and cannot fork safely",
                hint="A module imported by the ranks starts a thread at import; report it with `elasticmoe doctor`.",
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._run_child(ours, theirs)
        theirs.close()
        child = _Child(pid=pid, sock=ours)
        self._children[pid] = child
        self._selector.register(ours, selectors.EVENT_READ, partial(self._child_says, child))
        return child

    def _run_child(self, ours: socket.socket, theirs: socket.socket) -> None:
        status = 1
        try:
            die_with_parent()
            self._forget_parent_state()
            ours.close()
            channel = StandbyChannel(theirs)
            if self._become is not None:
                self._become(channel)
            entered = channel.wait_to_enter()
            status = 0 if entered is None else self._worker_main(channel, entered)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _forget_parent_state(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *_CHILD_COMPLAINTS):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        self._listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        for controller in self._controllers.values():
            controller.close()
        for child in self._children.values():
            child.sock.close()

    def _reap(self, _fileobj: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self._buried(pid, os.waitstatus_to_exitcode(status))
        self._refill()

    def _buried(self, pid: int, status: int) -> None:
        child = self._children.pop(pid, None)
        if child is None:
            return
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.sock)
        child.sock.close()
        if child.rank is None:
            logger.warning("a standby process (pid %d) ended with status %d; another takes its place", pid, status)
            return
        logger.info("the process in rank %d (pid %d) ended with status %d", child.rank, pid, status)
        self._tell(WorkerExited(rank=child.rank, pid=pid, status=status))

    def _child_says(self, child: _Child, _fileobj: object) -> None:
        frame = receive_bytes(child.sock) if child.sock.fileno() >= 0 else b""
        if not frame:  # the child is ending; SIGCHLD follows, or was dealt with earlier in this round
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(child.sock)
            return
        message = _FROM_CHILD.unpack(frame)
        if isinstance(message, WorkerNote):
            self._tell(message)
        else:
            child.ready = True
            self._tell(self._population())

    # -- controllers --------------------------------------------------------------------------------------------

    def _accept(self, _fileobj: object) -> None:
        sock, _ = self._listener.accept()
        _, uid = peer_credentials(sock)
        if uid != os.getuid():
            logger.warning("refused a connection from uid %d", uid)
            sock.close()
            return
        self._controllers[sock.fileno()] = sock
        self._selector.register(sock, selectors.EVENT_READ, self._controller_says)

    def _controller_says(self, fileobj: object) -> None:
        assert isinstance(fileobj, socket.socket)
        try:
            frame = receive_bytes(fileobj)
            if frame:
                self._handle(fileobj, to_imm.REQUESTS.unpack(frame))
                return
        except ProtocolError as error:
            _refuse(fileobj, -1, str(error))
            return
        self._controllers.pop(fileobj.fileno(), None)
        self._selector.unregister(fileobj)
        fileobj.close()

    def _handle(self, sock: socket.socket, request: to_imm.Request) -> None:
        if isinstance(request, to_imm.Register):
            self._arguments[request.rank] = request.arguments
        elif isinstance(request, to_imm.Assign):
            self._assign(sock, request)
        elif isinstance(request, to_imm.KillWorker):
            for child in self._children.values():
                if child.rank == request.rank:
                    os.kill(child.pid, signal.SIGKILL)
        else:
            _send(sock, FROM_IMM.pack(self._population()))

    def _assign(self, sock: socket.socket, request: to_imm.Assign) -> None:
        rank = request.join_spec.rank
        if any(child.rank == rank for child in self._children.values()):
            _refuse(sock, rank, f"rank {rank} is taken")
            return
        arguments = self._arguments.get(rank)
        if arguments is None:
            _refuse(sock, rank, f"rank {rank} was never registered")
            return
        packet = ENTER.pack(Enter(arguments=arguments, join_spec=request.join_spec))
        idle = sorted(self._idle(), key=lambda child: not child.ready)  # the ready ones first
        child = idle[0] if idle else self._fork()
        child.rank = rank
        _send(child.sock, packet)
        self._tell(to_imm.Assigned(rank=rank, pid=child.pid))
        self._refill()

    def _tell(self, message: FromImm) -> None:
        packet = FROM_IMM.pack(message)
        for controller in self._controllers.values():
            _send(controller, packet)


def _send(sock: socket.socket, packet: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed elsewhere
        send_packet(sock, packet)


def _refuse(sock: socket.socket, rank: int, reason: str) -> None:
    _send(sock, FROM_IMM.pack(to_imm.Refused(rank=rank, reason=reason)))
