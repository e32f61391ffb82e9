"""The IMM's process: imports everything a rank needs once, then forks standby processes.

A fork shares the imported pages and takes milliseconds where a fresh interpreter needs several seconds of imports
(docs/adr/0002-imm-forks.md). Forking is only sound from a single thread, so this process starts no thread, opens no
ZMQ context and initialises no device; it counts its threads before every fork.

Nothing here depends on this process going on: standbys end with it, workers do not, and the next IMM adopts them.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from elasticmoe_sglang.errors import ProtocolError, WorkerError
from elasticmoe_sglang.lifeline import leave_signals_to_main, tie
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.envelope import Codec
from elasticmoe_sglang.wire.seqpacket import (
    close_all,
    listen,
    peer_credentials,
    receive_bytes,
    receive_packet,
    send_packet,
)
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, FromImm, WorkerExited, WorkerNote
from elasticmoe_sglang.wire.to_worker import ENTER, Enter

logger = logging.getLogger(__name__)

# SGLang's scheduler sends this to its parent when it hits an exception.
_CHILD_COMPLAINTS = (signal.SIGQUIT, signal.SIGUSR1)
# A controller that does not read for so long is dropped, so that it cannot stop the others.
_SEND_S = 5.0
_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 5.0
# Two failures this far apart have nothing to do with each other.
_CALM_S = 10.0

WorkerMain = Callable[["StandbyChannel", Enter], int]
_FROM_CHILD: Codec[to_imm.StandbyReady | WorkerNote] = Codec(to_imm.StandbyReady | WorkerNote)


@dataclass
class StandbyChannel:
    """A standby's or rank's end of its line to the IMM."""

    sock: socket.socket

    def note(self, rank: int, note: bytes) -> None:
        """Tell every controller something about this rank, unless the IMM has gone: only a launch needs it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_packet(self.sock, _FROM_CHILD.pack(WorkerNote(rank=rank, note=note)))

    def wait_to_enter(self) -> Enter | None:
        """Say that this process is ready and block until a rank is assigned; None when the IMM has gone."""
        with contextlib.suppress(BrokenPipeError):  # the end of file says so too
            send_packet(self.sock, _FROM_CHILD.pack(to_imm.StandbyReady()))
        frame = receive_bytes(self.sock)
        # What it said last does not count: whoever asked for it asks the next IMM.
        return ENTER.unpack(frame) if frame and not self._hung_up() else None

    def _hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self.sock, 0)
        return bool(poller.poll(0))


@dataclass
class _Child:
    """sock: None for a worker of an earlier IMM. ready: it has everything imported and waits for `Enter`, or has
    waited."""

    pid: int
    pidfd: int
    sock: socket.socket | None
    rank: int | None = None
    ready: bool = False
    incarnation: int = 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


def _assigned(child: _Child, rank: int) -> to_imm.Assigned:
    return to_imm.Assigned(rank=rank, pid=child.pid, incarnation=child.incarnation)


