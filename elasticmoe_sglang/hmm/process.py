"""Starting an HMM as a process of its own."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from elasticmoe_sglang.errors import HmmUnavailable
from elasticmoe_sglang.hmm.config import HmmConfig


@dataclass(frozen=True, kw_only=True)
class HmmProcess:
    """A running HMM that this process started. As a context manager it is stopped at the end."""

    endpoint: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, timeout_s: float = 5.0) -> int:
        """Ends it cleanly, by force after `timeout_s`; the exit status. Memory its clients have mapped stays theirs."""
        if self.alive():
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(timeout_s)

    def __enter__(self) -> HmmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def spawn_hmm(
    endpoint: str,
    budgets: Sequence[int],
    *,
    backend: str = "cpu",
    exit_with_parent: bool = True,
    log_path: Path | None = None,
    timeout_s: float = 20.0,
) -> HmmProcess:
    """Starts an HMM and returns once clients can connect.

    Args:
        budgets: bytes of each device.
        exit_with_parent: it ends when this process does, however that ends; False lets it outlive the server.
        log_path: its log is appended there; None leaves it on this process's stderr.
        timeout_s: raises HmmUnavailable when it is not ready by then, or ended before.
    """
    HmmConfig(endpoint=endpoint, budgets=tuple(budgets), backend=backend)
    ready_out, ready_in = os.pipe()
    command = [sys.executable, "-m", "elasticmoe_sglang.hmm", "--endpoint", endpoint, "--backend", backend]
    command += ["--budget", ",".join(map(str, budgets)), "--ready-fd", str(ready_in)]
    if exit_with_parent:
        command += ["--exit-with-parent", str(os.getpid())]
    log = log_path.open("ab") if log_path is not None else None
    try:
        process = subprocess.Popen(
            command, pass_fds=[ready_in], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except BaseException:
        os.close(ready_out)
        raise
    finally:
        os.close(ready_in)
        if log is not None:
            log.close()
    hmm = HmmProcess(endpoint=endpoint, process=process)
    try:
        _await_ready(hmm, ready_out, timeout_s)
    except BaseException:
        hmm.stop()
        raise
    finally:
        os.close(ready_out)
    return hmm


def _await_ready(hmm: HmmProcess, ready_out: int, timeout_s: float) -> None:
    poller = select.poll()
    poller.register(ready_out, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        if not poller.poll(left * 1000):
            continue
        if os.read(ready_out, 64):
            return
        status = hmm.process.wait(left)
        raise HmmUnavailable(
            f"the HMM for {hmm.endpoint} ended with status {status} before it was ready", hint="Its log says why."
        )
    raise HmmUnavailable(f"the HMM for {hmm.endpoint} was not ready after {timeout_s} s", hint="Its log says why.")
