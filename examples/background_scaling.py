"""For the examples: changes the server's EP size in the background, while the foreground sends requests.

Where the server has an admin key, ELASTICMOE_ADMIN_KEY names it.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any


class BackgroundScaling:
    """A context manager that scales the server through `sizes`, with `pause_s` before each, and waits for the last.

    Attributes:
        operations: the server's answers, one for each size.
    """

    def __init__(self, url: str, sizes: Sequence[int], pause_s: float = 1.0) -> None:
        self.operations: list[dict[str, Any]] = []
        self._url = url.rstrip("/") + "/scale_elastic_ep"
        self._sizes = sizes
        self._pause_s = pause_s
        self._thread = threading.Thread(target=self._run, name="scaling", daemon=True)

    def __enter__(self) -> BackgroundScaling:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.join(timeout=300)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        for size in self._sizes:
            time.sleep(self._pause_s)
            body = json.dumps({"new_ep_size": size, "wait": True}).encode()
            headers = {"Content-Type": "application/json"}
            if key := os.environ.get("ELASTICMOE_ADMIN_KEY"):
                headers["Authorization"] = f"Bearer {key}"
            request = urllib.request.Request(self._url, data=body, headers=headers)
            with urllib.request.urlopen(request, timeout=300) as answer:
                self.operations.append(json.load(answer))

    def summary(self) -> str:
        """One line per operation."""
        return "\n".join(
            f"EP {o['old_ep_size']} -> {o['new_ep_size']}: {o['phase']} in {o['timings']['total_ms'] / 1e3:.2f} s, "
            f"{o['moved_requests']} running requests moved"
            for o in self.operations
        )
