"""A client's attachment to one HMM: the SEQPACKET link that keeps it alive there, and its command sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import zmq

from elasticmoe_sglang.errors import ElasticMoEError, HmmUnavailable, MalformedMessage, ProtocolError
from elasticmoe_sglang.hmm.config import Endpoint
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import NO_REQUEST, Envelope, ErrorReply, error_from, new_request_id
from elasticmoe_sglang.wire.seqpacket import close_all, new_socket, receive_packet, send_packet

log = logging.getLogger(__name__)

_RESEND_S = 2.0
"""A command without an answer for so long is sent again; the HMM executes it once."""
_IDS_A_PACKET = 4096
_FLUSH_NAP_S = 0.01


class HmmLink:
    """Attached from construction until `close`, the HMM's end, or this process's end. Thread-safe.

    Raises HmmUnavailable from every method once the HMM is gone; a link does not come back, a new one is made.
    """

    def __init__(self, endpoint: Endpoint, name: str, deadline: float, *, server: bool = False) -> None:
        self._endpoint = endpoint
        try:
            self._sock = new_socket()
        except OSError as error:
            raise _no_socket(endpoint, error) from error
        self._lock = threading.Lock()  # one request at a time on the link
        self._owed: deque[int] = deque()  # leases to return; appended to from finalizers
        self.dead = False
        try:
            self._connect()
            welcome = self._exchange(to_hmm.Attach(name=name, server=server), deadline)[0]
        except BaseException:
            self._sock.close()
            raise
        if not isinstance(welcome, to_hmm.Welcome):
            raise ProtocolError(f"the HMM answered Attach with {type(welcome).__name__}")
        self.welcome = welcome
        self._context = zmq.Context()
        self._idle: zmq.Socket[bytes] | None = None
        self._opened = 0
        _links.add(self)

    # Commands ----------------------------------------------------------------------------------------------------

    def command(self, body: to_hmm.Command, deadline: float, *, epoch: int | None, wait_s: float) -> to_hmm.Answer:
        """Sends a command and waits for its answer until `deadline` (time.monotonic).

        wait_s: how long the HMM may take to answer, sent along in the envelope.
        """
        request = Envelope(request_id=new_request_id(), epoch=epoch, deadline_s=wait_s, body=body)
        frame = to_hmm.COMMANDS.encode(request)
        self._flush(deadline)
        with self._socket() as sock:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise self._silent(type(body).__name__)
                sock.send(frame)
                answer = self._receive(sock, request.request_id, min(deadline, now + _RESEND_S))
                if answer is not None:
                    return answer

    @contextlib.contextmanager
    def _socket(self) -> Iterator[zmq.Socket[bytes]]:
        """One socket a concurrent call, one kept between calls.

        A call that fails throws its socket away, with whatever may still come.
        """
        with self._lock:
            if self.dead:
                raise self._gone()
            sock, self._idle = self._idle, None
            if sock is None:
                sock = self._open_socket()
        try:
            yield sock
        except BaseException:
            sock.close(linger=0)
            raise
        with self._lock:
            if self._idle is None and not self.dead:
                self._idle = sock
            else:
                sock.close(linger=0)

    def _open_socket(self) -> zmq.Socket[bytes]:
        try:
            sock = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise _no_socket(self._endpoint, error) from error
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.ROUTING_ID, f"{self.welcome.client_id}.{self._opened}".encode())
        sock.connect(self._endpoint.url)
        self._opened += 1
        return sock

    def _receive(self, sock: zmq.Socket[bytes], request_id: str, until: float) -> to_hmm.Answer | None:
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        poller.register(self._sock.fileno(), zmq.POLLERR)  # readable means nothing here, hang-up does
        while (left := until - time.monotonic()) > 0:
            ready = dict(poller.poll(int(left * 1000) + 1))
            if sock in ready:
                answer = to_hmm.ANSWERS.decode(sock.recv())
                if answer.request_id == request_id:
                    return answer.body
            elif ready:
                raise self._gone()
        return None

    # Link --------------------------------------------------------------------------------------------------------

    def fetch(self, block_ids: Sequence[int], deadline: float) -> list[tuple[to_hmm.Block, int]]:
        """Blocks with a descriptor each, which the caller owns; at most 253. A lease is counted for each."""
        self._flush(deadline)
        reply, fds = self._exchange(to_hmm.FetchHandles(block_ids=list(block_ids)), deadline)
        if not isinstance(reply, to_hmm.Handles) or len(fds) != len(block_ids):
            close_all(fds)
            raise ProtocolError(f"the HMM answered with {type(reply).__name__} and {len(fds)} descriptors")
        return list(zip(reply.blocks, fds, strict=True))

    def adopt(
        self, model: to_hmm.ModelSpec | None, offers: list[to_hmm.Offer], fds: Sequence[int], deadline: float
    ) -> int:
        """Offers blocks of an earlier HMM with a descriptor each, which stay the caller's. How many were new there."""
        self._flush(deadline)
        reply, _ = self._exchange(to_hmm.Adopt(model=model, offers=offers), deadline, fds)
        if not isinstance(reply, to_hmm.Adopted):
            raise ProtocolError(f"the HMM answered Adopt with {type(reply).__name__}")
        return reply.blocks

    def hung_up(self) -> bool:
        """Whether the HMM is gone, without asking it."""
        if not self.dead:
            poller = select.poll()
            poller.register(self._sock, 0)  # hang-up and errors are always reported
            self.dead = bool(poller.poll(0))
        return self.dead

    def return_leases(self, block_ids: Sequence[int]) -> None:
        """Never blocks and never raises, since finalizers call it; a dead HMM needs no leases back."""
        self._owed.extend(block_ids)
        while self._owed and not self.dead:
            batch = self._take_owed()
            # An id of its own: should the HMM object, that is no answer to a request that is waited for.
            request: Envelope[to_hmm.LinkRequest] = Envelope(
                request_id=new_request_id(), body=to_hmm.ReturnLeases(block_ids=batch)
            )
            try:
                send_packet(self._sock, to_hmm.LINK_REQUESTS.encode(request))
            except BlockingIOError:
                self._owed.extend(batch)  # goes out before the next command
                return
            except OSError as error:
                log.debug("leases not returned, the HMM is gone: %s", error)
                return

    def _flush(self, deadline: float) -> None:
        """Leases returned before a call count before it: what the kernel's queue had no room for goes out now."""
        self.return_leases([])
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        while self._owed and not self.dead and (left := deadline - time.monotonic()) > 0:
            poller.poll(min(left, _FLUSH_NAP_S) * 1000)
            self.return_leases([])

    def _take_owed(self) -> list[int]:
        batch: list[int] = []
        with contextlib.suppress(IndexError):  # another thread took the rest
            while len(batch) < _IDS_A_PACKET:
                batch.append(self._owed.popleft())
        return batch

    def close(self) -> None:
        """Detaches: the HMM drops this client's leases and open transactions."""
        _links.discard(self)
        with self._lock:
            self.dead = True
            self._sock.close()
            self._context.destroy(linger=0)

    def forget_in_child(self) -> None:
        """After fork: the child's copy of the link must not keep a dead parent attached."""
        self.dead = True
        os.close(self._sock.detach())

    def _connect(self) -> None:
        try:
            self._sock.connect(str(self._endpoint.handles))
        except OSError as error:
            raise HmmUnavailable(
                f"no HMM answers at {self._endpoint.url}: {error.strerror}",
                hint=f"Start one: elasticmoe hmm --endpoint {self._endpoint.url}",
            ) from error

    def _exchange(
        self, body: to_hmm.LinkRequest, deadline: float, fds: Sequence[int] = ()
    ) -> tuple[to_hmm.LinkReply, list[int]]:
        request = Envelope(request_id=new_request_id(), body=body)
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self._silent(type(body).__name__)
        try:
            if self.dead:
                raise self._gone()
            send_packet(self._sock, to_hmm.LINK_REQUESTS.encode(request), fds)
            return self._await_reply(request, deadline)
        except OSError as error:
            raise self._gone() from error
        finally:
            self._lock.release()

    def _await_reply(
        self, request: Envelope[to_hmm.LinkRequest], deadline: float
    ) -> tuple[to_hmm.LinkReply, list[int]]:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if not poller.poll(left * 1000):
                continue
            packet, fds = receive_packet(self._sock)
            if not packet:
                raise self._gone()
            try:
                reply = to_hmm.LINK_REPLIES.decode(packet)
            except MalformedMessage:
                close_all(fds)
                raise
            if reply.request_id in (request.request_id, NO_REQUEST):
                if isinstance(reply.body, ErrorReply):
                    raise error_from(reply.body)
                return reply.body, fds
            self._discard(reply.body, fds)
        raise self._silent(type(request.body).__name__)

    def _discard(self, reply: to_hmm.LinkReply, fds: list[int]) -> None:
        """An answer that came after its deadline."""
        close_all(fds)
        if isinstance(reply, to_hmm.Handles):
            self.return_leases([block.block_id for block in reply.blocks])

    def _gone(self) -> ElasticMoEError:
        self.dead = True
        return HmmUnavailable(
            f"the HMM at {self._endpoint.url} is gone",
            hint="Serving goes on without it; start a new one at the same endpoint to change the EP size again.",
        )

    def _silent(self, what: str) -> ElasticMoEError:
        return HmmUnavailable(
            f"the HMM at {self._endpoint.url} did not answer {what} in time",
            hint="It is alive but busy or stopped: see its log.",
        )


_links: weakref.WeakSet[HmmLink] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link.forget_in_child()


os.register_at_fork(after_in_child=_after_fork)


def _no_socket(endpoint: Endpoint, error: Exception) -> HmmUnavailable:
    return HmmUnavailable(
        f"no socket to the HMM at {endpoint.url} could be opened: {error}",
        hint="If it is descriptors that this process lacks, raise its limit of open files.",
    )
