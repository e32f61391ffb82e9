"""What the HMM answers to nonsense, to clients that stop and to other users."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from elasticmoe_sglang.errors import (
    BlockNotFound,
    ElasticMoEError,
    HmmError,
    MalformedMessage,
    ProtocolError,
)
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.config import Endpoint, HmmConfig
from elasticmoe_sglang.hmm.process import HmmProcess
from elasticmoe_sglang.hmm.server import HmmServer
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import Envelope, ErrorReply, error_from
from elasticmoe_sglang.wire.seqpacket import new_socket, receive_packet, send_packet
from tests.helpers.hmm_clients import MIB, PAGE, eventually

pytestmark = pytest.mark.usefixtures("gives_all_back")


def test_malformed_commands_get_typed_errors_and_are_counted(hmm: HmmProcess, client: HmmClient) -> None:

    def ask(*frames: bytes) -> tuple[str, ElasticMoEError]:
        sock.send_multipart(frames)
        assert sock.poll(5000), "no answer"
        answer = to_hmm.ANSWERS.decode(sock.recv())
        assert isinstance(answer.body, ErrorReply)
        return answer.request_id, error_from(answer.body)

    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(hmm.endpoint)
        nonsense = [
            (b"",),
            (b"\xc1",),
            (os.urandom(500),),
            (b"\x91" * 10_000,),
            (bytes(2 << 20),),
            (b"two", b"frames"),
            (b"", to_hmm.COMMANDS.encode(Envelope(request_id="r", body=to_hmm.StatusRequest()))),
            (b"a",) * 50,
        ]
        for frames in nonsense:
            request_id, error = ask(*frames)
            assert isinstance(error, MalformedMessage) and request_id == "?"
        bad_body = msgspec.msgpack.encode({"version": 1, "request_id": "r9", "body": {"type": "Nope"}})
        request_id, error = ask(bad_body)
        assert request_id == "r9" and isinstance(error, MalformedMessage)
        request_id, error = ask(to_hmm.COMMANDS.encode(Envelope(request_id="r10", body=to_hmm.StatusRequest())))
        assert request_id == "r10" and "not attached" in str(error)
        sock.send(bytes(20 << 20))  # libzmq drops who sends this much
        assert not sock.poll(200)
    assert client.status().counters.malformed == len(nonsense) + 1


def test_malformed_packets_get_typed_errors_and_are_counted(hmm: HmmProcess, client: HmmClient) -> None:

    def ask(packet: bytes, *fds: int) -> ElasticMoEError | None:
        send_packet(sock, packet, fds)
        eventually(lambda: select_readable(sock))
        reply, _ = receive_packet(sock)
        body = to_hmm.LINK_REPLIES.decode(reply).body
        return error_from(body) if isinstance(body, ErrorReply) else None

    def request(body: to_hmm.LinkRequest) -> bytes:
        return to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=body))

    client.status()
    before = len(os.listdir(f"/proc/{hmm.pid}/fd"))
    sock = new_socket()
    sock.connect(str(Endpoint.parse(hmm.endpoint).handles))
    assert isinstance(ask(b"\xc1 nonsense"), MalformedMessage)
    assert "must be Attach" in str(ask(request(to_hmm.FetchHandles(block_ids=[1]))))
    assert ask(request(to_hmm.Attach(name="odd"))) is None
    assert "second Attach" in str(ask(request(to_hmm.Attach(name="odd"))))
    assert isinstance(ask(request(to_hmm.ReturnLeases(block_ids=[1]))), ProtocolError)
    assert isinstance(ask(request(to_hmm.FetchHandles(block_ids=[404]))), BlockNotFound)
    # Descriptors that nobody asked for are closed.
    gift = os.open(os.devnull, os.O_RDONLY)
    assert isinstance(ask(b"\xc1", *[gift] * 253), MalformedMessage)
    os.close(gift)
    assert len(os.listdir(f"/proc/{hmm.pid}/fd")) == before + 1
    assert client.status().counters.malformed == 2
    sock.close()
    eventually(lambda: [c.name for c in client.status().clients] == ["rank-0"])


def select_readable(sock: socket.socket) -> bool:
    import select

    return bool(select.select([sock], [], [], 0)[0])


def test_a_return_that_is_refused_answers_nothing_else(client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=PAGE)
    client._attached(client._deadline()).return_leases([block.block_id])  # which it does not hold
    [handle] = client.handles([block.block_id])
    client.backend.close(handle)


def test_a_client_that_never_reads_its_handles_is_dropped(hmm: HmmProcess, client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=PAGE)
    sock = new_socket()
    sock.connect(str(Endpoint.parse(hmm.endpoint).handles))
    send_packet(sock, to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=to_hmm.Attach(name="deaf"))))
    frame = to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=to_hmm.FetchHandles(block_ids=[block.block_id])))
    dropped = False
    for _ in range(5000):
        try:
            send_packet(sock, frame)
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            dropped = True
            break
    assert dropped
    assert [c.name for c in client.status().clients] == ["rank-0"]
    assert client.status().retired_blocks == 0
    sock.close()


def test_a_link_that_says_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.hmm.server_links._ATTACH_S", 0.2)
    with in_thread(tmp_path) as server:
        sock = new_socket()
        sock.connect(str(Endpoint.parse(server.service.endpoint).handles))
        eventually(lambda: select_readable(sock))
        assert receive_packet(sock) == (b"", [])
        sock.close()


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.hmm.server_links.peer_credentials", lambda sock: (4711, os.getuid() + 1))
    with in_thread(tmp_path) as server:
        with (
            HmmClient(server.service.endpoint, name="intruder", timeout_s=2) as client,
            pytest.raises(HmmError, match=f"user {os.getuid() + 1} may not use the HMM of user {os.getuid()}"),
        ):
            client.status()
        assert server.service.counters.refused_peers == 1


class in_thread:
    """A server inside this process, for what needs patching."""

    def __init__(self, tmp_path: Path) -> None:
        self.server = HmmServer(HmmConfig(endpoint=f"ipc://{tmp_path}/run/hmm.sock", budgets=(MIB,)))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> HmmServer:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()
