"""What every memory backend does alike. Runs on each rig of tests/helpers/vmm_rigs.py."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.space import ColumnSpace, DenseSpace
from elasticmoe_sglang.hmm.vmm import VmmHandle, VmmUsage, backend_names, get_backend, register_backend, round_up
from elasticmoe_sglang.hmm.vmm import cpu as cpu_module
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire.to_hmm import HOST
from tests.helpers.leaks import no_leaks
from tests.helpers.tensors import tensor_from_handle
from tests.helpers.vmm_rigs import RIGS, Rig

NOTHING = VmmUsage(reserved_bytes=0, mapped_bytes=0, mappings=0, open_handles=0)


MARKS = {"cpu": pytest.mark.process, "npu": pytest.mark.toolchain, "cuda": (pytest.mark.process, pytest.mark.gpu)}


@pytest.fixture(params=[pytest.param(name, marks=MARKS[name]) for name in sorted(RIGS)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with RIGS[request.param]() as rig:
        yield rig
        gc.collect()
        assert rig.backend.usage() == NOTHING, "the test left memory behind"


@pytest.fixture
def cpu() -> Iterator[CpuBackend]:
    with no_leaks():
        backend = CpuBackend()
        yield backend
        gc.collect()
        assert backend.usage() == NOTHING, "the test left memory behind"


def test_memory_is_zeroed_and_stays_with_its_handle(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    va, handle = backend.reserve(4 * size), backend.create(size, 0)
    backend.map(va.base + 2 * size, handle)
    assert rig.read(va.base + 2 * size, size) == bytes(size)
    rig.write(va.base + 3 * size - 5, b"tail!")
    backend.unmap(va.base + 2 * size, size)
    backend.map(va.base, handle)
    assert rig.read(va.base + size - 5, 5) == b"tail!"
    assert backend.usage() == VmmUsage(reserved_bytes=4 * size, mapped_bytes=size, mappings=1, open_handles=1)
    backend.unmap(va.base, size)
    backend.close(handle)
    backend.release_va(va)


def test_one_handle_may_be_seen_at_two_addresses(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    first, second, handle = backend.reserve(size), backend.reserve(size), backend.create(size, 0)
    backend.map(first.base, handle)
    backend.map(second.base, handle)
    rig.write(first.base, b"same")
    assert rig.read(second.base, 4) == b"same"
    for va in (first, second):
        backend.unmap(va.base, size)
        backend.release_va(va)
    backend.close(handle)


def test_a_mapping_outlives_its_handle_and_tells_when_it_ends(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    va, handle, freed = backend.reserve(2 * size), backend.create(size, 0), []
    handle.on_free = lambda: freed.append(True)
    backend.map(va.base, handle)
    backend.map(va.base + size, handle)
    backend.close(handle)
    rig.write(va.base, b"alive")
    assert rig.read(va.base + size, 5) == b"alive"
    backend.unmap(va.base, size)
    assert not freed
    backend.unmap(va.base + size, size)
    assert freed == [True]
    backend.release_va(va)


def test_an_unmapped_handle_is_free_when_closed(rig: Rig) -> None:
    backend, freed = rig.backend, []
    handle = backend.create(backend.granularity, 0)
    handle.on_free = lambda: freed.append(True)
    backend.close(handle)
    assert freed == [True]
    with pytest.raises(VmmError, match="is closed"):
        backend.close(handle)
    with pytest.raises(VmmError, match="is closed"):
        backend.export(handle)


def test_imported_memory_is_not_exported_again(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    handle = backend.create(size, 0)
    fd = backend.export(handle)
    program = """
from elasticmoe_sglang.errors import VmmError
handle = backend.import_(fds[0], G, 0)
try:
    backend.export(handle)
except VmmError as error:
    print(error)
