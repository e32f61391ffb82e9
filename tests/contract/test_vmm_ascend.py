"""What is particular to the Ascend memory backend, over the stand-in for CANN. What all backends share: test_vmm.py."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from elasticmoe_sglang.errors import BadDriverCall, OutOfDeviceMemory, VmmError
from elasticmoe_sglang.hmm.vmm import acl
from elasticmoe_sglang.hmm.vmm.ascend import AscendBackend
from tests.helpers import cann, cann_standin

pytestmark = pytest.mark.toolchain

M = 2 << 20


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[AscendBackend]:
    cann.standin_or_skip()
    monkeypatch.setenv("CANN_STANDIN_DEVICES", "4")
    monkeypatch.setenv("CANN_STANDIN_HBM_BYTES", str(32 * M))
    backend = AscendBackend()
    yield backend
    usage = backend.usage()
    assert (usage.mappings, usage.open_handles, usage.reserved_bytes) == (0, 0, 0), "the test left memory behind"
    assert not backend._physical and not backend._bindings and not backend._by_number


def in_another_process(program: str, *fds: int) -> str:
    """Runs `program` with a backend `b` and the descriptors `fds`; returns what it printed."""
    setup = f"M = {M}; fds = {list(fds)}\nfrom elasticmoe_sglang.hmm.vmm import get_backend\nb = get_backend('npu')\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + program],
        env=cann_standin.environment(devices=4, hbm_bytes=32 * M),
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sizes_and_names(backend: AscendBackend) -> None:
    assert backend.granularity == M
    assert backend.torch_device(3) == "npu:3"
    assert backend.device_count() == 4


def test_memory_is_zeroed_and_moves_with_its_handle(backend: AscendBackend) -> None:
    va, handle = backend.reserve(4 * M), backend.create(M, 0)
    backend.map(va.base + 2 * M, handle)
    assert ctypes.string_at(va.base + 2 * M, M) == bytes(M)
    ctypes.memset(va.base + 2 * M, 9, M)
    backend.unmap(va.base + 2 * M, M)
    backend.map(va.base, handle)
    assert ctypes.string_at(va.base + M - 1, 1) == b"\x09"
    backend.unmap(va.base, M)
    backend.close(handle)
    backend.release_va(va)


def test_closing_a_mapped_handle_frees_at_the_last_unmap(backend: AscendBackend) -> None:
    """CANN wants physical memory unmapped before it is freed; the stand-in refuses the other order."""
    va, freed = backend.reserve(2 * M), []
    handle = backend.create(16 * M, 1)
    backend.close(handle)
    handle = backend.create(M, 1)
    handle.on_free = lambda: freed.append(True)
    backend.map(va.base, handle)
    backend.close(handle)
    assert not freed and ctypes.string_at(va.base, 1) == b"\0"
    backend.unmap(va.base, M)
    assert freed == [True]
    backend.close(backend.create(32 * M, 1))  # all of it is free again
    backend.release_va(va)


def test_out_of_memory_says_so(backend: AscendBackend) -> None:
    with pytest.raises(OutOfDeviceMemory, match=r"out of memory .*207001.*device 0") as caught:
        backend.create(64 * M, 0)
    assert caught.value.code == 207001 and isinstance(caught.value, VmmError)


def test_one_device_a_range(backend: AscendBackend) -> None:
    va, here, there = backend.reserve(2 * M), backend.create(M, 0), backend.create(M, 1)
    backend.map(va.base, here)
    with pytest.raises(VmmError, match=r"holds pages of device 0.*reserve another"):
        backend.map(va.base + M, there)
    backend.unmap(va.base, M)
    backend.map(va.base + M, there)
    backend.unmap(va.base + M, M)
    for handle in (here, there):
        backend.close(handle)
    backend.release_va(va)


def test_a_shared_handle_is_exported_once_and_handed_out_often(backend: AscendBackend) -> None:
    va, handle = backend.reserve(M), backend.create(M, 0)
    backend.map(va.base, handle)
    ctypes.memmove(va.base, b"column", 6)
    fds = [backend.export(handle) for _ in range(3)]
    reader = """
import ctypes
va = b.reserve(2 * M)
one, two = b.import_(fds[0], M, 0), b.import_(fds[1], M, 0)  # the same memory twice: CANN would refuse the second
assert one.native == two.native and one.imported
b.map(va.base, one); print(ctypes.string_at(va.base, 6).decode())
b.close(one); b.close(two); ctypes.memmove(va.base, b"answer", 6); b.unmap(va.base, M)
three = b.import_(fds[2], M, 0); b.map(va.base, three)  # and again after it was all given back
print(ctypes.string_at(va.base, 6).decode()); b.unmap(va.base, M); b.close(three); b.release_va(va)
assert not b._physical
"""
    assert in_another_process(reader, *fds) == "column\nanswer"
    assert ctypes.string_at(va.base, 6) == b"answer"
    for fd in fds:
        os.close(fd)
    backend.unmap(va.base, M)
    backend.close(handle)
    backend.release_va(va)


def test_an_own_export_comes_back_as_the_own_handle(backend: AscendBackend) -> None:
    handle = backend.create(M, 2)
    again = backend.import_(backend.export(handle), M, 2)
    assert again.native == handle.native
    backend.close(handle)
    va = backend.reserve(M)
    backend.map(va.base, again)  # the memory lives as long as either handle
    backend.unmap(va.base, M)
    backend.close(again)
    backend.release_va(va)


def test_local_and_imported_pages_do_not_mix(backend: AscendBackend) -> None:
    handle = backend.create(M, 0)
    fd = backend.export(handle)
    mixer = """
