"""Memory backends without one mechanism each, so that its benefit can be measured (paper: Table 1).

They copy the same bytes to the same addresses, at a higher cost. CPU only: other devices' memory has no host addresses.
"""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Set

from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend

_FRAME = 256 << 10


class StagedCopies(CpuBackend):
    """Without zero-copy: bytes are copied to a staging buffer first, and from there to their destination."""

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        staging = ctypes.create_string_buffer(nbytes)
        ctypes.memmove(staging, src, nbytes)
        ctypes.memmove(dst, staging, nbytes)


class StreamedCopies(CpuBackend):
    """Without memory handles: bytes are sent through a Unix socket, as from a process whose memory cannot be mapped.

    The sender is a thread of this process, since only the transfer is measured.
    """

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        ours, theirs = socket.socketpair()
        sender = threading.Thread(target=_send, args=(theirs, src, nbytes), name="elasticmoe-stream", daemon=True)
        with ours:
            sender.start()
            view = _memory(dst, nbytes)
            done = 0
            while done < nbytes:
                got = ours.recv_into(view[done:], min(_FRAME, nbytes - done))
                assert got, "the sender sends everything"
                done += got
        sender.join()


def _send(sock: socket.socket, src: int, nbytes: int) -> None:
    with sock:
        sock.sendall(_memory(src, nbytes))


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def chosen_copies(without: Set[str]) -> CpuBackend | None:
    """The backend that leaves out what is named; None where copies are made as ever."""
    dearer = {"zero-copy": StagedCopies, "handles": StreamedCopies}
    return next((backend() for name, backend in dearer.items() if name in without), None)


def require_cpu(client: HmmClient) -> None:
    """Raises UserInputError where the HMM's memory is not the CPU's."""
    if (backend := client.connect().backend) != "cpu":
        client.close()
        raise UserInputError(
            f"handles and zero-copy can be left out on the CPU's memory, not on {backend}",
            hint="Leave --without out: it is for measurements",
        )
