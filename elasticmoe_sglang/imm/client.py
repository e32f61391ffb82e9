"""The controllers' side of the IMM's socket: SGLang's data-parallel controller (blocking) and the coordinator."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.seqpacket import new_socket, receive_bytes, send_packet
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, FromImm


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

    def send(self, request: to_imm.Request) -> None:
        """Send one request.

        Raises:
            WorkerError: the IMM has gone.
        """
        try:
            send_packet(self.sock, to_imm.REQUESTS.pack(request))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _gone() from error

    def receive(self, timeout_s: float) -> FromImm | None:
        """The next message, or None when none came in time.

        Raises:
            WorkerError: the IMM has gone.
        """
        ready, _, _ = select.select([self.sock], [], [], timeout_s)
        if not ready:
            return None
        frame = receive_bytes(self.sock)
        if not frame:
            raise _gone()
        return FROM_IMM.unpack(frame)

    def close(self) -> None:
        self.sock.close()


def _gone() -> WorkerError:
    return WorkerError("the IMM has gone", hint="Restart the server; its log says why the IMM ended.")


def start_imm(module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the IMM's process: `python -m module arguments…`, ended by the kernel when this process ends.

    `module` is named by the caller because preloading SGLang is the patches package's business.
    """
    environment = dict(os.environ, ELASTICMOE_DIE_WITH_PARENT=str(os.getpid()))
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdin=subprocess.DEVNULL)
