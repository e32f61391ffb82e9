"""The servers that a method starts: plain SGLang, or SGLang with this project's ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.server import ElasticServer
from benchmarks.streams import StreamClient, StreamRecord


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings that the servers of all methods share.

    Attributes:
        kv_tokens: size of each rank's KV pool.
        args: further SGLang flags.
        without: mechanisms that joining ranks do without, for the elastic method only.
        log_dir: each server's output goes there.
        boot_limit_s: for a server that starts during the run; the change is given up then.
        enter: called in each server's process before it becomes the server.
    """

    model: str
    device: str
    kv_tokens: int
    log_dir: Path
    args: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    boot_limit_s: float = 400.0
    enter: Callable[[], None] = lambda: None

    def common(self, kv_tokens: int) -> list[str]:
        # Every server is warmed by the benchmark itself before the clock starts; one that boots during the run pays
        # for its first requests while it is measured, as it would in production without a warm-up.
        return [
            *("--model-path", self.model, "--device", self.device, "--max-total-tokens", str(kv_tokens)),
            *("--skip-server-warmup", "--log-level", "warning", *self.args),
        ]

    def plain(self, size: int, kv_tokens: int) -> list[str]:
        """SGLang's own expert parallelism with the same layout: one attention replica per device."""
        parallel = []
        if size > 1:
            parallel = [
                *("--tp", str(size), "--dp", str(size), "--ep", str(size), "--enable-dp-attention"),
                *("--enable-dp-lm-head", "--moe-dense-tp-size", "1", "--load-balance-method", "round_robin"),
            ]
        return [*self.common(kv_tokens), *parallel]

    def elastic(self, size: int, capacity: int) -> list[str]:
        own = ["--ep-size", str(size), "--max-ep-size", str(capacity)]
        if self.device == "cpu":
            # Each rank on a core of its own, where there are as many.
            own += ["--elasticmoe-cpu-bind", "auto"]
        return [*own, *self.common(self.kv_tokens)]


class Instance(ElasticServer):
    """One running server with its client.

    Args:
        args: of `elasticmoe serve`, or with `plain` of SGLang's own launcher.
        generation: its number, for the records.
        size: devices.
        env: variables on top of this process's environment.
        enter: called in the server's process before it becomes the server.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        plain: bool,
        generation: int,
        size: int,
        log: Path,
        start_timeout_s: float = 600.0,
        env: Mapping[str, str] | None = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(args, log=log, start_timeout_s=start_timeout_s, env=env, enter=enter)
        if plain:
            where = ["--host", "127.0.0.1", "--port", str(self.port)]
            self.command = [sys.executable, "-m", "sglang.launch_server", *args, *where]
        self.generation = generation
        self.size = size
        self.in_flight = 0
        self.client = StreamClient(self.url)

    @property
    def pid(self) -> int | None:
        """Of its main process while it runs."""
        return self._process.pid if self._process is not None else None

    async def __aenter__(self) -> Instance:
        await super().__aenter__()
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await super().__aexit__(*reason)
        await self.client.__aexit__(*reason)

    async def ask(self, record: StreamRecord) -> None:
        """Fill the record; see `StreamClient.run`."""
        self.in_flight += 1
        try:
            await self.client.run(record)
        finally:
            self.in_flight -= 1
