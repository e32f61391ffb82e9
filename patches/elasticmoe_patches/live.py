"""Feeds the figures of the operator's page from what SGLang's tokenizer keeps of every request (`live_figures.py`)."""

from __future__ import annotations

import asyncio
from typing import Any

from elasticmoe_sglang.live_figures import LiveFigures, OpenRequests

ATTRIBUTE = "elasticmoe_live"
"""Attribute of the tokenizer manager that holds its `Live`."""


class Live:
    """Looks at the open requests in the tokenizer's event loop, for as long as there are any."""

    def __init__(self, tokenizer_manager: Any) -> None:
        states = tokenizer_manager.rid_to_state
        self.figures = LiveFigures()
        self._requests = OpenRequests(self.figures, lambda rid, state: states.get(rid) is state)
        self._task: asyncio.Task[None] | None = None

    def sent(self, rid: str, state: Any) -> None:
        """A request goes to a rank. To be called in the tokenizer's event loop."""
        from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

        if rid.startswith(HEALTH_CHECK_RID_PREFIX):
            return
        self._requests.add(rid, state)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while len(self._requests):
            await asyncio.sleep(self._requests.look())


def live(tokenizer_manager: Any) -> Live:
    """The one of this tokenizer manager, made when it is first asked for."""
    found: Live | None = getattr(tokenizer_manager, ATTRIBUTE, None)
    if found is None:
        found = Live(tokenizer_manager)
        setattr(tokenizer_manager, ATTRIBUTE, found)
    return found