def exit_status(pidfd: int) -> int | None:
    """Buries a process that has ended; its status as os.waitstatus_to_exitcode's, or None if it is no child of this
    one."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


class ImmServer:
    """Serves the IMM's socket until killed.

    Args:
        socket_path: where controllers connect (SEQPACKET, mode 0600; peers of another uid are refused).
        worker_main: runs in the forked child once it is assigned a rank; returns the exit status.
        standbys: how many idle processes to keep, never more than there are inactive ranks.
        capacity: number of ranks (max_ep_size).
        lifeline: path of the main process's `Lifeline`, with which every child ends.
        become: replaces a forked child by another program that waits at the channel itself (where what ranks import
            does not survive a fork). None: the child waits.
        warm: called in a child that waits, before it says that it is ready.
        fork_safe_threads: beginnings of the names of threads with which forking is sound all the same.
    """

    def __init__(
        self,
        socket_path: str,
        worker_main: WorkerMain,
        *,
        standbys: int,
        capacity: int,
        lifeline: str,
        become: Callable[[StandbyChannel], None] | None = None,
        warm: Callable[[], None] | None = None,
        fork_safe_threads: tuple[str, ...] = (),
    ) -> None:
        self._path = socket_path
        self._worker_main = worker_main
        self._standbys = standbys
        self._capacity = capacity
        self._lifeline = lifeline
        self._become = become
        self._warm = warm
        self._fork_safe_threads = fork_safe_threads
        self._arguments: dict[int, bytes] = {}
        self._children: dict[int, _Child] = {}
        self._controllers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._backoff_s = _BACKOFF_S
        self._failed_at = float("-inf")
        self._refill_due = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)
        self._listener = listen(socket_path)

    def serve(self) -> None:
        """Runs until killed."""
        for complaint in _CHILD_COMPLAINTS:
            signal.signal(complaint, lambda *_: None)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        # A rank's collections need not visit what was imported here: with SGLang's modules that takes half of a
        # joining rank's boot, and because a visit writes to the object, it unshares its page.
        gc.collect()
        gc.freeze()
        self._refill()
        logger.info("IMM ready at %s with %d standbys", self._path, len(self._idle()))
        while True:
            timeout_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, _ in self._selector.select(timeout_s):
                # What an earlier one of this round has closed is not looked at any more.
                if self._selector.get_map().get(key.fd) == key:
                    key.data(key.fileobj)
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), call))

    # -- children -----------------------------------------------------------------------------------------------

    def _idle(self) -> list[_Child]:
        return [child for child in self._children.values() if child.rank is None]

    def _refill(self) -> None:
        """Fork standbys up to the number wanted. What goes wrong with a standby harms no worker: it is tried again."""
        try:
            while not self._refill_due and len(self._idle()) < self._wanted():
                self._fork()
        except (OSError, WorkerError) as error:
            logger.error("no standby could be started: %s", error)
            self._refill_later()
        self._tell(self._population())

    def _wanted(self) -> int:
        assigned = sum(child.rank is not None for child in self._children.values())
        return max(0, min(self._standbys, self._capacity - assigned))

    def _refill_later(self) -> None:
        now = time.monotonic()
        if now - self._failed_at > _CALM_S:
            self._backoff_s = _BACKOFF_S
        self._failed_at = now
        if not self._refill_due:
            self._refill_due = True
            logger.info("standbys are refilled in %.1f s", self._backoff_s)
            self._later(self._backoff_s, self._refill_again)
            self._backoff_s = min(2 * self._backoff_s, _MOST_BACKOFF_S)

    def _refill_again(self) -> None:
        self._refill_due = False
        self._refill()

    def _population(self) -> to_imm.Population:
        idle = self._idle()
        return to_imm.Population(
            ranks={child.rank: child.pid for child in self._children.values() if child.rank is not None},
            standbys=[child.pid for child in idle if child.ready],
            starting=[child.pid for child in idle if not child.ready],
        )

    def _fork(self) -> _Child:
        """Raises OSError when the system has no room for another process, WorkerError when forking is not safe."""
        threads = self._threads()
        if threads:
            raise WorkerError(
                f"the IMM has other threads ({', '.join(threads)}) and cannot fork safely",
                hint="A module imported by the ranks starts a thread at import; report it with `elasticmoe doctor`.",
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                self._run_child(ours, theirs)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)  # it cannot be watched
                os.waitpid(pid, 0)
                raise
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        child = _Child(pid=pid, pidfd=pidfd, sock=ours)
        self._watch(child)
        self._selector.register(ours, selectors.EVENT_READ, partial(self._child_says, child))
        return child

    def _threads(self) -> list[str]:
        """Names of this process's other threads with which forking is not sound."""
        found = []
        for task in os.listdir("/proc/self/task"):
            if int(task) != os.getpid():
                with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/comm") as file:
                    found.append(file.read().strip())
        return [name for name in found if not name.startswith(self._fork_safe_threads)]

    def _watch(self, child: _Child) -> None:
        self._children[child.pid] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._ended, child))

    def _run_child(self, ours: socket.socket, theirs: socket.socket) -> None:
        status = 1
        try:
            leave_signals_to_main()
            tie(self._lifeline)
            self._forget_parent_state()
            ours.close()
            channel = StandbyChannel(theirs)
            if self._become is not None:
                self._become(channel)
            if self._warm is not None:
                self._warm()
            entered = channel.wait_to_enter()
            status = 0 if entered is None else self._worker_main(channel, entered)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _forget_parent_state(self) -> None:
        for complaint in _CHILD_COMPLAINTS:
            signal.signal(complaint, signal.SIG_DFL)
        self._selector.close()
        self._listener.close()
        for controller in self._controllers.values():
            controller.close()
        for child in self._children.values():
            os.close(child.pidfd)
            if child.sock is not None:
                child.sock.close()

    def _ended(self, child: _Child, _fileobj: object) -> None:
        status = exit_status(child.pidfd)
        del self._children[child.pid]
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        if child.sock is not None:
            self._hang_up(child.sock)
        if child.rank is None:
            logger.warning("a standby process (pid %d) ended with status %s", child.pid, status)
            self._refill_later()  # one that ends at once would be replaced without a pause
            self._tell(self._population())
            return
        logger.info("the process in rank %d (pid %d) ended with status %s", child.rank, child.pid, status)
        self._tell(WorkerExited(rank=child.rank, pid=child.pid, status=status))
        self._refill()

    def _hang_up(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(sock)
            sock.close()

    def _child_says(self, child: _Child, _fileobj: object) -> None:
        assert child.sock is not None
        frame = receive_bytes(child.sock)
        if not frame:  # the child is ending
            self._selector.unregister(child.sock)
            return
        try:
            message = _FROM_CHILD.unpack(frame)
        except ProtocolError as error:
            logger.error("process %d said what cannot be understood: %s", child.pid, error)
            return
        if isinstance(message, WorkerNote):
            self._tell(message)
        else:
            child.ready = True
            self._tell(self._population())

    # -- controllers --------------------------------------------------------------------------------------------

    def _accept(self, _fileobj: object) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # it did not wait
            return
        except OSError as error:  # no descriptor is left, say; whoever waits to be accepted waits on
            logger.error("a connection could not be accepted: %s", error)
            self._selector.unregister(self._listener)
            self._later(_BACKOFF_S, self._accept_again)
            return
        _, uid = peer_credentials(sock)
        if uid != os.getuid():
            logger.warning("refused a connection from uid %d", uid)
            sock.close()
            return
        sock.settimeout(_SEND_S)
        self._controllers[sock.fileno()] = sock
        self._selector.register(sock, selectors.EVENT_READ, self._controller_says)

    def _accept_again(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _controller_says(self, fileobj: object) -> None:
        assert isinstance(fileobj, socket.socket)
        fds: list[int] = []
        try:
            frame, fds = receive_packet(fileobj)
            if frame:
                self._handle(fileobj, to_imm.REQUESTS.unpack(frame), fds)
                return
        except ProtocolError as error:
            logger.warning("refused a request: %s", error)
            self._refuse(fileobj, -1, str(error))
            return
        except ConnectionResetError:  # it died with our packets unread
            pass
        finally:
            close_all(fds)
        self._drop(fileobj)

    def _drop(self, controller: socket.socket) -> None:
        self._controllers.pop(controller.fileno(), None)
        self._hang_up(controller)

    def _handle(self, sock: socket.socket, request: to_imm.Request, fds: list[int]) -> None:
        if isinstance(request, to_imm.Register):
            self._arguments[request.rank] = request.arguments
            self._tell(to_imm.Registered(rank=request.rank, arguments=request.arguments), but=sock)
        elif isinstance(request, to_imm.Assign):
            self._assign(sock, request)
        elif isinstance(request, to_imm.KillWorker):
            for child in self._children.values():
                if child.rank == request.rank:
                    child.kill()
        elif isinstance(request, to_imm.AdoptWorkers):
            self._adopt(request, fds)
        else:
            for rank, arguments in self._arguments.items():
                self._send(sock, to_imm.Registered(rank=rank, arguments=arguments))
            for child in self._children.values():
                if child.rank is not None:
                    self._send(sock, _assigned(child, child.rank), [child.pidfd])
            self._send(sock, self._population())

    def _adopt(self, request: to_imm.AdoptWorkers, fds: list[int]) -> None:
        if len(fds) != len(request.ranks):
            raise ProtocolError(f"{len(request.ranks)} workers were handed over with {len(fds)} pidfds")
        taken = {child.rank for child in self._children.values()}
        for (rank, pid), fd in zip(request.ranks.items(), fds, strict=True):
            if rank not in taken:
                self._watch(_Child(pid=pid, pidfd=os.dup(fd), sock=None, rank=rank, ready=True))
        logger.info("this IMM watches the workers of ranks %s, started by an earlier one", sorted(request.ranks))
        self._trim()
        self._tell(self._population())

    def _trim(self) -> None:
        """End standbys for which no rank is left."""
        for child in self._idle()[self._wanted() :]:
            child.kill()

    def _assign(self, sock: socket.socket, request: to_imm.Assign) -> None:
        rank = request.join_spec.rank
        if any(child.rank == rank for child in self._children.values()):
            self._refuse(sock, rank, f"rank {rank} is taken")
            return
        arguments = self._arguments.get(rank)
        if arguments is None:
            self._refuse(sock, rank, f"rank {rank} was never registered")
            return
        packet = ENTER.pack(Enter(arguments=arguments, join_spec=request.join_spec))
        idle = sorted(self._idle(), key=lambda child: not child.ready)  # the ready ones first
        try:
            child = idle[0] if idle else self._fork()
        except (OSError, WorkerError) as error:
            self._refuse(sock, rank, f"no process could be started for rank {rank}: {error}")
            return
        child.rank, child.incarnation = rank, request.join_spec.incarnation
        # Before the worker hears it: whatever becomes of this process, somebody watches that one.
        self._tell(_assigned(child, rank), fds=[child.pidfd])
        assert child.sock is not None
        try:
            send_packet(child.sock, packet)
        except OSError as error:
            logger.error("rank %d could not be assigned to process %d: %s", rank, child.pid, error)
            child.kill()  # where it has not ended by itself; its exit is reported
        self._refill()

    def _refuse(self, sock: socket.socket, rank: int, reason: str) -> None:
        self._send(sock, to_imm.Refused(rank=rank, reason=reason))

    def _tell(self, message: FromImm, *, fds: Sequence[int] = (), but: socket.socket | None = None) -> None:
        for controller in list(self._controllers.values()):
            if controller is not but:
                self._send(controller, message, fds)

    def _send(self, controller: socket.socket, message: FromImm, fds: Sequence[int] = ()) -> None:
        if controller.fileno() < 0:  # dropped meanwhile
            return
        try:
            send_packet(controller, FROM_IMM.pack(message), fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # its end of file follows
        except OSError as error:  # it does not read, or the system has no memory for the packet
            logger.error("a controller could not be told %s and is dropped: %s", type(message).__name__, error)
            self._drop(controller)
