"""The HMM's side of the SEQPACKET socket: who is attached, handles out, leases back, death noticed."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import ElasticMoEError, HmmError, MalformedMessage, ProtocolError
from elasticmoe_sglang.hmm.service import HmmService
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import NO_REQUEST, Envelope, error_reply
from elasticmoe_sglang.wire.seqpacket import close_all, peer_credentials, receive_packet, send_packet

log = logging.getLogger(__name__)

_ATTACH_S = 5.0
_FULL_S = 0.2
"""A connection that says nothing for so long is closed."""


@dataclass(kw_only=True, eq=False)
class _Link:
    sock: socket.socket
    pid: int
    attach_deadline: float
    client_id: str | None = None
    refusal: HmmError | None = None


class LinkTable:
    """All open links. A link that closes, misbehaves or does not read is dropped, and its client detached."""

    def __init__(self, service: HmmService, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        self._links: dict[int, _Link] = {}
        self._by_client: dict[str, _Link] = {}
        self._full_until = 0.0  # no descriptor was left for another link: not to be asked for all the time

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        listens = self._full_until <= time.monotonic()
        return [*([self._listener.fileno()] if listens else []), *self._links]

    def next_deadline(self) -> float | None:
        """When the next silent connection is dropped, or those that wait are let in again."""
        deadlines = [link.attach_deadline for link in self._links.values() if link.client_id is None]
        if self._full_until > time.monotonic():
            deadlines.append(self._full_until)
        return min(deadlines, default=None)

    def serve(self, ready: Iterable[int]) -> None:
        """Handles one packet of every ready link, new connections, and silent ones."""
        for fd in ready:
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._links:
                self._serve_packet(self._links[fd])
        now = time.monotonic()
        for link in list(self._links.values()):
            if link.client_id is None and link.attach_deadline <= now:
                self._drop(link, "it said nothing")

    def drain(self, client_id: str) -> None:
        """Handles everything the client has sent so far."""
        link = self._by_client.get(client_id)
        while link is not None and link.sock.fileno() in self._links and self._serve_packet(link):
            pass

    def close(self) -> None:
        """Closes every link; clients see the end of file."""
        for link in self._links.values():
            link.sock.close()
        self._links.clear()
        self._by_client.clear()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("a client could not be let in: %s", error)
            self._full_until = time.monotonic() + _FULL_S
            return
        sock.setblocking(False)
        pid, uid = peer_credentials(sock)
        link = _Link(sock=sock, pid=pid, attach_deadline=time.monotonic() + _ATTACH_S)
        if uid != os.getuid():
            self._service.counters.refused_peers += 1
            log.warning("refused process %d of user %d", pid, uid)
            link.refusal = HmmError(
                f"user {uid} may not use the HMM of user {os.getuid()}", hint="Run as the same user."
            )
        self._links[sock.fileno()] = link

    def _serve_packet(self, link: _Link) -> bool:
        """Whether there was one."""
        try:
            packet, fds = receive_packet(link.sock)
        except BlockingIOError:
            return False
        except OSError as error:
            self._drop(link, error.strerror or str(error))
            return False
        except ProtocolError as error:
            self._malformed(link, error, NO_REQUEST)
            return True
        try:
            return self._serve(link, packet, fds)
        finally:
            close_all(fds)

    def _serve(self, link: _Link, packet: bytes, fds: Sequence[int]) -> bool:
        if not packet:
            self._drop(link, "it closed its link")
            return False
        if link.refusal is not None:
            # Only now: closing with its Attach unread would reset the connection before the answer is read.
            self._reply(link, NO_REQUEST, error_reply(link.refusal))
            self._drop(link, "it was refused")
            return False
        try:
            request = to_hmm.LINK_REQUESTS.decode(packet)
        except MalformedMessage as error:
            self._malformed(link, error, error.request_id or NO_REQUEST)
            return True
        try:
            self._execute(link, request, fds)
        except ElasticMoEError as error:
            self._reply(link, request.request_id, error_reply(error))
        except Exception as error:
            # As for commands: one request must not end the owner of all memory.
            self._service.counters.internal_errors += 1
            log.exception("link request %s failed unexpectedly", type(request.body).__name__)
            self._reply(link, request.request_id, error_reply(HmmError(f"the HMM failed: {error!r}")))
        return True

    def _execute(self, link: _Link, request: Envelope[to_hmm.LinkRequest], fds: Sequence[int]) -> None:
        match request.body:
            case to_hmm.Attach(name=name, server=server):
                if link.client_id is not None:
                    raise ProtocolError("a second Attach on one link")
                welcome = self._service.attach(name, link.pid, server=server)
                link.client_id = welcome.client_id
                self._by_client[welcome.client_id] = link
                self._reply(link, request.request_id, welcome)
            case to_hmm.FetchHandles(block_ids=block_ids):
                blocks, leased = self._service.lease(self._client_of(link), block_ids)
                try:
                    self._reply(link, request.request_id, to_hmm.Handles(blocks=blocks), leased)
                finally:
                    close_all(leased)
            case to_hmm.ReturnLeases(block_ids=block_ids):
                self._service.unlease(self._client_of(link), block_ids)
            case to_hmm.Adopt(model=model, offers=offers):
                new = self._service.adopt(self._client_of(link), model, offers, fds)
                self._reply(link, request.request_id, to_hmm.Adopted(blocks=new))

    def _client_of(self, link: _Link) -> str:
        if link.client_id is None:
            raise ProtocolError("the first packet of a link must be Attach")
        return link.client_id

    def _malformed(self, link: _Link, error: ProtocolError, request_id: str) -> None:
        self._service.counters.malformed += 1
        log.warning("malformed packet from process %d: %s", link.pid, error)
        self._reply(link, request_id, error_reply(error))

    def _reply(self, link: _Link, request_id: str, reply: to_hmm.LinkReply, fds: Iterable[int] = ()) -> None:
        packet = to_hmm.LINK_REPLIES.encode(Envelope(request_id=request_id, body=reply))
        try:
            send_packet(link.sock, packet, list(fds))
        except OSError as error:
            self._drop(link, f"a reply could not be sent: {error.strerror}")

    def _drop(self, link: _Link, why: str) -> None:
        if self._links.pop(link.sock.fileno(), None) is None:
            return
        link.sock.close()
        log.info("link of process %d closed: %s", link.pid, why)
        if link.client_id is not None:
            del self._by_client[link.client_id]
            self._service.detach(link.client_id)
