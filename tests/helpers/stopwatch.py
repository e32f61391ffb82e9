"""How long this process has run, without what other programs on a busy machine cost it."""

from __future__ import annotations

import time
from pathlib import Path

import psutil


def seconds() -> float:
    """Since the process began, without the time in which its main thread waited for a processor."""
    return time.time() - psutil.Process().create_time() - queued_s()


def queued_s() -> float:
    """Seconds in which the main thread could have run and did not; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
