"""Servers on one GPU, for the benchmarks there: a public model's shape with dummy weights, and their load."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.scaling.servers import Instance
from benchmarks.streams import Ask, Load

_SHAPES = Path(__file__).parent.parent / "configs" / "models"
_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 0,
    "max_position_embeddings": 40960, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1, "moe_layer_freq": 1, "num_key_value_heads": 16,
    },
}  # fmt: skip
"""What SGLang asks for beyond a model's shape in `configs/models`."""
PROMPTS = (32, 200, 1000, 60, 2000, 400)
"""Lengths of prompts under which sizes change."""


def write_shape(folder: Path, model: str, layers: int) -> Path:
    """A model folder with a config and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = json.loads((_SHAPES / f"{model}.json").read_text())
    config = shape | _COMMON | MODELS[model] | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `Servers` reads."""
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--ranks", type=int, default=4, help="the most on this one GPU, where a section does not say it"
    )
    parser.add_argument("--standbys", type=int, default=3)
    parser.add_argument("--hot-standbys", type=int, default=0, help="kept booted; 0 measures joining by a boot")
    parser.add_argument("--graph-sizes", type=lambda text: list(map(int, text.split(","))), default=[1, 4, 16, 64])
    parser.add_argument("--prefill-graphs", action="store_true", help="SGLang's CUDA graphs of prefills")
    parser.add_argument("--chunk", type=int, help="prefill tokens of all ranks at a time (SGLang's default: 8192)")
    parser.add_argument(
        "--decode-steps", type=int, help="between two prefill steps (SGLang's --prefill-decode-interval)"
    )
    parser.add_argument("--kv-tokens", type=int, default=65536)
    parser.add_argument("--boot-s", type=float, default=300.0)


class Device:
    """Used bytes of GPU 0, sampled ten times per second (NVML, all processes together)."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        self.samples: list[tuple[float, int]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _run(self) -> None:
        while True:
            self.samples.append((time.monotonic(), self.used()))
            time.sleep(0.1)

    def peak(self, since: float, until: float) -> int:
        return max(used for at, used in self.samples if since - 0.2 <= at <= until + 0.2)


class Servers:
    """All servers of a run, started at once; `get` waits for one."""

    def __init__(self, stack: AsyncExitStack, settings: argparse.Namespace) -> None:
        self._stack = stack
        self._settings = settings
        self._starting: dict[str, asyncio.Task[Instance]] = {}
        self.boots: dict[str, float | str] = {}

    def start(
        self, name: str, args: Sequence[str], *, plain: bool = False, env: Mapping[str, str] | None = None
    ) -> None:
        steps = self._settings.decode_steps
        common = [
            *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
            *(() if self._settings.prefill_graphs else ("--disable-prefill-cuda-graph",)),
            *("--max-total-tokens", str(self._settings.kv_tokens), "--context-length", "4096"),
            *(() if self._settings.chunk is None else ("--chunked-prefill-size", str(self._settings.chunk))),
            *(() if steps is None else ("--prefill-decode-interval", str(steps))),
            *("--skip-server-warmup", "--random-seed", "1", "--mem-fraction-static", "0.9"),
        ]
        log = self._settings.logs / f"{name}.log"
        instance = Instance(
            [*args, *common], plain=plain, generation=0, size=1, log=log, start_timeout_s=self._settings.boot_s, env=env
        )
        self._starting[name] = asyncio.ensure_future(self._boot(name, instance))

    async def _boot(self, name: str, instance: Instance) -> Instance:
        try:
            entered = await self._stack.enter_async_context(instance)
        except BaseException as error:
            self.boots[name] = str(error)[-1500:]
            raise
        self.boots[name] = round(instance.boot_s, 1)
        print(f"{name}: up after {instance.boot_s:.1f} s", flush=True)
        return entered

    async def get(self, name: str) -> Instance:
        return await asyncio.shield(self._starting[name])  # a section that is abandoned does not end the server

    async def settled(self) -> None:
        """No server boots any more: from here on, measurements have the machine to themselves."""
        await asyncio.wait(self._starting.values())


async def standbys(instance: Instance, wanted: int, settings: argparse.Namespace) -> float:
    """Wait until that many standbys are ready, hot ones where the server keeps them; returns the seconds it took."""
    started = time.monotonic()
    state = "hot" if settings.hot_standbys else "standby"
    while time.monotonic() - started < settings.section_s:
        status = await status_of(instance)
        if sum(rank["state"] == state for rank in status["ranks"]) >= wanted:
            return round(time.monotonic() - started, 1)
        await asyncio.sleep(0.2)
    raise RuntimeError(f"no {wanted} {state} ranks within {settings.section_s:.0f} s: {json.dumps(status)[:800]}")


async def status_of(instance: Instance) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(instance.url) as session,
        session.get("/elastic_ep/status", timeout=aiohttp.ClientTimeout(total=10)) as response,
    ):
        status: dict[str, Any] = await response.json()
        return status


async def scale(instance: Instance, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for a change and wait for its end; the operation, or the answer that refuses it."""
    async with (
        aiohttp.ClientSession(instance.url, timeout=aiohttp.ClientTimeout(total=120)) as session,
        session.post("/scale_elastic_ep", json={**body, "wait": True}) as response,
    ):
        operation: dict[str, Any] = await response.json()
        return operation


async def must_scale(instance: Instance, size: int) -> dict[str, Any]:
    """The ended operation. Raises RuntimeError with it unless it is done."""
    operation = await scale(instance, {"new_ep_size": size})
    if operation.get("phase") != "done":
        raise RuntimeError(f"the change to {size} ended as {json.dumps(operation)[:1500]}")
    return operation


@asynccontextmanager
async def streaming(load: Load, lanes: int) -> AsyncIterator[None]:
    """The load runs meanwhile; its last requests are waited for."""
    running = asyncio.ensure_future(load.run(lanes))
    try:
        yield
    finally:
        load.stop()
        await running


def outcome(load: Load) -> dict[str, Any]:
    """For a section's record, once the load has ended."""
    return {"lost": [lost.failure for lost in load.lost], "requests": len(load.records)}


async def resize(instance: Instance, size: int, settings: argparse.Namespace) -> None:
    """Change to `size` ranks, with enough standbys, unless the server has that size."""
    now = (await status_of(instance))["ep_size"]
    if now == size:
        return
    await standbys(instance, size - now, settings)
    await must_scale(instance, size)


def processes_of(instance: Instance) -> list[psutil.Process]:
    assert instance.pid is not None
    main = psutil.Process(instance.pid)
    return [main, *main.children(recursive=True)]


def ids(seed: int, length: int = 32) -> tuple[int, ...]:
    return tuple((seed * 7919 + 31 * i) % 1000 + 5 for i in range(length))


def fresh(seed: int, length: int) -> tuple[int, ...]:
    """A prompt that shares no prefix with another seed's, so that no cache answers for it."""
    dice = random.Random(seed)
    return tuple(dice.randrange(10, 100_000) for _ in range(length))


def mixed_load(instance: Instance, settings: argparse.Namespace) -> Load:
    """Streams whose prompts have 32 to 2,000 tokens, each its own. Answers differ in length, so that prompts do not all
    come at once."""
    return Load(
        instance.client,
        lambda lane, n: Ask(
            key="",
            prompt=fresh(lane * 1_000_003 + n, PROMPTS[(lane + n) % len(PROMPTS)]),
            tokens=settings.stream_tokens // 2 + (lane * 37 + n * 101) % settings.stream_tokens,
        ),
    )
