"""Start the real SGLang server in a test, talk to it, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import requests

from benchmarks.server import ServerFailed, free_port, mapped_load_files

__all__ = ["ServerFailed", "SglangServer"]


class SglangServer:
    """One server on 127.0.0.1, as a context manager.

    Args:
        args: command-line arguments after the module's name; host and port are added.
        log: file for stdout and stderr of all its processes.
        env: variables to set on top of this process's environment; None as a value removes one.
        module: what `python -m` runs. python: the interpreter.
        start_timeout_s: seconds until it must be healthy.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str | None] | None = None,
        module: str = "sglang.launch_server",
        python: str = sys.executable,
        start_timeout_s: float = 180.0,
    ) -> None:
        self.args = [str(arg) for arg in args]
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.boot_s = 0.0
        self.exit_status: int | None = None
        self._env = {key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None}
        self._module = module
        self._python = python
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Its main process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self) -> None:
        command = [self._python, "-m", self._module, "--host", "127.0.0.1", "--port", str(self.port), *self.args]
        self._started = time.monotonic()
        with self.log.open("wb") as log:
            # Its own session, so that stop() reaches every process of the server and none of the test run.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )

    def wait_healthy(self) -> None:
        """Return once /health answers 200. Raises ServerFailed."""
        deadline = self._started + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ServerFailed(f"the server ended while starting:\n{self.log_tail()}")
            # /health sends a token through the whole server, so it may wait for the first forward pass.
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=20).status_code == 200:
                    self.boot_s = time.monotonic() - self._started
                    return
            time.sleep(0.2)
        raise ServerFailed(f"the server was not healthy after {self._start_timeout_s:.0f} s:\n{self.log_tail()}")

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the server to end, then kill what is left of its process tree and session.

        SGLang itself leaves the file in /dev/shm behind in which ranks publish their load; it is removed here.
        """
        if self._process is None:
            return
        tree = self.processes()
        load_files = {path for process in tree for path in mapped_load_files(process.pid)}
        self._process.terminate()
        try:
            self.exit_status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_status = self._process.wait(timeout_s)
        # Multiprocessing's resource tracker outlives the others for a moment, to remove their semaphores.
        _, alive = psutil.wait_procs(tree, timeout=3)
        with contextlib.suppress(ProcessLookupError):  # an empty session: everybody ended by themselves
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(alive, timeout=timeout_s)
        for path in load_files:
            path.unlink(missing_ok=True)
        self._process = None
        assert not alive, f"processes of the server cannot be ended: {alive}"

    def processes(self) -> list[psutil.Process]:
        """Living descendants of the server's main process."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def log_lines(self, words: str) -> list[str]:
        """The log's lines in which these words occur."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if words in line]

    def get(self, path: str, timeout_s: float = 30.0) -> requests.Response:
        return requests.get(self.url + path, timeout=timeout_s)

    def post(self, path: str, body: object, timeout_s: float = 120.0) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout_s)

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int, **fields: Any) -> dict[str, Any]:
        """The whole answer to one greedy request that is not ended by a stop token. Raises ServerFailed."""
        response = self.post("/generate", _body(prompt, max_new_tokens, fields))
        if response.status_code != 200:
            raise ServerFailed(f"/generate answered {response.status_code}: {response.text}\n{self.log_tail()}")
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int, **fields: Any) -> Iterator[dict[str, Any]]:
        """The answer's events as they come; each holds the ids generated so far. Raises ServerFailed."""
        body = _body(prompt, max_new_tokens, fields) | {"stream": True}
        with requests.post(self.url + "/generate", json=body, stream=True, timeout=120) as response:
            if response.status_code != 200:
                raise ServerFailed(f"/generate answered {response.status_code}: {response.text}\n{self.log_tail()}")
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    yield json.loads(line[len(b"data: ") :])


def _body(prompt: str | Sequence[int], max_new_tokens: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    name = "text" if isinstance(prompt, str) else "input_ids"
    return {name: prompt if isinstance(prompt, str) else list(prompt), "sampling_params": sampling, **fields}
