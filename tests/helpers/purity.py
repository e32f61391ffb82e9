"""Holds tests marked `pure` to it: they start no process and do not import SGLang.

Python's audit events are what is watched, so that it does not matter which library would do it. What a test swallows
is reported when it ends.
"""

from __future__ import annotations

import multiprocessing.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STARTS = frozenset(
    {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "pty.spawn"}
)
_SGLANG = "sglang"


class Impure(Exception):
    """A test that is marked `pure` did what only others may do."""


class _Watch:
    """What is watched now; an audit hook cannot be removed, so there is one for the whole run."""

    def __init__(self) -> None:
        self.on = False
        self.installed = False
        self.found: list[str] = []

    def install(self) -> None:
        if self.installed:
            return
        self.installed = True
        sys.addaudithook(self._audit)
        spawn = multiprocessing.util.spawnv_passfds

        # The one way to a process that raises no audit event.
        def spawnv_passfds(*args: Any) -> Any:
            if self.on:
                self._refuse("starts a process by multiprocessing")
            return spawn(*args)

        multiprocessing.util.spawnv_passfds = spawnv_passfds  # type: ignore[assignment]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _STARTS:
            self._refuse(f"starts a process ({event} {args[:2]})")
        elif event == "import" and str(args[0]).split(".")[0] == _SGLANG:
            self._refuse(f"imports {args[0]}")

    def _refuse(self, what: str) -> None:
        self.found.append(what)
        raise Impure(f"a test marked `pure` {what}; mark it `process` if it has to")


_watch = _Watch()


@contextmanager
def watched(on: bool) -> Iterator[None]:
    """While `on`, starting a process and importing SGLang raise Impure."""
    if on:
        _watch.install()
    _watch.found.clear()
    _watch.on = on
    try:
        yield
    finally:
        _watch.on = False


def check_before() -> None:
    """An import can only be seen while SGLang is not loaded. Raises Impure."""
    if _watch.on and _SGLANG in sys.modules:
        raise Impure("SGLang was imported before this test, which is marked `pure`: by collecting another file")


def check_after() -> None:
    """Raises Impure for what the test has swallowed."""
    if _watch.on and _watch.found:
        raise Impure(f"a test marked `pure` {'; '.join(_watch.found)}")


def forget() -> None:
    """Says nothing again of what was found so far."""
    _watch.found.clear()
