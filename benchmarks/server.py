"""Start `elasticmoe serve` for a demo or a benchmark, and end every process of it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import aiohttp
import psutil

# With data-parallel attention SGLang uses a few more ports, from 233 above its own.
_DERIVED_PORTS = (0, *range(233, 245))
# Below Linux's range for outgoing connections, so that none of them occupies the port before the server does.
_PORTS = range(20000, 30000)
_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 25
_AFTER_MAIN_S = 2.0


class ServerFailed(Exception):
    """The server died, or did not answer before the deadline; the text ends with the last lines of its log."""


class ElasticServer:
    """One server on 127.0.0.1, as an async context manager; the log receives the output of all its processes.

    Args:
        args: of `elasticmoe serve`; host and port are added.
        env: variables on top of this process's environment.
        start_timeout_s: until it must answer.
        waiting: called about twice a second during the start, with the seconds so far.
        enter: called in the server's process before it becomes the server.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        log: Path,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 400.0,
        waiting: Callable[[float], None] = lambda seconds: None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.boot_s = 0.0
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "serve", *args, *where]
        self._env = {**os.environ, **(env or {})}
        self._start_timeout_s = start_timeout_s
        self._waiting = waiting
        self._enter = enter
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> ElasticServer:
        started = time.monotonic()
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches only this process, which then ends the server, and
            # nothing of the server escapes `_stop`.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=self._begin,
            )
        try:
            await self._wait_healthy(started)
        except BaseException:
            await self._stop()
            raise
        self.boot_s = time.monotonic() - started
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def _begin(self) -> None:
        """In the child."""
        _end_with_parent()
        self._enter()

    async def died(self) -> None:
        """Waits until the server ends. Raises ServerFailed when its main process has ended."""
        while self._process is not None and self._process.poll() is None:
            await asyncio.sleep(0.2)
        raise ServerFailed(f"the server ended while it was in use\n{self._tail()}")

    async def _wait_healthy(self, started: float) -> None:
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while (seconds := time.monotonic() - started) < self._start_timeout_s:
                assert self._process is not None
                if (status := self._process.poll()) is not None:
                    raise ServerFailed(f"the server ended with status {status} while starting\n{self._tail()}")
                self._waiting(seconds)
                # /health sends a token through the whole server.
                with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.5)
        raise ServerFailed(f"the server did not answer within {self._start_timeout_s:.0f} s\n{self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        # One line may hold all of SGLang's settings.
        last = "\n".join(f"  | {line[:300]}" for line in lines[-_TAIL_LINES:])
        return f"Last lines of {self.log}:\n{last}"

    async def _stop(self, grace_s: float = 15.0) -> None:
        """Ask the server to end; kill what is left of its session after a grace period."""
        process, self._process = self._process, None
        if process is None:
            return
        # The HMM has a session of its own, so it is looked up as a child now, before its parent has ended.
        members = {*_tree(process.pid), *_session(process.pid)}
        load_files = {path for member in members for path in mapped_load_files(member.pid)}
        if process.poll() is None:
            process.terminate()
        try:
            await self._all_ended(process, members, grace_s)
        finally:
            # Also when a second Ctrl-C ends the waiting.
            for member in _alive({*members, *_session(process.pid)}):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait(10)
            # SGLang leaves the file behind in which its ranks publish their load.
            for path in load_files:
                path.unlink(missing_ok=True)

    async def _all_ended(self, process: subprocess.Popen[bytes], members: set[psutil.Process], grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        ended_at: float | None = None
        while _alive(members) and time.monotonic() < deadline:
            if process.poll() is not None:
                # The others go with the main process, or not at all.
                ended_at = ended_at or time.monotonic()
                deadline = min(deadline, ended_at + _AFTER_MAIN_S)
            await asyncio.sleep(0.1)


def free_port() -> int:
    """A free port of 127.0.0.1, of which those that SGLang derives from it are free too."""
    for port in random.sample(_PORTS, 200):
        if all(_is_free(port + offset) for offset in _DERIVED_PORTS):
            return port
    raise ServerFailed("no free port found between 20000 and 30000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _tree(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def mapped_load_files(pid: int) -> set[Path]:
    """The files in /dev/shm in which SGLang's ranks publish their load, of one process."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {Path(line.split()[-1]) for line in maps.splitlines() if "/dev/shm/sglang_loads_" in line}


def _end_with_parent() -> None:
    # Runs in the child before it becomes the server: a `kill -9` of this process also ends the server.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