from elasticmoe_sglang.errors import VmmError
va, own = b.reserve(2 * M), b.create(M, 0)
b.map(va.base, b.import_(fds[0], M, 0))
try:
    b.map(va.base + M, own)
except VmmError as error:
    print(error)
"""
    assert "imported pages only" in in_another_process(mixer, fd)
    os.close(fd)
    backend.close(handle)


def test_imported_handles_are_not_exported_on(backend: AscendBackend) -> None:
    handle = backend.create(M, 0)
    fd = backend.export(handle)
    program = """
from elasticmoe_sglang.errors import VmmError
try:
    b.export(b.import_(fds[0], M, 0))
except VmmError as error:
    print(error)
"""
    assert "cannot be exported again" in in_another_process(program, fd)
    os.close(fd)
    backend.close(handle)


def test_what_is_no_handle_is_refused(backend: AscendBackend) -> None:
    handle = backend.create(2 * M, 1)
    for nbytes, device in ((M, 1), (2 * M, 0)):
        with pytest.raises(VmmError, match=r"4194304 bytes of device 1, "):
            backend.import_(backend.export(handle), nbytes, device)
    wrong = os.memfd_create("wrong")
    os.write(wrong, b"x" * 36)
    with pytest.raises(VmmError, match="no NPU memory handle"):
        backend.import_(wrong, M, 0)
    token = backend.export(handle)
    with pytest.raises(OSError):
        os.pwrite(token, b"0", 8)  # a token cannot be changed by those it is handed to
    backend.close(handle)
    with pytest.raises(VmmError, match="was freed"):
        backend.import_(token, 2 * M, 1)


def test_copies_within_and_between_devices(backend: AscendBackend) -> None:
    ranges = [backend.reserve(2 * M) for _ in range(2)]
    handles = [backend.create(M, 0), backend.create(M, 0), backend.create(M, 3)]
    backend.map(ranges[0].base, handles[0])
    backend.map(ranges[0].base + M, handles[1])
    backend.map(ranges[1].base, handles[2])
    ctypes.memset(ranges[1].base, 5, M)
    backend.copy(ranges[0].base, ranges[1].base, M)  # device 3 to device 0; peer access is switched on by itself
    backend.copy(ranges[0].base + M, ranges[0].base, M)
    assert ctypes.string_at(ranges[0].base + 2 * M - 1, 1) == b"\x05"
    assert backend._peers == {(0, 3)}
    assert [len(streams) for streams in backend._streams.values()] == [1]
    for va in (ranges[0].base, ranges[0].base + M, ranges[1].base):
        backend.unmap(va, M)
    for handle in handles:
        backend.close(handle)
    for va in ranges:
        backend.release_va(va)


def test_the_threads_device_is_left_as_it_was(backend: AscendBackend) -> None:
    driver, device = acl.load(), ctypes.c_int32()
    driver("aclrtSetDevice", 2)
    handle = backend.create(M, 1)
    backend.close(handle)
    driver("aclrtGetDevice", device)
    assert device.value == 2


def test_any_thread_may_call(backend: AscendBackend) -> None:
    errors: list[BaseException] = []

    def work(device: int) -> None:
        try:
            for _ in range(20):
                va, handle = backend.reserve(M), backend.create(M, device)
                backend.map(va.base, handle)
                backend.close(handle)
                backend.unmap(va.base, M)
                backend.release_va(va)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


def test_host_memory_is_plain_memfd(backend: AscendBackend) -> None:
    handle = backend.create(M, -1)
    other = backend.import_(backend.export(handle), M, -1)
    os.pwrite(handle.native, b"window", 0)
    assert os.pread(other.native, 6, 0) == b"window"
    va = backend.reserve(M)
    with pytest.raises(VmmError, match="mmap"):
        backend.map(va.base, handle)
    backend.release_va(va)
    backend.close(handle)
    backend.close(other)


def test_codes_become_exceptions_with_their_meaning(backend: AscendBackend) -> None:
    with pytest.raises(BadDriverCall, match=r"aclrtMapMem failed: a parameter is invalid \(ACL_ERROR_RT_PARAM_INVALID"):
        backend.check(107000, "aclrtMapMem")
    for code, meaning in acl.CODES.items():
        with pytest.raises(meaning.error, match=str(code)) as caught:
            backend.check(code, "call")
        assert caught.value.code == code
    backend.check(0, "call")


def test_without_cann_the_error_says_what_to_do() -> None:
    program = "from elasticmoe_sglang.hmm.vmm import get_backend\nget_backend('npu')"
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert "VmmError" in done.stderr and "set_env.sh" in done.stderr
