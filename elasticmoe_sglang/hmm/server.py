"""The HMM's event loop: commands from the ROUTER, links from the SEQPACKET socket, deadlines. One thread, no torch."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from elasticmoe_sglang.errors import ElasticMoEError, HmmError, MalformedMessage, SealTimeout
from elasticmoe_sglang.hmm.config import Endpoint, HmmConfig
from elasticmoe_sglang.hmm.endpoint import EndpointClaim
from elasticmoe_sglang.hmm.server_links import LinkTable
from elasticmoe_sglang.hmm.service import HmmService
from elasticmoe_sglang.hmm.vmm import get_backend
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import NO_REQUEST, Envelope, error_reply

log = logging.getLogger(__name__)

CLIENT_ID_BYTES = 32
_REMEMBERED_ANSWERS = 4096
_BATCH = 64
"""Commands handled before links and deadlines get their turn."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class _Waiter:
    identity: bytes
    client_id: str
    request: Envelope[to_hmm.Command]
    block_ids: list[int]
    deadline: float


class HmmServer:
    """Serves one endpoint: construct, `run`, `close`.

    Binding happens in the constructor, so clients may connect as soon as it returns.
    """

    def __init__(self, config: HmmConfig) -> None:
        _raise_descriptor_limit()
        self._config = config
        self._claim = EndpointClaim(Endpoint.parse(config.endpoint))
        self._router = self._claim.router
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self.service = HmmService(get_backend(config.backend), config.budgets, endpoint=self._claim.endpoint.url)
        self._links = LinkTable(self.service, self._claim.listener)
        self._answered: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._waiters: dict[tuple[str, str], _Waiter] = {}
        self._stopping = False

    def stop(self) -> None:
        """Ends `run` soon; may be called from a signal handler or another thread."""
        self._stopping = True
        self._wake_in.send(b"x")

    def wakeup_fd(self) -> int:
        """For signal.set_wakeup_fd."""
        return self._wake_in.fileno()

    def run(self) -> None:
        """Serves until `stop` is called or, if so configured, the parent is gone."""
        while not self._stopping and not self._orphaned():
            self._turn()

    def close(self) -> None:
        """Gives memory and socket files up. Clients see the end of file; what they have mapped stays theirs."""
        self._links.close()
        self._claim.close()
        self.service.close()
        self._wake_in.close()
        self._wake_out.close()

    def _turn(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_out.fileno(), zmq.POLLIN)
        for fd in self._links.descriptors():
            poller.register(fd, zmq.POLLIN)
        ready = {key for key, _ in poller.poll(self._patience_ms())}
        if self._wake_out.fileno() in ready:
            self._wake_out.recv(4096)
        self._links.serve({fd for fd in ready if isinstance(fd, int)})
        for _ in range(_BATCH):
            if not self._serve_one_command():
                break
        self.service.expire()
        self._answer_waiters()

    def _patience_ms(self) -> int:
        now = time.monotonic()
        deadlines = [w.deadline for w in self._waiters.values()]
        deadlines += [d for d in (self.service.txns.next_deadline(), self._links.next_deadline()) if d is not None]
        longest = 1.0 if self._config.exit_with_parent is not None else 60.0
        return max(0, int(1000 * (min([now + longest, *deadlines]) - now)) + 1)

    # Commands ----------------------------------------------------------------------------------------------------

    def _serve_one_command(self) -> bool:
        try:
            identity, *frames = self._router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            if len(frames) != 1:
                raise MalformedMessage(f"a command is one frame, {len(frames)} came")
            request = to_hmm.COMMANDS.decode(frames[0])
        except MalformedMessage as error:
            self.service.counters.malformed += 1
            log.warning("malformed command: %s", error)
            self._send(identity, self._encode(error.request_id or NO_REQUEST, None, error_reply(error)))
            return True
        self._serve_request(identity, request)
        return True

    def _serve_request(self, identity: bytes, request: Envelope[to_hmm.Command]) -> None:
        client_id = identity[:CLIENT_ID_BYTES].decode("ascii", "replace")
        key = (client_id, request.request_id)
        self.service.counters.requests += 1
        if key in self._waiters or key in self._answered:
            self.service.counters.replayed += 1
            if key in self._answered:
                self._send(identity, self._answered[key])
            return
        # Leases that the client returned before this command count before it.
        self._links.drain(client_id)
        if not self.service.is_attached(client_id):
            refusal = HmmError("a command came from a process that is not attached", hint="Use HmmClient.")
            self._send(identity, self._encode(request.request_id, request.epoch, error_reply(refusal)))
            return
        if isinstance(request.body, to_hmm.WaitSealed):
            deadline = time.monotonic() + request.deadline_s
            self._waiters[key] = _Waiter(
                identity=identity,
                client_id=client_id,
                request=request,
                block_ids=request.body.block_ids,
                deadline=deadline,
            )
            return
        self._answer(identity, client_id, request, self._execute(client_id, request))

    def _execute(self, client_id: str, request: Envelope[to_hmm.Command]) -> to_hmm.Answer:
        try:
            return self.service.execute(client_id, request.body)
        except ElasticMoEError as error:
            error.epoch = request.epoch if error.epoch is None else error.epoch
            return error_reply(error)
        except Exception as error:
            # One command must not end the owner of all memory; what it did is logged whole and counted.
            self.service.counters.internal_errors += 1
            log.exception("command %s failed unexpectedly", type(request.body).__name__)
            return error_reply(HmmError(f"the HMM failed at {type(request.body).__name__}: {error!r}"))

    def _answer(
        self, identity: bytes, client_id: str, request: Envelope[to_hmm.Command], answer: to_hmm.Answer
    ) -> None:
        frame = self._encode(request.request_id, request.epoch, answer)
        self._answered[client_id, request.request_id] = frame
        while len(self._answered) > _REMEMBERED_ANSWERS:
            self._answered.popitem(last=False)
        self._send(identity, frame)

    def _answer_waiters(self) -> None:
        now = time.monotonic()
        for key, waiter in list(self._waiters.items()):
            if not self.service.is_attached(waiter.client_id):
                del self._waiters[key]
                continue
            answer = self._seal_answer(waiter, now)
            if answer is not None:
                del self._waiters[key]
                self._answer(waiter.identity, waiter.client_id, waiter.request, answer)

    def _seal_answer(self, waiter: _Waiter, now: float) -> to_hmm.Answer | None:
        try:
            if self.service.sealed(waiter.block_ids):
                return to_hmm.Done()
        except HmmError as error:
            return error_reply(error)
        if now < waiter.deadline:
            return None
        missing = [i for i in waiter.block_ids if not self.service.sealed([i])]
        return error_reply(
            SealTimeout(
                f"{len(missing)} of {len(waiter.block_ids)} blocks were not sealed in time, such as block {missing[0]}",
                epoch=waiter.request.epoch,
                hint="The rank that fills them is slow or gone: see the clients in the status.",
            )
        )

    def _encode(self, request_id: str, epoch: int | None, answer: to_hmm.Answer) -> bytes:
        try:
            return to_hmm.ANSWERS.encode(Envelope(request_id=request_id, epoch=epoch, body=answer))
        except HmmError as error:
            return to_hmm.ANSWERS.encode(Envelope(request_id=request_id, epoch=epoch, body=error_reply(error)))

    def _send(self, identity: bytes, frame: bytes) -> None:
        # A ROUTER drops what it cannot deliver at once, so a client that does not read never stops the HMM.
        self._router.send_multipart([identity, frame], zmq.NOBLOCK)

    def _orphaned(self) -> bool:
        parent = self._config.exit_with_parent
        if parent is None or os.getppid() == parent:
            return False
        log.warning("the parent process %d is gone; the HMM ends with it", parent)
        return True


