"""The coordinator's line to the IMM, which outlives IMMs: another one is started and adopts the workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from elasticmoe_sglang.descriptors import descriptors_left
from elasticmoe_sglang.errors import ElasticMoEError, ProtocolError, WorkerError
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.imm.server import exit_status
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.seqpacket import close_all
from elasticmoe_sglang.wire.to_coordinator import FromImm, WorkerExited

logger = logging.getLogger(__name__)

_LISTENS_WITHIN_S = 120.0
_LOOK_S = 0.05
_ASK_AGAIN_S = 1.0
_BACKOFF_S, _MOST_BACKOFF_S = 0.2, 10.0


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """The process in a rank. pidfd: from the IMM that started it, so it is no other process of the same number."""

    pid: int
    pidfd: int


class ImmLine:
    """Runs in the coordinator's event loop. While there is no IMM it reports exits itself, and requests wait.

    Args:
        path: the IMM's socket.
        on_message: called with every message of the IMM, and with those that stand in for one that has ended.
        start: starts another IMM; None when the server is ending.
    """

    def __init__(
        self, path: str, on_message: Callable[[FromImm], None], start: Callable[[], subprocess.Popen[bytes] | None]
    ) -> None:
        self._path = path
        self._on_message = on_message
        self._start = start
        self._client: ImmClient | None = None
        self._workers: dict[int, _Worker] = {}
        self._arguments: dict[int, bytes] = {}
        self._unanswered: dict[int, to_imm.Assign] = {}
        self._replacing: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Connect to the IMM that runs, and learn what it has done before."""
        self._use(ImmClient(self._path))
        self._send(to_imm.Query())

    def close(self) -> None:
        if self._replacing is not None:
            self._replacing.cancel()
        self._watch_workers(False)
        self._hang_up()
        for worker in self._workers.values():
            os.close(worker.pidfd)
        self._workers.clear()

    def tell(self, request: to_imm.Request) -> None:
        """Send a request, if need be to the next IMM."""
        if isinstance(request, to_imm.Assign):
            if descriptors_left() < 0:
                self._refuse(request.join_spec.rank)
                return
            self._unanswered[request.join_spec.rank] = request
        elif isinstance(request, to_imm.Register):
            self._arguments[request.rank] = request.arguments
        elif isinstance(request, to_imm.KillWorker):
            self._unanswered.pop(request.rank, None)
            self._kill(request.rank)
        self._send(request)

    def _refuse(self, rank: int) -> None:
        """Before a worker connects to a process that cannot accept it."""
        reason = "the main process has no descriptor left for another worker: raise its limit of open files"
        asyncio.get_running_loop().call_soon(self._on_message, to_imm.Refused(rank=rank, reason=reason))

    def _kill(self, rank: int) -> None:
        worker = self._workers.get(rank)
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _send(self, request: to_imm.Request, fds: Sequence[int] = ()) -> None:
        if self._client is not None:
            try:
                self._client.send(request, fds)
            except WorkerError as error:  # mostly it has ended; what it had said before is read first
                logger.warning("%s was not sent to the IMM: %s", type(request).__name__, error)

    # -- what the IMM says ----------------------------------------------------------------------------------------

    def _use(self, client: ImmClient) -> None:
        self._client = client
        asyncio.get_running_loop().add_reader(client.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._client is not None
        try:
            message, fds = self._client.receive_now()
        except WorkerError:
            self._lost()
            return
        except ProtocolError as error:
            logger.error("a message of the IMM was not received: %s; it is asked what there is", error)
            asyncio.get_running_loop().call_later(_ASK_AGAIN_S, self._send, to_imm.Query())
            return
        try:
            self._heard(message, fds)
        finally:
            close_all(fds)

    def _heard(self, message: FromImm, fds: list[int]) -> None:
        if isinstance(message, to_imm.Registered):
            self._arguments[message.rank] = message.arguments
            return
        if isinstance(message, to_imm.Assigned):
            self._unanswered.pop(message.rank, None)
            self._forget(message.rank)
            self._workers[message.rank] = _Worker(pid=message.pid, pidfd=fds.pop())
        elif isinstance(message, to_imm.Refused):
            self._unanswered.pop(message.rank, None)
        elif isinstance(message, WorkerExited):
            worker = self._workers.get(message.rank)
            if worker is None or worker.pid != message.pid:  # reported already, while there was no IMM
                return
            status = self._forget(message.rank)
            message = message if message.status is not None else msgspec.structs.replace(message, status=status)
        elif isinstance(message, to_imm.Population):
            # An IMM that has not adopted the workers yet knows of none.
            message = msgspec.structs.replace(message, ranks=self._ranks())
        self._on_message(message)

    def _ranks(self) -> dict[int, int]:
        return {rank: worker.pid for rank, worker in self._workers.items()}

    def _forget(self, rank: int) -> int | None:
        """The exit status of the rank's process, if it has ended and is known."""
        worker = self._workers.pop(rank, None)
        if worker is None:
            return None
        try:
            # Orphans become children of process 1, which this one is in some containers: then it has to bury them.
            return exit_status(worker.pidfd) if _has_ended(worker.pidfd) else None
        finally:
            os.close(worker.pidfd)

    # -- without an IMM -------------------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        if self._client is not None:
            asyncio.get_running_loop().remove_reader(self._client.fileno())
            self._client.close()
            self._client = None

    def _lost(self) -> None:
        self._hang_up()
        if self._replacing is None or self._replacing.done():
            self._replacing = asyncio.get_running_loop().create_task(self._replace())

    async def _replace(self) -> None:
        since, backoff_s = time.monotonic(), _BACKOFF_S
        while self._client is None:
            self._on_message(to_imm.Population(ranks=self._ranks(), standbys=[], starting=[]))
            self._watch_workers(True)
            try:
                process = self._start()
                if process is None:
                    return
                logger.error("the IMM has ended; its workers go on, and another IMM (pid %d) starts", process.pid)
                client = await self._listening(process)
                self._use(client)
                self._hand_over(client)
            except (ElasticMoEError, OSError) as error:
                logger.error("no IMM could be started: %s; the next attempt follows in %.1f s", error, backoff_s)
                self._hang_up()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)
                continue
            self._watch_workers(False)
        logger.warning(
            "an IMM watches the workers of %s again after %.2f s", list(self._workers), time.monotonic() - since
        )

    async def _listening(self, process: subprocess.Popen[bytes]) -> ImmClient:
        deadline = time.monotonic() + _LISTENS_WITHIN_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise WorkerError(f"it ended with status {process.returncode}", hint="Its log says why")
            with contextlib.suppress(WorkerError):
                return ImmClient(self._path, timeout_s=0)
            await asyncio.sleep(_LOOK_S)
        raise WorkerError(f"it does not listen after {_LISTENS_WITHIN_S:g} s")

    def _hand_over(self, client: ImmClient) -> None:
        """Tell another IMM what the one before knew, and ask again for what it had not done.

        Raises:
            WorkerError: it has ended, or does not read.
        """
        for rank, arguments in self._arguments.items():
            client.send(to_imm.Register(rank=rank, arguments=arguments))
        client.send(to_imm.AdoptWorkers(ranks=self._ranks()), [worker.pidfd for worker in self._workers.values()])
        for request in list(self._unanswered.values()):
            client.send(request)
        client.send(to_imm.Query())

    def _watch_workers(self, watch: bool) -> None:
        loop = asyncio.get_running_loop()
        for rank, worker in self._workers.items():
            if watch:
                loop.add_reader(worker.pidfd, self._ended, rank)
            else:
                loop.remove_reader(worker.pidfd)

    def _ended(self, rank: int) -> None:
        worker = self._workers[rank]
        asyncio.get_running_loop().remove_reader(worker.pidfd)
        status = self._forget(rank)
        self._on_message(WorkerExited(rank=rank, pid=worker.pid, status=status))


def _has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
