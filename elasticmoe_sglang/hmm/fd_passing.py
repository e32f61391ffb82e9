"""Packets with descriptors over a Unix SEQPACKET socket: the part of the protocol that ZMQ cannot carry.

A packet is one encoded envelope and up to 253 descriptors (the kernel's SCM_MAX_FD). Sockets are non-blocking; a
caller that waits polls first.
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
_UCRED = struct.Struct("3i")


def new_socket() -> socket.socket:
    """A non-blocking SEQPACKET socket that programs started from here do not inherit."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    return sock


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other side at the time it connected, as the kernel knows them."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def send_packet(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Sends one packet whole. Raises BlockingIOError when the other side does not read, OSError when it is gone.

    The descriptors are duplicated by the kernel; closing ours stays the caller's.
    """
    assert len(fds) <= MAX_FDS and len(packet) <= MAX_PACKET_BYTES
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def receive_packet(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, which the caller owns; (b"", []) when the other side is gone.

    Raises BlockingIOError when nothing is there, ProtocolError when the packet or its descriptors did not fit.
    """
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    packet, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    fds = [fd for level, kind, data in ancillary if _is_rights(level, kind) for fd in _descriptors(data)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError(f"a packet exceeds {MAX_PACKET_BYTES} bytes or {MAX_FDS} descriptors", hint="Split it.")
    return packet, fds


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
