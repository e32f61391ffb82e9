"""The rank's connection to the coordinator: a thread that does the preparing and finishing work while decoding goes on.

It receives the requests of `wire.to_worker` from the coordinator and sends replies and what the rank reports.
ZMQ sockets belong to one thread, so other threads post through a queue and an eventfd. Commands run in workers, so that
a `DropColumns` can stop the pull it undoes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import zmq

from elasticmoe_sglang.errors import ElasticMoEError
from elasticmoe_sglang.wire.to_coordinator import FROM_WORKER, FromWorker
from elasticmoe_sglang.wire.to_worker import REQUESTS, Failed, Reply, Request

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Reply | None]


class WorkerAgent:
    """Args:
    endpoint: the coordinator's ROUTER socket.
    rank: our rank.
    handlers: request type -> function, run in a worker thread; what it returns is sent back. An
        `ElasticMoEError` becomes `Failed`; anything else is logged with its traceback and becomes `Failed` too.
    """

    def __init__(self, endpoint: str, rank: int, handlers: dict[type, Handler]) -> None:
        self._endpoint = endpoint
        self._rank = rank
        self._handlers = handlers
        self._outbox: deque[FromWorker] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix=f"elasticmoe-work-{rank}")
        self._thread = threading.Thread(target=self._run, name=f"elasticmoe-agent-{rank}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, message: FromWorker) -> None:
        """Send a message to the coordinator, from any thread."""
        self._outbox.append(message)
        os.eventfd_write(self._wake, 1)

    def run(self, action: Callable[[], None]) -> None:
        """Have a worker thread do something that nobody waits for."""
        self._workers.submit(action)

    def stop(self, timeout_s: float) -> None:
        """Send what is still queued and end the thread."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        context = zmq.Context(io_threads=1)
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"rank-{self._rank}-{os.getpid()}".encode())
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(self._endpoint)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                while self._outbox:
                    socket.send(FROM_WORKER.pack(self._outbox.popleft()))
                if self._stopping.is_set():
                    return
                if socket in ready:
                    self._workers.submit(self._serve, REQUESTS.unpack(socket.recv()))
        finally:
            socket.close()
            context.term()

    def _serve(self, request: Request) -> None:
        try:
            reply = self._handlers[type(request)](request)
        except ElasticMoEError as error:
            reply = Failed(rank=self._rank, operation_id=request.operation_id, reason=str(error))
        except Exception as error:
            logger.exception("rank %d failed to carry out %s", self._rank, type(request).__name__)
            reply = Failed(
                rank=self._rank, operation_id=request.operation_id, reason=f"{type(error).__name__}: {error}"
            )
        if reply is not None:
            self.post(reply)
