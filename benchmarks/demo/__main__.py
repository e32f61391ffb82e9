"""`python -m benchmarks.demo`: make a model, serve it, change the EP size while streams decode, show the results.

Exit status: 0 if all changes are done, no request was lost and every stream got exactly its tokens; 1 otherwise; 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks.demo.figures import Figures, figures
from benchmarks.demo.report import cores_sentence, report
from benchmarks.demo.scenario import DemoFailed, Progress, play
from benchmarks.demo.settings import Settings
from benchmarks.demo.views import LiveView, PlainView
from benchmarks.scaling.machine import describe
from benchmarks.server import ElasticServer, ServerFailed
from elasticmoe_sglang.errors import ElasticMoEError


def main() -> int:
    args = _arguments()
    console = Console()
    settings = Settings(
        out=args.out, sizes=tuple(args.sizes), streams=args.streams, tokens=args.tokens, steady_s=args.steady,
        port=args.port, device=args.device,
    )  # fmt: skip
    progress = Progress(settings=settings, started_at=time.monotonic())
    plain = args.plain or not console.is_terminal or console.is_dumb_terminal
    view = PlainView(console, progress) if plain else LiveView(console, progress)
    failed = False
    try:
        asyncio.run(_run(settings, progress, view))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("demo: interrupted; all processes have ended", style="yellow")
        return 130
    except (ServerFailed, DemoFailed, ElasticMoEError) as error:
        console.print(f"demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if not progress.records:
            return 1
        failed = True
    result = figures(progress, shlex.join(["python", "-m", "benchmarks.demo", *sys.argv[1:]]), describe())
    _write(settings, progress, result)
    console.print()
    console.print(report(result), highlight=False)
    for name, what in (("demo.png", "tokens/s over time"), ("demo.json", "figures"), ("server.log", "of the server")):
        console.print(f"        {settings.out / name}: {what}", highlight=False, soft_wrap=True)
    return 0 if result.passed and not failed else 1


async def _run(settings: Settings, progress: Progress, view: PlainView | LiveView) -> None:
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        view.say("interrupted: stopping the server")
        progress.stage = "stopping the server"
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    async with view.shown():
        await _make_model(settings, progress, view)
        command = "elasticmoe serve " + shlex.join(settings.serve_args())
        view.say(f"starting: {command} (log: {settings.log})")
        view.say(cores_sentence({"device": settings.device, "cpu_bind": settings.cpu_bind}))
        # More threads in each rank would compete for the cores that ranks share.
        server = ElasticServer(
            settings.serve_args(), log=settings.log, port=settings.port, env={"OMP_NUM_THREADS": "1"},
            waiting=view.waiting,
        )  # fmt: skip
        async with server:
            view.say(f"the server answers at {server.url} after {server.boot_s:.0f} s")
            await play(settings, server, progress, view)
            progress.stage = "the server ends"
            view.say("all streams have ended; stopping the server")


async def _make_model(settings: Settings, progress: Progress, view: PlainView | LiveView) -> None:
    progress.stage = "making a model"
    settings.out.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(_tiny_model, settings)
    size = (settings.model / "model.safetensors").stat().st_size / 2**20
    view.say(f"made a random Qwen3-MoE: {settings.layers} layers, {settings.experts} experts, {size:.0f} MiB, float32")


def _tiny_model(settings: Settings) -> None:
    from elasticmoe_sglang.tiny_model import make_tiny_model

    make_tiny_model(settings.model, layers=settings.layers, experts=settings.experts)


def _write(settings: Settings, progress: Progress, result: Figures) -> None:
    from benchmarks.demo.plot import draw

    (settings.out / "demo.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    records = [*progress.reference, *progress.records]
    (settings.out / "streams.json").write_bytes(msgspec.json.encode(records))
    draw(progress, result, settings.out / "demo.png")


def _arguments() -> argparse.Namespace:
    defaults = Settings(out=Path("demo-out"))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Serve a small MoE, change its EP size while streams decode, and show the results.",
    )
    parser.add_argument("--out", type=Path, default=defaults.out, help="output folder (default: %(default)s)")
    parser.add_argument(
        "--sizes", type=_sizes, default=defaults.sizes, metavar="N,N,...",
        help="EP sizes, the first one at the start (default: 2,4,1,3)",
    )  # fmt: skip
    parser.add_argument(
        "--streams", type=_positive, default=defaults.streams, help="concurrent streams (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=_positive, default=defaults.tokens, help="tokens of the longest streams (default: %(default)s)"
    )
    parser.add_argument(
        "--steady", type=float, default=defaults.steady_s, metavar="SECONDS",
        help="seconds of decoding between the changes (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="port of the server (default: any free one)")
    parser.add_argument(
        "--device", choices=("cpu", "npu"), default=defaults.device, help="what ranks compute on (default: %(default)s)"
    )
    parser.add_argument("--plain", action="store_true", help="print lines instead of the live picture")
    return parser.parse_args()


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(_positive(part) for part in text.split(","))
    if len(sizes) < 2 or max(sizes) > Settings.ranks:
        raise argparse.ArgumentTypeError(f"at least two sizes between 1 and {Settings.ranks}, not {text!r}")
    return sizes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
