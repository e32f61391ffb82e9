"""Programs of the engine: generators that wait for steps, or for a condition, without I/O and without a clock.

A program yields `All` (run these steps) or `Until` (wait for a condition or a time). The runner starts and cancels the
steps, and resumes the program with their results once all have ended, so that nothing goes on behind its back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.errors import ElasticMoEError

_T = TypeVar("_T")


class Failed(Exception):
    """A step failed, the deadline passed, or an event interrupted the steps. `cause`: what a step has raised."""

    def __init__(self, why: str, cause: Exception | None = None) -> None:
        super().__init__(why)
        self.cause = cause


@dataclass
class All:
    """Run steps concurrently. The first failure, the deadline or an interruption cancels the others; it is raised once
    all have ended. `each`: a failure does not stop the others, and results and exceptions are returned together."""

    steps: Sequence[s.Step]
    what: str
    deadline: float | None
    each: bool = False
    interrupted: Callable[[], str | None] = lambda: None
    numbers: list[int] = field(default_factory=list)
    ended: dict[int, s.StepEnded] = field(default_factory=dict)
    broken_by: Failed | None = None
    cancelled: bool = False
    started: float = 0.0

    def overdue(self) -> str:
        """What is said once the deadline has passed."""
        assert self.deadline is not None
        return f"{self.what} took longer than {self.deadline - self.started:.0f} s"

    def unended(self) -> dict[int, s.Step]:
        """The steps that have not ended, by number."""
        steps = zip(self.numbers, self.steps, strict=True)
        return {number: step for number, step in steps if number not in self.ended}


@dataclass
class Until:
    """Wait for a condition, or a time."""

    condition: Callable[[], bool]
    at: float | None


Program = Generator[All | Until, Any, _T]


class Runner:
    """Runs one program.

    Args:
        emit: takes `Start` and `Cancel`.

    Attributes:
        ended: the program has returned.
    """

    def __init__(self, program: Program[None], emit: Callable[[s.Effect], None]) -> None:
        self.ended = False
        self._program = program
        self._emit = emit
        self._waiting: All | Until | None = None
        self._numbers = 0
        self._now = 0.0

    def step_ended(self, event: s.StepEnded) -> None:
        """Note the end of a step; `advance` follows."""
        if isinstance(self._waiting, All) and event.number in self._waiting.numbers:
            self._waiting.ended[event.number] = event

    def wake_at(self) -> float | None:
        """When time alone resumes the program; None: never."""
        match self._waiting:
            case All(cancelled=False, deadline=deadline):
                return deadline
            case Until(at=at):
                return at
        return None

    def advance(self, now: float, operation_id: Callable[[], str]) -> None:
        """Resume the program for as long as what it waits for has come.

        Args:
            operation_id: the operation to which the steps belong that are started.
        """
        self._now, self._operation_id = now, operation_id
        if self._waiting is None and not self.ended:
            self._resume(lambda: next(self._program))
        while not self.ended:
            waiting = self._waiting
            if isinstance(waiting, Until):
                late = waiting.at is not None and now >= waiting.at
                if not late and not waiting.condition():
                    return
                self._resume(lambda: self._program.send(None))
            else:
                assert waiting is not None
                if not self._all_ended(waiting):
                    return
                self._resume_all(waiting)

    def _resume(self, resume: Callable[[], All | Until]) -> None:
        try:
            waiting = resume()
        except StopIteration:
            self.ended, self._waiting = True, None
            return
        self._waiting = waiting
        if isinstance(waiting, All):
            waiting.started = self._now
            for step in waiting.steps:
                self._numbers += 1
                waiting.numbers.append(self._numbers)
                self._emit(s.Start(number=self._numbers, step=step, operation_id=self._operation_id()))

    def _all_ended(self, waiting: All) -> bool:
        if len(waiting.ended) == len(waiting.numbers):
            return True
        if waiting.cancelled:
            return False
        failed = next((e.error for e in waiting.ended.values() if e.error is not None), None)
        why = waiting.interrupted()
        if waiting.deadline is not None and self._now >= waiting.deadline:
            steps = ", ".join(map(s.describe, waiting.unended().values()))
            waiting.broken_by = Failed(f"{waiting.overdue()}: could not {steps}")
        elif failed is not None and not waiting.each:
            waiting.broken_by = Failed(text_of(failed), failed)
        elif why is not None:
            waiting.broken_by = Failed(why)
        if waiting.broken_by is not None:
            waiting.cancelled = True
            for number in waiting.unended():
                self._emit(s.Cancel(number=number))
        return False

    def _resume_all(self, waiting: All) -> None:
        ended = [waiting.ended[number] for number in waiting.numbers]
        if waiting.each:
            # Whoever reports an outcome names its step.
            outcomes = [Failed(waiting.overdue()) if e.cancelled else e.error or e.result for e in ended]
            self._resume(lambda: self._program.send(outcomes))
            return
        error = next((e.error for e in ended if e.error is not None), None)
        failed = waiting.broken_by or (Failed(text_of(error), error) if error is not None else None)
        if failed is not None:
            self._resume(lambda: self._program.throw(failed))
        else:
            self._resume(lambda: self._program.send([e.result for e in ended]))


def text_of(error: Exception) -> str:
    """An error as part of a sentence."""
    if isinstance(error, ElasticMoEError | Failed):
        return str(error)
    return f"{type(error).__name__}: {error}"
