"""Ranks that share a device: why their hosts meet before a collective is launched, checked over every interleaving.

The model: a host runs its steps in order; a load (a module, a larger memory pool) waits until no kernel waits on the
device, whosever it is; a launch returns at once; the kernel of collective n waits on the device until all ranks have
launched theirs. A state from which nobody can go on, with work left, is the hang that was seen with four ranks on one
H200. The steps of a collective are recorded from the product's own code, not written down here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, cast

import pytest

pytest.importorskip("triton")

from elasticmoe_kernels.triton import collectives
from elasticmoe_sglang.comm.cuda_region import CudaRegion
from elasticmoe_sglang.comm.header import Op, describe_header, pack_header

LOAD, MEET, LAUNCH = "load", "meet", "launch"
Steps = tuple[str, ...]


def stuck(programs: Sequence[Steps]) -> tuple[int, ...] | None:
    """Each rank's position in a state that can be reached and not left; None when every run ends."""
    ranks = range(len(programs))

    def launched(at: tuple[int, ...], rank: int) -> int:
        return programs[rank][: at[rank]].count(LAUNCH)

    def met(at: tuple[int, ...], rank: int) -> int:
        """Meetings this rank has come to; it has come to the one it stands at."""
        return programs[rank][: at[rank] + 1].count(MEET)

    def can_go(at: tuple[int, ...], rank: int) -> bool:
        if at[rank] == len(programs[rank]):
            return False
        step = programs[rank][at[rank]]
        counts = [launched(at, other) for other in ranks]
        if step == LOAD:
            return len(set(counts)) == 1  # else a kernel waits for a rank that has not launched yet
        if step == MEET:
            return min(met(at, other) for other in ranks) >= met(at, rank)
        return True

    seen = {tuple(0 for _ in ranks)}
    todo = list(seen)
    while todo:
        at = todo.pop()
        able = [rank for rank in ranks if can_go(at, rank)]
        if not able and any(at[rank] < len(programs[rank]) for rank in ranks):
            return at
        for rank in able:
            after = (*at[:rank], at[rank] + 1, *at[rank + 1 :])
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return None


class Recorded:
    """Stands for one prepared launch of `collectives`."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def load(self) -> None:
        self._steps.append(LOAD)

    def run(self) -> None:
        self._steps.append(LAUNCH)


def steps_of_a_collective(launches: int, *, meeting: bool) -> Steps:
    steps: list[str] = []
    prepared = cast(Any, [Recorded(steps) for _ in range(launches)])
    collectives._run(prepared, (lambda: steps.append(MEET)) if meeting else None)
    return tuple(steps)


def test_without_a_meeting_a_module_load_and_a_waiting_kernel_hold_each_other_up() -> None:
    one = steps_of_a_collective(1, meeting=False)
    assert stuck([one, one]) is not None
    assert stuck([one, (LAUNCH,)]) is not None, "one rank that loads is enough"


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_with_the_meeting_every_run_ends(ranks: int, launches: int) -> None:
    collective = steps_of_a_collective(launches, meeting=True)
    first_launch = collective.index(LAUNCH)
    assert collective[first_launch - 1] == MEET and LOAD not in collective[first_launch:]
    # Loads of other kernels before, between and after two collectives, on some ranks and not on others.
    around = [
        before + collective + between + collective + after
        for before, between, after in itertools.product(((), (LOAD,)), repeat=3)
    ]
    for programs in itertools.combinations_with_replacement(around, ranks):
        assert stuck(programs) is None, programs


def test_random_programs_end_too() -> None:
    dice = random.Random(7)
    collective = steps_of_a_collective(1, meeting=True)
    for _ in range(60):
        count = dice.randint(1, 3)
        programs = []
        for _rank in range(3):
            steps: Steps = ()
            for _collective in range(count):
                steps += (LOAD,) * dice.randint(0, 2) + collective
            programs.append(steps)
        assert stuck(programs) is None, programs


def test_the_model_finds_a_load_between_meeting_and_launch() -> None:
    assert stuck([(MEET, LOAD, LAUNCH), (MEET, LAUNCH)]) is not None


class Engine:
    """The parts of a GroupEngine that the rendezvous looks at."""

    def __init__(self, ranks: tuple[int, ...], present: tuple[int, ...]) -> None:
        self.ranks, self.present = ranks, present
        self.local = len(present) == 1
        self.headers: list[int] = []

    def refresh(self) -> None:
        return

    def barrier(self, *, header: int) -> None:
        self.headers.append(header)


@pytest.mark.parametrize(
    ("present", "meets"), [((0, 1), True), ((0, 2), False), ((0, 2, 3), True), ((1,), False)], ids=str
)
def test_only_ranks_that_share_a_device_meet(present: tuple[int, ...], meets: bool) -> None:
    region = CudaRegion.__new__(CudaRegion)
    region._device_of = lambda rank: rank // 2
    engine = Engine((0, 1, 2, 3), present)
    header = pack_header(Op.LAUNCH, nbytes=64, root=Op.ALLREDUCE)
    region.rendezvous(cast(Any, engine), header)
    assert engine.headers == ([header] if meets else [])
    assert describe_header(header) == "launch of allreduce(64 bytes)"
