"""The controllers' side of the IMM's socket: SGLang's data-parallel controller (blocking) and the coordinator."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.seqpacket import close_all, new_socket, receive_packet, send_packet
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, FromImm

_SEND_S = 5.0


@dataclass
class ImmClient:
    """One connection to the IMM. Not thread-safe: each user opens its own.

    Args:
        path: the IMM's socket.
        timeout_s: how long to wait for the IMM to listen.

    Raises:
        WorkerError: nobody listens there within the deadline.
    """

    path: str
    timeout_s: float = 60.0
    sock: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            self.sock = new_socket(blocking=True)
            try:
                self.sock.connect(self.path)
                # A deadline, and no blocking socket: uvloop makes those that it watches non-blocking.
                self.sock.settimeout(_SEND_S)
                return
            except (FileNotFoundError, ConnectionRefusedError) as error:
                self.sock.close()
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"the IMM does not answer at {self.path}",
                        hint="Its log above says why it did not start.",
                    ) from error
                time.sleep(0.02)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, request: to_imm.Request, fds: Sequence[int] = ()) -> None:
        """Send one request, with descriptors that stay the caller's.

        Raises:
            WorkerError: the IMM has gone, or does not read.
        """
        try:
            send_packet(self.sock, to_imm.REQUESTS.pack(request), fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _gone() from error
        except TimeoutError as error:
            raise WorkerError(
                f"the IMM has not read for {_SEND_S:g} s", hint="End its process: another one takes its place."
            ) from error

    def receive(self, timeout_s: float) -> FromImm | None:
        """The next message without its descriptors, or None when none came in time.

        Raises:
            WorkerError: the IMM has gone.
        """
        ready, _, _ = select.select([self.sock], [], [], timeout_s)
        if not ready:
            return None
        message, fds = self.receive_now()
        close_all(fds)
        return message

    def receive_now(self) -> tuple[FromImm, list[int]]:
        """The message that waits to be read, and its descriptors, which are the caller's from now on.

        Raises:
            WorkerError: the IMM has gone.
            ProtocolError: a message that cannot be understood, or this process has no room for its descriptors.
        """
        try:
            frame, fds = receive_packet(self.sock)
        except ConnectionResetError:  # it died with our packets unread; what it had sent before follows
            frame, fds = receive_packet(self.sock)
        if not frame:
            raise _gone()
        return FROM_IMM.unpack(frame), fds

    def close(self) -> None:
        self.sock.close()


def _gone() -> WorkerError:
    return WorkerError("the IMM has gone", hint="The log says why it ended.")


def start_imm(
    module: str, arguments: Sequence[str], *, environment: Mapping[str, str], fds: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start the IMM's process: `python -m module arguments…`.

    Args:
        module: named by the caller, because preloading SGLang is the patches package's business.
        environment: added to this process's.
        fds: kept open there, under the same numbers.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
    )