"""
    assert "cannot be exported again" in rig.in_another_process(program, fd)
    os.close(fd)
    backend.close(handle)


def test_misuse_is_an_exception(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    va, handle = backend.reserve(3 * size), backend.create(2 * size, 0)
    for wrong, says in (
        (va.base + 8, "not a multiple"),
        (va.base + 2 * size, "no reserved address range"),
        (va.base - size, "no reserved address range"),
    ):
        with pytest.raises(VmmError, match=says):
            backend.map(wrong, handle)
    backend.map(va.base + size, handle)
    for again in (va.base + size, va.base):
        with pytest.raises(VmmError, match="mapped already"):
            backend.map(again, handle)
    for start, length in ((va.base + size, size), (va.base + 2 * size, size), (va.base, 3 * size)):
        with pytest.raises(VmmError, match="not one mapping"):
            backend.unmap(start, length)
    with pytest.raises(VmmError, match="still has 1 mappings"):
        backend.release_va(va)
    for dst, src, nbytes in ((va.base, va.base + size, size), (va.base + size, va.base + 2 * size, 2 * size)):
        with pytest.raises(VmmError):
            backend.copy(dst, src, nbytes)
    backend.unmap(va.base + size, 2 * size)
    backend.close(handle)
    with pytest.raises(VmmError, match="is closed"):
        backend.map(va.base, handle)
    backend.release_va(va)
    with pytest.raises(VmmError, match="was not reserved here"):
        backend.release_va(va)
    for nbytes in (0, -size, size + 1):
        with pytest.raises(VmmError, match="positive multiple"):
            backend.create(nbytes, 0)
    with pytest.raises(VmmError, match="cannot reserve"):
        backend.reserve(0)


def test_memory_is_shared_between_processes(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    va, handle = backend.reserve(size), backend.create(size, 0)
    backend.map(va.base, handle)
    rig.write(va.base, b"from the owner")
    fd = backend.export(handle)
    program = """
