"""How long the phases of a transition may take, and the name of its proposal."""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_sglang.planner import TransitionPlan


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds.

    Attributes:
        prepare, commit, finish: of the phases; `finish` also of each step that undoes another.
        recover: for all attempts to recover from the same losses; then the server ends.
        collective: after which a rank misses another one in a collective.
    """

    prepare: float
    commit: float
    finish: float
    recover: float
    collective: float


def commit_id(plan: TransitionPlan, attempt: int) -> str:
    """The name of a plan's proposal in messages and fences."""
    return f"{plan.after.epoch}.{attempt}"
