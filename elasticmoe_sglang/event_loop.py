"""Coroutines across event loops of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_ResultT = TypeVar("_ResultT")


async def run_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
    """Run a coroutine in `loop` and wait for its result here; cancelling the wait cancels the coroutine."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))