def serve_hmm(config: HmmConfig) -> None:
    """Serves until SIGTERM or SIGINT (handled where this is the main thread), or until the parent is gone."""
    server = HmmServer(config)
    try:
        with _signals(server, config):
            log.info(
                "HMM ready: endpoint %s, pid %d, backend %s, %d devices with %s MiB",
                server.service.endpoint,
                os.getpid(),
                config.backend,
                len(config.budgets),
                ", ".join(f"{budget / (1 << 20):.0f}" for budget in config.budgets),
            )
            if config.ready_fd is not None:
                os.write(config.ready_fd, b"ready\n")
                os.close(config.ready_fd)
            server.run()
    finally:
        server.close()
    log.info("HMM ended")


@contextlib.contextmanager
def _signals(server: HmmServer, config: HmmConfig) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[..., None]] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda *_: server.stop())
    if config.exit_with_parent is not None:
        # The kernel sends this when the *thread* that started us ends; so it only wakes the loop, which looks
        # whether the process is gone.
        handlers[signal.SIGUSR1] = lambda *_: None
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.set_wakeup_fd(server.wakeup_fd(), warn_on_full_buffer=False)
    if config.exit_with_parent is not None and _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1) != 0:
        raise HmmError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_descriptor_limit() -> None:
    """Every block is a descriptor; the usual soft limit of 1024 is for select(), which nothing here uses."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
