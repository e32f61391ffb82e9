"""All hooks, collected from the modules that declare them.

A module declares hooks by a top-level `HOOKS = Hooks(...)` (spec.py). Only modules whose source has one are imported:
others under `srt/` (our messages, a runner core) may import sglang at their top, and the catalogue is also read by
processes that never import sglang (documentation, tests, `doctor`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import elasticmoe_patches
from elasticmoe_patches.spec import HookSpec, Process

_DECLARES_HOOKS = re.compile(r"^HOOKS\b\s*[:=]", re.MULTILINE)


def hook_modules() -> tuple[str, ...]:
    """Names of the modules under `elasticmoe_patches/srt/` that declare hooks, sorted."""
    return tuple(sorted(_find_hook_modules()))


def _find_hook_modules() -> Iterator[str]:
    root = Path(elasticmoe_patches.__file__).parent
    for path in (root / "srt").rglob("*.py"):
        if _DECLARES_HOOKS.search(path.read_text(encoding="utf-8")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join((elasticmoe_patches.__name__, *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def all_hooks() -> tuple[HookSpec, ...]:
    """Every declared hook, ordered by module name and then as declared.

    Raises:
        ValueError: the same hook is declared twice for one target.
    """
    specs: list[HookSpec] = []
    seen: set[tuple[str, str]] = set()
    for name in hook_modules():
        for spec in importlib.import_module(name).HOOKS:
            if (spec.target, spec.hook) in seen:
                raise ValueError(f"{spec.hook} is declared twice for {spec.target}, the second time in {name}")
            seen.add((spec.target, spec.hook))
            specs.append(spec)
    return tuple(specs)


def select(process: Process, scopes: Collection[str]) -> tuple[HookSpec, ...]:
    """The hooks of these scopes which a process of this name needs."""
    return tuple(spec for spec in all_hooks() if spec.scope in scopes and spec.runs_in(process))
