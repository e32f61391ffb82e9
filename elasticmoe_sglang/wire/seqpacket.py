"""Packets over Unix SEQPACKET sockets: the HMM's way for descriptors, which ZMQ cannot carry, and the IMM's for all.

A packet is one encoded envelope and up to 253 descriptors (the kernel's SCM_MAX_FD). The end of file of such a socket
tells that the process behind it is gone.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence

from elasticmoe_sglang.errors import ProtocolError

MAX_FDS = 253
MAX_PACKET_BYTES = 128 * 1024
"""The kernel's usual send buffer has room for one and its bookkeeping."""
_UCRED = struct.Struct("3i")


def new_socket(*, blocking: bool = False) -> socket.socket:
    """A SEQPACKET socket that programs started from here do not inherit."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(blocking)
    return sock


def listen(path: str) -> socket.socket:
    """A non-blocking socket that listens at `path`, where nothing may be yet; only this user may connect (0600)."""
    listener = new_socket()
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(128)
    return listener


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other side at the time it connected, as the kernel knows them."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def send_packet(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Sends one packet whole. Raises OSError when the other side is gone.

    When it does not read, a blocking socket waits, and another raises BlockingIOError. The descriptors are duplicated
    by the kernel; closing ours stays the caller's.
    """
    assert len(fds) <= MAX_FDS and len(packet) <= MAX_PACKET_BYTES
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, which the caller owns; (b"", []) when the other side is gone.

    Raises ProtocolError when the packet or its descriptors did not fit, BlockingIOError when nothing is there and the
    socket does not block.
    """
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    packet, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for level, kind, data in ancillary if _is_rights(level, kind) for fd in _descriptors(data)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError(f"a packet exceeds {MAX_PACKET_BYTES} bytes or {MAX_FDS} descriptors", hint="Split it.")
    return packet, fds


def receive_bytes(sock: socket.socket) -> bytes:
    """As `receive_packet`, where no descriptors are expected; also b"" when the other side died with our packets unread
    (for which Linux reports a reset)."""
    try:
        packet, fds = receive_packet(sock)
    except ConnectionResetError:
        return b""
    close_all(fds)
    return packet


def close_all(fds: Sequence[int]) -> None:
    """Closes each descriptor."""
    for fd in fds:
        os.close(fd)


def _is_rights(level: int, kind: int) -> bool:
    return level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS


def _descriptors(data: bytes) -> array.array[int]:
    fds = array.array("i")
    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds
