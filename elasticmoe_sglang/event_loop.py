"""Coroutines across event loops of one process, and several that fail together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from elasticmoe_sglang.errors import ElasticMoEError, PhaseTimeout

_ResultT = TypeVar("_ResultT")


async def run_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
    """Run a coroutine in `loop` and wait for its result here; cancelling the wait cancels the coroutine."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


async def run_together(seconds: float | None, what: str, steps: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run steps concurrently. After the first failure, the deadline or a cancellation the other steps are cancelled
    and awaited before it is raised.

    Raises:
        PhaseTimeout: not all steps ended within `seconds`.
    """
    tasks = [asyncio.ensure_future(step) for step in steps]
    if not tasks:
        return
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
    if late:
        raise PhaseTimeout(f"{what} took longer than {seconds:g} s")
    if len(errors) < len(tasks):
        raise ElasticMoEError(f"a step of {what} was cancelled")