va, handle = backend.reserve(G), backend.import_(fds[0], G, 0)
assert handle.imported
backend.map(va.base, handle)
backend.close(handle)
print(read(va.base, 14).decode())
write(va.base + G - 6, b'answer')
backend.unmap(va.base, G)
backend.release_va(va)
print(backend.usage().open_handles)
"""
    assert rig.in_another_process(program, fd).split("\n") == ["from the owner", "0"]
    assert rig.read(va.base + size - 6, 6) == b"answer"
    os.close(fd)
    backend.unmap(va.base, size)
    backend.close(handle)
    backend.release_va(va)


def test_copies_cross_handles(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    source, target = backend.reserve(2 * size), backend.reserve(2 * size)
    handles = [backend.create(size, 0) for _ in range(4)]
    for index, handle in enumerate(handles):
        va = (source, target)[index // 2]
        backend.map(va.base + index % 2 * size, handle)
    rig.write(source.base + size - 3, b"abcdef")  # across two mappings
    backend.copy(target.base + 1, source.base + size - 3, 6)
    backend.copy(target.base + size - 3, source.base + size - 3, 6)
    assert rig.read(target.base, 8) == b"\0abcdef\0"
    assert rig.read(target.base + size - 3, 6) == b"abcdef"
    for index, handle in enumerate(handles):
        backend.unmap((source, target)[index // 2].base + index % 2 * size, size)
        backend.close(handle)
    backend.release_va(source)
    backend.release_va(target)


def test_a_column_is_pulled_from_a_peer(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    column_bytes = 2 * size - 100
    window, peer = backend.reserve(2 * size), backend.create(2 * size, 0)
    backend.map(window.base, peer)
    content = bytes(range(251)) * (column_bytes // 251 + 1)
    rig.write(window.base, content[:column_bytes])
    backend.unmap(window.base, 2 * size)
    space = ColumnSpace(backend, 4, column_bytes)
    assert space.pitch == 2 * size
    space.map_column(2, backend.create(2 * size, 0))
    stats = space.pull(2, peer, chunk_bytes=size // 2)
    assert (stats.nbytes, stats.chunks, stats.complete) == (column_bytes, 4, True)
    assert rig.read(space.address(2), column_bytes) == content[:column_bytes]
    assert space.mapped() == {2}
    space.unmap_column(2)
    assert space.mapped() == set()
    space.close()
    backend.release_va(window)


def test_concurrent_maps_and_unmaps_keep_the_books(rig: Rig) -> None:
    backend, size = rig.backend, rig.backend.granularity
    va = backend.reserve(4 * size)
    errors: list[Exception] = []

    def work(slot: int) -> None:
        try:
            for turn in range(20):
                handle = backend.create(size, 0)
                backend.map(va.base + slot * size, handle)
                backend.close(handle)
                rig.write(va.base + slot * size, bytes([turn]))
                backend.unmap(va.base + slot * size, size)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    backend.release_va(va)


# Books, on the CPU ------------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 3)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_any_order_of_maps_and_unmaps(moves: list[tuple[bool, int, int]]) -> None:
    backend, page = CpuBackend(), CpuBackend().granularity
    va = backend.reserve(8 * page)
    mapped: dict[int, tuple[int, VmmHandle]] = {}
    for mapping, place, pages in moves:
        taken = {p for start, (n, _) in mapped.items() for p in range(start, start + n)}
        wanted = set(range(place, place + pages))
        address = va.base + place * page
        if mapping:
            handle = backend.create(pages * page, 0)
            if max(wanted) > 7 or taken & wanted:
                with pytest.raises(VmmError):
                    backend.map(address, handle)
                backend.close(handle)
            else:
                backend.map(address, handle)
                mapped[place] = (pages, handle)
        elif place in mapped and mapped[place][0] == pages:
            backend.unmap(address, pages * page)
            backend.close(mapped.pop(place)[1])
        else:
            with pytest.raises(VmmError):
                backend.unmap(address, pages * page)
        usage = backend.usage()
        assert (usage.mappings, usage.mapped_bytes) == (len(mapped), sum(n for n, _ in mapped.values()) * page)
    for place, (pages, handle) in mapped.items():
        backend.unmap(va.base + place * page, pages * page)
        backend.close(handle)
    backend.release_va(va)
    assert backend.usage() == NOTHING


def test_touching_an_empty_slot_is_a_fault() -> None:
    rig = Rig(backend=CpuBackend(), read=lambda va, n: b"", write=lambda va, data: None)
    program = "va = backend.reserve(G)\nprint(read(va.base, 1))"
    with pytest.raises(AssertionError):
        rig.in_another_process(program)


def test_memory_of_changeable_or_other_size_is_not_imported(cpu: CpuBackend) -> None:
    page = cpu.granularity
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, page)
    with pytest.raises(VmmError, match="of changeable size"):
        cpu.import_(unsealed, page, 0)
    handle = cpu.create(page, 0)
    with pytest.raises(OSError):
        os.ftruncate(handle.native, 0)
    with pytest.raises(VmmError, match=f"holds {page} bytes, {2 * page} were announced"):
        cpu.import_(cpu.export(handle), 2 * page, 0)
    with pytest.raises(VmmError, match="import of descriptor"):
        cpu.import_(os.open(os.devnull, os.O_RDONLY), page, 0)
    cpu.close(handle)


def test_the_machine_running_out_is_an_exception(cpu: CpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VmmError, match=r"mmap of .* failed"):
        cpu.reserve(1 << 62)

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(cpu_module.os, "posix_fallocate", full)
    with pytest.raises(VmmError, match=r"No space left on device\. The machine is out of memory"):
        cpu.create(cpu.granularity, 0)


def test_memory_of_a_device_is_allocated_at_once_and_host_memory_when_it_is_written(cpu: CpuBackend) -> None:
    nbytes = 64 * cpu.granularity
    device, host = cpu.create(nbytes, 0), cpu.create(nbytes, HOST)
    va = cpu.reserve(nbytes)
    cpu.map(va.base, host)
    assert (cpu.resident_bytes(device), cpu.resident_bytes(host)) == (nbytes, 0)
    ctypes.memset(va.base, 1, 1)
    assert cpu.resident_bytes(host) == cpu.granularity
    with pytest.raises(PermissionError):
        os.ftruncate(host.native, 0)
    cpu.unmap(va.base, nbytes)
    cpu.release_va(va)
    cpu.close(device)
    cpu.close(host)


def test_a_copy_lets_other_threads_run(cpu: CpuBackend) -> None:
    size = 64 << 20
    va, handles = cpu.reserve(2 * size), [cpu.create(size, 0) for _ in range(2)]
    for index, handle in enumerate(handles):
        cpu.map(va.base + index * size, handle)
    turns, done = [0], threading.Event()

    def spin() -> None:
        while not done.is_set():
            turns[0] += 1

    spinner = threading.Thread(target=spin)
    spinner.start()
    most = 0
    for _ in range(10):
        before = turns[0]
        cpu.copy(va.base, va.base + size, size)
        most = max(most, turns[0] - before)
    done.set()
    spinner.join(10)
    # A copy that kept the interpreter's lock would let the other thread take no turn at all.
    assert most > 1000
    for index, handle in enumerate(handles):
        cpu.unmap(va.base + index * size, size)
        cpu.close(handle)
    cpu.release_va(va)


# Tensors and spaces, on the CPU -------------------------------------------------------------------------------------

LAYOUT = ColumnLayout.of(
    [
        ("layers.0.w13", (6, 5), "bfloat16"),
        ("layers.0.w2", (5, 3), "float32"),
        ("layers.1.w13", (600, 5), "bfloat16"),
    ]
)


def test_layouts_are_aligned_and_comparable() -> None:
    import torch

    assert LAYOUT.offsets == {"layers.0.w13": 0, "layers.0.w2": 64, "layers.1.w13": 128}
    assert LAYOUT.column_bytes == 128 + round_up(6000, 64)
    same = ColumnLayout.of([(s.name, s.shape, getattr(torch, s.dtype)) for s in LAYOUT.specs])
    assert same == LAYOUT and same.fingerprint() == LAYOUT.fingerprint()
    assert ColumnLayout(LAYOUT.specs[:2]).fingerprint() != LAYOUT.fingerprint()
    with pytest.raises(ValueError, match="distinct names"):
        ColumnLayout.of([("a", (1,), "int8"), ("a", (1,), "int8")])
    with pytest.raises(ValueError, match="complex64"):
        ColumnLayout.of([("a", (1,), "complex64")])


def test_layer_views_stride_over_slots_and_hold_what_was_written(cpu: CpuBackend) -> None:
    import torch

    space = ColumnSpace(cpu, 6, LAYOUT.column_bytes)
    views = space.views(LAYOUT)
    generator = torch.Generator().manual_seed(3)
    written = {}
    for slot in (1, 4):
        space.map_column(slot, cpu.create(space.pitch, 0))
        for spec in LAYOUT.specs:
            value = torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype))
            views[spec.name][slot].copy_(value)
            written[slot, spec.name] = value
    again = space.views(LAYOUT)
    for spec in LAYOUT.specs:
        view = again[spec.name]
        assert tuple(view.shape) == (6, *spec.shape)
        assert view.stride(0) * view.element_size() == space.pitch == 8192
        assert view[4].is_contiguous() and view[4].data_ptr() % 64 == 0
        for slot in (1, 4):
            assert torch.equal(view[slot], written[slot, spec.name])
    # A kernel that takes the whole strided tensor and only mapped slots.
    ids = torch.tensor([4, 1, 4])
    picked = again["layers.0.w2"].index_select(0, ids)
    assert torch.equal(picked, torch.stack([written[slot, "layers.0.w2"] for slot in (4, 1, 4)]))
    space.close()
    assert cpu.usage().mappings == 2, "unmapped under living tensors"
    del view, views, again
    gc.collect()


def test_a_slot_gets_another_column_under_living_tensors(cpu: CpuBackend) -> None:
    space = ColumnSpace(cpu, 3, 4096)
    view = space.views(ColumnLayout.of([("x", (1024,), "float32")]))["x"]
    space.map_column(0, cpu.create(4096, 0))
    view[0].fill_(7)
    space.unmap_column(0)
    space.map_column(0, cpu.create(4096, 0))
    assert view[0].sum() == 0
    with pytest.raises(VmmError, match="mapped already"):
        space.map_column(0, cpu.create(4096, 0))
    with pytest.raises(VmmError, match="does not fit slots of 4096"):
        space.map_column(1, cpu.create(8192, 0))
    with pytest.raises(VmmError, match="slot 3 does not exist"):
        space.map_column(3, cpu.create(4096, 0))
    with pytest.raises(VmmError, match="nothing is mapped"):
        space.unmap_column(1)
    with pytest.raises(VmmError, match="exceeds columns"):
        space.views(LAYOUT)
    space.close()
    with pytest.raises(VmmError, match="was closed"):
        space.map_column(1, cpu.create(4096, 0))


def test_a_pull_keeps_its_limit_and_stops_when_told(cpu: CpuBackend) -> None:
    nbytes = 1 << 20
    space = ColumnSpace(cpu, 2, nbytes)
    space.map_column(0, cpu.create(nbytes, 0))
    stats = space.pull(0, cpu.create(nbytes, 1), chunk_bytes=1 << 18, bytes_per_second=8 << 20)
    assert stats.complete and 0.12 < stats.seconds < 3.0  # 125 ms, the last chunk's wait included
    stop = threading.Event()
    results = []

    def pull() -> None:
        source = cpu.create(nbytes, 1)
        results.append(space.pull(0, source, chunk_bytes=4096, bytes_per_second=40960, should_stop=stop.is_set))

    thread = threading.Thread(target=pull)
    thread.start()
    while not space._busy:
        pass
    with pytest.raises(VmmError, match="being filled"):
        space.unmap_column(0)
    stop.set()
    thread.join(5)
    assert not results[0].complete and results[0].nbytes < nbytes
    space.unmap_column(0)
    with pytest.raises(VmmError, match="not mapped throughout"):
        space.pull(0, cpu.create(nbytes, 1))
    space.close()


def test_the_dense_block(cpu: CpuBackend) -> None:
    import torch

    layout = DenseLayout.of([("embed", (10, 7), torch.float32), ("norm", (7,), torch.bfloat16)])
    space = DenseSpace(cpu, layout)
    with pytest.raises(VmmError, match="not mapped throughout"):
        space.pull(cpu.create(space.nbytes, 1))
    with pytest.raises(VmmError, match="does not fit a dense layout of 4096"):
        space.map(cpu.create(8192, 0))
    source = cpu.create(space.nbytes, 1)
    peer = tensor_from_handle(cpu, source, (10, 7), "float32")
    peer.copy_(torch.arange(70).view(10, 7))
    space.map(cpu.create(space.nbytes, 0))
    assert space.pull(source).nbytes == layout.dense_bytes == 384
    views = space.views()
    assert torch.equal(views["embed"], peer) and views["embed"].is_contiguous()
    assert views["norm"].dtype == torch.bfloat16 and views["norm"].shape == (7,)
    del peer, views
    space.close()


def test_memory_goes_with_the_last_tensor_that_looks_at_it(cpu: CpuBackend) -> None:
    import torch

    freed: list[bool] = []
    handle = cpu.create(4096, 0)
    handle.on_free = lambda: freed.append(True)
    tensor = tensor_from_handle(cpu, handle, (8, 4), "float32")
    cpu.close(handle)
    row = tensor[3]
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    del tensor
    gc.collect()
    assert not freed
    row.fill_(2)
    assert parameter.sum() == 8
    del row
    gc.collect()
    assert not freed
    del parameter
    gc.collect()
    assert freed == [True] and cpu.usage() == NOTHING


def test_a_finalizer_waits_for_the_call_it_interrupts(cpu: CpuBackend) -> None:
    order: list[str] = []
    with cpu._books():
        cpu.when_idle(lambda: order.append("finalizer"))
        order.append("call")
    assert order == ["call", "finalizer"]
    cpu.when_idle(lambda: order.append("now"))
    assert order[-1] == "now"


def test_backends_are_found_by_name() -> None:
    assert "cpu" in backend_names()
    assert get_backend("cpu") is get_backend("cpu")
    register_backend("another-cpu", "elasticmoe_sglang.hmm.vmm.cpu:CpuBackend")
    assert isinstance(get_backend("another-cpu"), CpuBackend)
    with pytest.raises(VmmError, match=r"no memory backend is called 'tpu'.*Known: .*cpu"):
        get_backend("tpu")
