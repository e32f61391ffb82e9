"""Cores of devices: on the CPU a device is a budget of memory and a set of cores.

`off`: ranks run on any core. `0-3;4-7`: the cores of each device, in order. `auto`: equal sets of the cores that the
server may use, where there is one for every rank.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from elasticmoe_sglang.errors import UserInputError

OFF, AUTO = "off", "auto"
_FLAG = "--elasticmoe-cpu-bind"
_RUN = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_SPARE_FROM = 4
"""With so many cores a device each gives one to the other processes, where none would be left for them."""

Cores = tuple[int, ...]


def usable_cores() -> list[int]:
    """Cores this process may run on, ascending."""
    return sorted(os.sched_getaffinity(0))


@lru_cache(maxsize=8)
def parse_core_sets(text: str) -> tuple[Cores, ...]:
    """ "0-3;8,9" -> ((0, 1, 2, 3), (8, 9)). Raises UserInputError: malformed, or a core that is in two sets."""
    sets = tuple(_parse_set(part) for part in text.split(";"))
    seen: set[int] = set()
    for cores in sets:
        if twice := seen & set(cores):
            raise UserInputError(f"{_FLAG} {text} has core {min(twice)} twice", hint="Give each device its own cores")
        seen |= set(cores)
    return sets


def _parse_set(text: str) -> Cores:
    cores: set[int] = set()
    for part in text.split(","):
        match = _RUN.fullmatch(part.strip())
        run = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not run:
            raise UserInputError(
                f"{_FLAG}: {text!r} is no set of cores",
                hint="Give off, auto, or a set for each device, like 0-3;4-7 or 0,2;1,3",
            )
        cores |= set(run)
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"; as `parse_core_sets` reads one set."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def resolve(setting: str, usable: Sequence[int], *, ranks: int, devices: int) -> str:
    """The setting for one machine: `off`, or the cores of each device.

    Args:
        usable: cores that this process may run on.

    Raises:
        UserInputError: malformed, not one set for each device, or a core that is not usable.
    """
    if setting == OFF:
        return OFF
    if setting == AUTO:
        return _share(sorted(usable), devices) if len(usable) >= ranks else OFF
    sets = check(setting, devices)
    if missing := {core for cores in sets for core in cores} - set(usable):
        raise UserInputError(
            f"{_FLAG} {setting}: this process may not run on core {format_cores(missing)}",
            hint=f"It may run on {format_cores(usable)}",
        )
    return setting


def check(setting: str, devices: int) -> tuple[Cores, ...]:
    """The cores of each device of an explicit setting. Raises UserInputError."""
    sets = parse_core_sets(setting)
    if len(sets) != devices:
        raise UserInputError(
            f"{_FLAG} {setting} has cores for {len(sets)} devices, and the ranks use {devices}",
            hint="Give a set for each device, separated by semicolons",
        )
    return sets


def _share(usable: Sequence[int], devices: int) -> str:
    each = len(usable) // devices
    if each >= _SPARE_FROM and len(usable) == each * devices:
        each -= 1
    return ";".join(format_cores(usable[i * each : (i + 1) * each]) for i in range(devices))


def bind_process(cores: Iterable[int]) -> None:
    """All threads of this process, and those that they start, run on these cores only."""
    allowed = set(cores)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), allowed)
