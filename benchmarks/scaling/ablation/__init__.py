"""Servers whose joining ranks do without one mechanism each, so that its worth can be measured (paper: Table 1).

Nothing of it is in the product. A server started with `environment(...)` has a `sitecustomize` on its path, which every
Python process of it runs first and which wraps the product's classes when they are imported (`wrapping`).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from elasticmoe_sglang.errors import UserInputError

ABLATIONS = ("standby", "handles", "zero-copy", "peer-copy")
"""What can be left out; docs/benchmarks.md says what a joining rank does instead."""
ENV = "ELASTICMOE_BENCH_WITHOUT"
"""The names, comma-separated, in the environment of every process of the server."""

_REPOSITORY = Path(__file__).parents[3]
_SITE = Path(__file__).parent / "site"


def environment(without: Collection[str]) -> dict[str, str]:
    """Variables for a server without these mechanisms; none are needed for a whole one.

    Raises:
        UserInputError: a name is unknown, or two of them exclude each other.
    """
    if not without:
        return {}
    if unknown := [name for name in without if name not in ABLATIONS]:
        raise UserInputError(f"no mechanism is called {', '.join(map(repr, unknown))}", hint=f"Known: {ABLATIONS}")
    if {"handles", "zero-copy"} <= set(without):
        raise UserInputError("either handles or zero-copy can be left out", hint="Both replace the same copy")
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(_SITE), str(_REPOSITORY), *filter(None, [before])])
    return {ENV: ",".join(without), "PYTHONPATH": path}


def without() -> frozenset[str]:
    """What this process does without."""
    return frozenset(filter(None, os.environ.get(ENV, "").split(",")))
