"""Which cores a device has, as a setting and on a machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.cpu_bind import bind_process, format_cores, parse_core_sets, resolve
from elasticmoe_sglang.errors import UserInputError


def test_sets_are_read() -> None:
    assert parse_core_sets("0-3;4-7") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert parse_core_sets("0,8-9 ; 1") == ((0, 8, 9), (1,))
    assert parse_core_sets("5") == ((5,),)


@pytest.mark.parametrize("text", ["", ";", "0;", "0-", "-1", "3-1", "a", "0..3", "0 1", "1;2,,3", "0-1000000", "on"])
def test_what_is_no_set_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(UserInputError, match=r"--elasticmoe-cpu-bind.*like 0-3;4-7"):
        parse_core_sets(text)


def test_a_core_of_two_devices_is_refused() -> None:
    with pytest.raises(UserInputError, match="core 3 twice"):
        parse_core_sets("0-3;3-6")


@given(st.lists(st.integers(0, 200), min_size=1, unique=True))
def test_what_is_written_is_read_back(cores: list[int]) -> None:
    assert parse_core_sets(format_cores(cores)) == (tuple(sorted(cores)),)


@pytest.mark.parametrize(
    ("cores", "ranks", "devices", "expected"),
    [
        (2, 2, 2, "0;1"),
        (3, 2, 2, "0;1"),  # core 2 is the others'
        (4, 2, 2, "0-1;2-3"),
        (8, 2, 2, "0-2;3-5"),  # one core of four each is the others'
        (9, 2, 2, "0-3;4-7"),
        (4, 4, 2, "0-1;2-3"),
        (2, 4, 4, "off"),
        (3, 4, 2, "off"),
    ],
)
def test_auto_gives_every_rank_a_core_or_binds_none(cores: int, ranks: int, devices: int, expected: str) -> None:
    assert resolve("auto", range(cores), ranks=ranks, devices=devices) == expected


@given(st.sets(st.integers(0, 300), min_size=1, max_size=130), st.integers(1, 64))
def test_auto_shares_usable_cores_equally(usable: set[int], ranks: int) -> None:
    text = resolve("auto", sorted(usable), ranks=ranks, devices=ranks)
    if text == "off":
        assert len(usable) < ranks
        return
    sets = parse_core_sets(text)
    assert len(sets) == ranks and len({len(cores) for cores in sets}) == 1
    assert {core for cores in sets for core in cores} <= usable
    assert ElasticConfig(ep_size=ranks, max_ep_size=ranks, cpu_bind=text).cores_of(ranks - 1) == sets[-1]


def test_cores_that_may_not_be_used_are_named() -> None:
    with pytest.raises(UserInputError, match=r"may not run on core 4-5\. It may run on 0-3"):
        resolve("0-1;4-5", range(4), ranks=2, devices=2)
    assert resolve("0;2", [0, 2], ranks=2, devices=2) == "0;2"
    assert resolve("off", [0], ranks=2, devices=2) == "off"


def test_one_set_for_each_device() -> None:
    with pytest.raises(UserInputError, match="cores for 1 devices, and the ranks use 2"):
        ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="0-1")
    shared = ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=2, cpu_bind="0-1;2,5")
    assert [shared.cores_of(rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 5), (2, 5)]
    assert ElasticConfig(ep_size=1, max_ep_size=2).cores_of(1) is None
    with pytest.raises(UserInputError, match="no set of cores"):
        ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="all")


@pytest.fixture
def unbound() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    bind_process(before)


def test_all_threads_are_bound_and_those_that_they_start(unbound: set[int]) -> None:
    found: list[set[int]] = []
    go = threading.Event()

    def work() -> None:
        go.wait(10)
        found.append(os.sched_getaffinity(0))

    early = threading.Thread(target=work)
    early.start()
    core = min(unbound)
    bind_process([core])
    late = threading.Thread(target=work)
    late.start()
    go.set()
    early.join()
    late.join()
    assert found == [{core}, {core}]
