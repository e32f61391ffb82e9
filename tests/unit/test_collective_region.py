"""The collective region, the control page, the membership and the futex calls."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.control_page import ControlPage, SharedMemory, WorkerState
from elasticmoe_sglang.comm.header import DTYPE_FIELD, Op, Reduction, describe_header, pack_header
from elasticmoe_sglang.comm.membership import Membership, mask_to_ranks, ranks_to_mask
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import ElasticMoEError, UserInputError
from tests.helpers.barrier_cases import view

GEOMETRY = {"channels": 2, "window_bytes": 64 << 10}


@pytest.fixture
def region() -> Iterator[int]:
    descriptor = os.memfd_create("elasticmoe-test", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, CollectiveRegion.region_bytes(4, **GEOMETRY))
    yield descriptor
    os.close(descriptor)


@given(st.sets(st.integers(0, 63)))
def test_mask_and_ranks_are_inverse(ranks: set[int]) -> None:
    assert mask_to_ranks(ranks_to_mask(ranks)) == tuple(sorted(ranks))


@pytest.mark.parametrize(
    "fields",
    [
        {"ranks": (1, 2), "epoch": 1, "capacity": 4},
        {"ranks": (0, 2, 1), "epoch": 1, "capacity": 4},
        {"ranks": (0, 1, 1), "epoch": 1, "capacity": 4},
        {"ranks": (0, 4), "epoch": 1, "capacity": 4},
        {"ranks": (), "epoch": 1, "capacity": 4},
        {"ranks": (0,), "epoch": -1, "capacity": 4},
    ],
)
def test_what_is_no_membership(fields: dict[str, object]) -> None:
    with pytest.raises(UserInputError):
        Membership(**fields)  # type: ignore[arg-type]


def test_a_membership_knows_its_mask_and_successor() -> None:
    membership = Membership(ranks=(0, 2), epoch=4, capacity=4)
    assert (membership.mask, membership.size) == (0b101, 2)
    assert membership.next([3, 0]) == Membership(ranks=(0, 3), epoch=5, capacity=4)


def test_an_unformatted_region_is_refused(region: int) -> None:
    with pytest.raises(UserInputError, match="format"):
        CollectiveRegion(region, 0)


@pytest.mark.parametrize(
    "geometry",
    [
        {"capacity": 0},
        {"capacity": 65},
        {"capacity": 4, "window_bytes": 5000},
        {"capacity": 4, "window_bytes": 4096},
        {"capacity": 4, "channels": 100},
    ],
)
def test_impossible_geometry_is_refused(region: int, geometry: dict[str, int]) -> None:
    with pytest.raises(UserInputError):
        CollectiveRegion.format(region, **{**GEOMETRY, **geometry})


@pytest.mark.process
def test_control_page_in_any_process(region: int) -> None:
    control = CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    assert not control.has_membership
    with pytest.raises(UserInputError):
        control.read_membership()
    for epoch, ranks in enumerate(((0, 1), (0, 1, 3), (0,))):
        control.publish(view(ranks, epoch, 4))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            seen = ControlPage(SharedMemory(region)).read_membership()
            os.write(write, f"{seen.epoch} {seen.mask}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 100).decode() == f"{epoch} {ranks_to_mask(ranks)}"
        os.close(read)
        os.close(write)


@pytest.mark.process
def test_a_reader_never_sees_half_a_view(region: int) -> None:
    control = CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    choices = [(0, 1), (0, 1, 2, 3), (0, 3), (0,)]
    control.publish(view(choices[0], 0, 4))
    child = os.fork()
    if child == 0:
        page = ControlPage(SharedMemory(region))
        for epoch in range(1, 20_000):
            page.publish(view(choices[epoch % 4], epoch, 4))
        os._exit(0)
    while True:
        seen = control.read_view()
        assert seen == view(choices[seen.epoch % 4], seen.epoch, 4)
        if seen.epoch == 19_999:
            break
    os.waitpid(child, 0)


@pytest.mark.process
def test_the_page_names_each_ranks_worker_and_whether_it_lives(region: int) -> None:
    control = CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    assert not control.alive(2) and control.worker(2).pid == 0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        region = CollectiveRegion(region, 2)
        region.register(WorkerState.JOINING)
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    info = control.worker(2)
    assert (info.pid, info.state) == (child, WorkerState.JOINING)
    assert control.alive(2)
    os.kill(child, 9)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not control.alive(2), "a zombie is dead"
    os.waitpid(child, 0)
    assert not control.alive(2)
    # Another process with the same number would have another start time.
    control.words[control.rank_word(2, 0)] = os.getpid()
    assert not control.alive(2)
    os.close(read)
    os.close(write)


def test_the_view_changes_only_forward_and_only_by_itself(region: int) -> None:
    CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    region = CollectiveRegion(region, 1)
    assert region.is_solo and region.members == (1,) and region.epoch == 0
    region.set_membership(Membership(ranks=(0, 1), epoch=0, capacity=4))
    version = region.version
    region.control.publish(view((0, 1, 2), 5, 4))
    assert region.members == (0, 1) and region.version == version
    region.solo()
    assert region.is_solo and region.version > version
    for bad in (
        Membership(ranks=(0, 1), epoch=0, capacity=4),
        Membership(ranks=(0, 2), epoch=6, capacity=4),
        Membership(ranks=(0, 1), epoch=6, capacity=5),
        Membership(ranks=(0, 1), epoch=1 << 30, capacity=4),
    ):
        with pytest.raises(UserInputError):
            region.set_membership(bad)
    region.set_membership(Membership(ranks=(0, 1, 2), epoch=5, capacity=4))
    assert (region.members, region.epoch) == ((0, 1, 2), 5)


def test_formatting_again_forgets_an_earlier_server(region: int) -> None:
    control = CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    control.publish(view((0, 1), 9, 4))
    CollectiveRegion(region, 1).register()
    again = CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    assert not again.has_membership and again.worker(1).pid == 0


def test_channels_are_numbered_alike_and_come_back(region: int) -> None:
    CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    region = CollectiveRegion(region, 0)
    assert (region.take_channel(), region.take_channel()) == (0, 1)
    with pytest.raises(UserInputError, match="channels"):
        region.take_channel()
    region.return_channel(0)
    assert region.take_channel() == 0


@given(
    st.sampled_from(list(Op)),
    st.sampled_from(list(DTYPE_FIELD)),
    st.integers(0, (1 << 42) - 1),
    st.integers(0, 63),
    st.sampled_from(list(Reduction)),
)
def test_headers_tell_all_apart(op: Op, dtype: object, nbytes: int, root: int, reduction: Reduction) -> None:
    header = pack_header(op, dtype_field=DTYPE_FIELD[dtype], nbytes=nbytes, root=root, reduction=reduction)  # type: ignore[index]
    assert header < 1 << 64
    text = describe_header(header)
    assert text.startswith(op.name.lower()) and reduction.name.lower() in text
    assert f"{nbytes} bytes" in text or op in (Op.BARRIER, Op.REPLAY)
    others = (
        pack_header(op, dtype_field=DTYPE_FIELD[dtype], nbytes=nbytes ^ 1, root=root, reduction=reduction),  # type: ignore[index]
        pack_header(op, dtype_field=DTYPE_FIELD[dtype], nbytes=nbytes, root=root ^ 1, reduction=reduction),  # type: ignore[index]
    )
    assert header not in others


def test_futex_times_out_wakes_and_counts() -> None:
    word = ctypes.c_uint32(7)
    address = ctypes.addressof(word)
    started = time.monotonic()
    assert futex.wait(address, 7, 0.05) is False
    assert 0.04 <= time.monotonic() - started < 2
    assert futex.wait(address, 8, 5.0) is True, "a word that changed already is not slept on"
    woken = threading.Event()

    def sleeper() -> None:
        while word.value == 7:
            futex.wait(address, 7, 10.0)
        woken.set()

    thread = threading.Thread(target=sleeper)
    thread.start()
    time.sleep(0.05)
    futex.add_one_and_wake(address)
    assert woken.wait(5) and word.value == 8
    thread.join()
    word.value = 0xFFFFFFFF
    futex.add_one_and_wake(address)
    assert word.value == 0


@pytest.mark.process
def test_additions_of_many_processes_are_not_lost(region: int) -> None:
    shared = SharedMemory(region)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            for _ in range(5000):
                futex.add_one_and_wake(shared.address)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert shared.words(0, 8)[0] == 15_000


def test_errors_say_where() -> None:
    from elasticmoe_sglang.errors import PeerDied

    error: ElasticMoEError = PeerDied("the process of rank 3 is gone", rank=3, epoch=2, operation="allreduce")
    assert "rank 3" in str(error) and "epoch 2" in str(error) and "allreduce" in str(error)


@pytest.mark.process
def test_inductor_may_ask_a_group_on_gpus_for_its_backend(region: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its cache has what a rank would compile it lengthens NCCL's time limits. A DeepSeek rank that booted after
    others ended there."""
    import torch
    from torch.distributed import distributed_c10d

    from elasticmoe_sglang.comm.process_group import ElasticProcessGroup

    class OnGpus(ElasticProcessGroup):
        @property
        def _device_types(self) -> list[torch.device]:
            return [torch.device("cpu"), torch.device("cuda")]

    CollectiveRegion.format(region, capacity=4, **GEOMETRY)
    group = OnGpus(CollectiveRegion(region, 0), (0, 1), 0, 1.0)
    monkeypatch.setitem(distributed_c10d._world.pg_map, group, ("elastic", None))
    distributed_c10d._add_ephemeral_timeout_for_all_pgs(timedelta(seconds=1))
    assert group._get_backend(torch.device("cuda")) is group
    with pytest.raises(RuntimeError, match="carries no tensors on xpu"):
        group._get_backend(torch.device("xpu"))
