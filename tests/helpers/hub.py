"""Models that are in the Hugging Face hub's cache, without the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

_REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached_on_the_hub(cache: Path, name: str, model: Path) -> dict[str, str]:
    """Make a cache in which `name` is this model; returns the variables with which a process finds it, offline."""
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(_REVISION)
    shutil.copytree(model, entry / "snapshots" / _REVISION)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
