"""A real browser, Debian's chromium with its driver, on the operator's page; and a connection to the server that can be
cut and led to another one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from benchmarks.browser import BrowserMissing, chromium, emulate
from elasticmoe_sglang.api.page import PATH

PATIENCE_S = 60.0


class Page:
    """The operator's page in a browser, by what a person finds there: names, labels, roles."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url + PATH)

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def id(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """What is visible of the element."""
        return self.id(name).text

    @property
    def state(self) -> str:
        """loading, locked, live or lost"""
        return str(self.js("return document.body.dataset.state"))

    @property
    def focused(self) -> str:
        """The id of what has the focus."""
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    def wait(self, reached: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; the page says: {self.id('main').text[:600]}")
            time.sleep(0.02)

    def wait_live(self) -> None:
        self.wait(lambda: self.state == "live", "the page is live")

    def log_in(self, key: str) -> None:
        self.wait(lambda: self.state == "locked", "the page asks for the key")
        self.id("key").send_keys(key, Keys.ENTER)

    def placement(self) -> dict[int, list[int]]:
        """Rank -> its expert columns, as drawn."""
        rows = self.js(
            "return [...document.querySelectorAll('#rank-rows tr')].map(row => "
            "[...row.querySelectorAll('.cell:not(.ghost)')].map(cell => Number(cell.textContent)))"
        )
        return dict(enumerate(rows))

    def tab_to(self, name: str) -> None:
        """Press Tab until the element of this id has the focus."""
        seen = []
        for _ in range(80):
            if self.focused == name:
                return
            self.press(Keys.TAB)
            seen.append(self.focused)
        raise AssertionError(f"Tab does not lead to {name}: {seen}")

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def emulate(self, width: int, height: int, **features: str) -> None:
        """Size of the window in CSS pixels, and media features as `prefers_color_scheme="dark"`."""
        emulate(self.driver, width, height, **features)

    def axe(self) -> list[str]:
        """What axe-core finds wrong: roles, names, labels, contrast and more."""
        if not self.js("return typeof axe === 'object'"):
            self.js((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations))"
        )
        return [
            f"{each['id']}: {node['html'][:120]} {node['failureSummary']}" for each in found for node in each["nodes"]
        ]

    def complaints(self) -> list[str]:
        """What the browser wrote to its console, besides failed requests."""
        lines = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [line for line in lines if "Failed to load resource" not in line and "net::ERR_" not in line]


@contextmanager
def browser() -> Iterator[Page]:
    """Skips the test where there is no chromium."""
    try:
        with chromium() as driver:
            yield Page(driver)
    except BrowserMissing as error:
        pytest.skip(str(error))


class Line:
    """A port of the loopback interface that leads to a server, can be cut, and can be led to another server."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._port: int | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def lead_to(self, port: int) -> None:
        self._port = port

    def cut(self) -> None:
        """End all connections, and those to come at once."""
        self._port = None
        self._run(self._cancel())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._port is None:
                return
            onward, back = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                await asyncio.gather(_pump(reader, back), _pump(onward, writer))
            finally:
                back.close()
        except (OSError, asyncio.CancelledError):
            pass  # the other end has gone, or the line was cut
        finally:
            self._tasks.discard(task)
            writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()
