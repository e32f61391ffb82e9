"""`python -m benchmarks.screenshots`: pictures of the operator's page, of a small MoE under load whose size changes.

Writes page-light.png (1280 x 800, after some changes), page-dark.png (the same, during one), page-narrow.png (390
wide), and what `elasticmoe top` and `elasticmoe policy` print: top.png, policy.png. The policy is in shadow mode.
Exit status: 0 when all are written, 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from rich.console import Console, RenderableType
from selenium import webdriver

from benchmarks.browser import BrowserMissing, chromium, emulate
from benchmarks.demo.settings import Settings
from benchmarks.server import ElasticServer, ServerFailed
from benchmarks.streams import Load, StreamClient
from elasticmoe_sglang.api.page import PATH
from elasticmoe_sglang.cli.client import ServerClient
from elasticmoe_sglang.cli.policy import policy_panel
from elasticmoe_sglang.cli.seen import Seen
from elasticmoe_sglang.cli.top_view import top_view
from elasticmoe_sglang.policy.settings import DECISIONS_KEPT
from elasticmoe_sglang.tiny_model import make_tiny_model

_PATIENCE_S = 120.0
_BODIES: tuple[dict[str, object], ...] = (
    {"new_ep_size": 4},
    {"retire_ranks": [1]},
    {"new_ep_size": 1},
    {"new_ep_size": 2},
)
WIDE, NARROW = (1280, 800), 390
_SLO = "ttft=1s,itl=70ms,attainment=0.9"
_COLUMNS = 120


class NoPicture(Exception):
    """The page did not show what was to be taken; the text says what."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: %(default)s)")
    parser.add_argument("--steady", type=float, default=12.0, metavar="S", help="seconds between changes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder, chromium() as browser:
            settings = Settings(out=Path(folder), sizes=(2,), steady_s=args.steady)
            asyncio.run(_run(settings, browser, args.out))
    except (BrowserMissing, ServerFailed, NoPicture) as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(settings: Settings, browser: webdriver.Chrome, out: Path) -> None:
    make_tiny_model(settings.model, layers=settings.layers, experts=settings.experts)
    args = [*settings.serve_args(), "--served-model-name", "tiny-qwen3-moe", "--device-budget", "192MiB"]
    args += ["--slo", _SLO, "--autoscale", "shadow", "--autoscale-hold", "3"]
    async with (
        ElasticServer(args, log=settings.log, env={"OMP_NUM_THREADS": "1"}) as server,
        aiohttp.ClientSession(server.url) as session,
        StreamClient(server.url) as client,
    ):
        load = Load(client, settings.choose)
        lanes = asyncio.create_task(load.run(settings.streams))
        try:
            await asyncio.to_thread(_open, browser, server.url)
            await asyncio.sleep(settings.steady_s)
            for body in _BODIES:
                await _change(session, body)
                await asyncio.sleep(settings.steady_s)
            await asyncio.to_thread(_take, browser, out / "page-light.png")
            change = asyncio.create_task(_change(session, {"new_ep_size": 3}))
            await asyncio.to_thread(_take_during_a_change, browser, out / "page-dark.png")
            await change
            await asyncio.sleep(settings.steady_s / 2)
            await asyncio.to_thread(_take_narrow, browser, out / "page-narrow.png")
            await asyncio.to_thread(_take_terminal, browser, server.url, out)
        finally:
            load.stop()
            lanes.cancel()


async def _change(session: aiohttp.ClientSession, body: dict[str, object]) -> None:
    async with session.post("/scale_elastic_ep", json={**body, "wait": True}) as response:
        answer = await response.json()
        if response.status != 200 or answer["phase"] != "done":
            raise NoPicture(f"{body}: {answer}")


def _open(browser: webdriver.Chrome, url: str) -> None:
    emulate(browser, *WIDE, prefers_color_scheme="light")
    browser.get(url + PATH)
    browser.execute_script(
        "const span = document.getElementById('window'); span.value = '60'; span.dispatchEvent(new Event('change'))"
    )
    _until(browser, "document.body.dataset.state === 'live'")


def _until(browser: webdriver.Chrome, condition: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not browser.execute_script(f"return {condition}"):
        if time.monotonic() > deadline:
            raise NoPicture(f"the page does not come to {condition}")
        time.sleep(0.02)


def _take(browser: webdriver.Chrome, path: Path) -> None:
    if not browser.save_screenshot(str(path)):
        raise NoPicture(f"{path} cannot be written")
    print(path)


def _take_during_a_change(browser: webdriver.Chrome, path: Path) -> None:
    emulate(browser, *WIDE, prefers_color_scheme="dark")
    _until(browser, "document.querySelectorAll('.cell.ghost').length > 0")
    _take(browser, path)


def _take_narrow(browser: webdriver.Chrome, path: Path) -> None:
    emulate(browser, NARROW, 844, prefers_color_scheme="light")
    time.sleep(1.5)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    emulate(browser, NARROW, height, prefers_color_scheme="light")
    time.sleep(1.5)
    _take(browser, path)


def _take_terminal(browser: webdriver.Chrome, url: str, out: Path) -> None:
    """What the commands print, drawn as rich draws a terminal."""
    client, seen = ServerClient(url), Seen()
    events = client.events()
    seen.take(next(events))
    events.close()
    seen.policy = client.policy_if_any()
    shown: dict[str, tuple[str, RenderableType]] = {
        "top": ("elasticmoe top", top_view(seen, _COLUMNS, height=None)),
        "policy": ("elasticmoe policy", policy_panel(client.policy(DECISIONS_KEPT), 10)),
    }
    for name, (title, view) in shown.items():
        console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(view)
        with tempfile.NamedTemporaryFile(suffix=".svg") as svg:
            svg.write(console.export_svg(title=title).encode())
            svg.flush()
            emulate(browser, *WIDE)
            browser.get(f"file://{svg.name}")
            box = browser.execute_script(
                "return document.documentElement.getAttribute('viewBox').split(' ').map(Number).slice(2)"
            )
            emulate(browser, int(box[0]), int(box[1]))
            _take(browser, out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
