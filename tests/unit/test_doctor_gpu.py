"""`elasticmoe doctor` on a machine with NVIDIA GPUs: what it says for the ranks that are wanted there."""

from __future__ import annotations

import importlib.metadata

import pytest

from elasticmoe_sglang.cli import doctor_checks, doctor_gpu
from elasticmoe_sglang.cli.doctor_gpu import GpuDevice, GpuProbe, Wanted
from elasticmoe_sglang.comm.launch_room import LaunchRoom
from elasticmoe_sglang.errors import UserInputError

H100 = GpuDevice(name="NVIDIA H100 80GB HBM3", free=79 << 30, total=80 << 30, multiprocessors=132)
GOOD = GpuProbe(cuda="13.0", driver="13.0", kernels="0.4.5", mps=True, devices=(H100,))


def failed(found: GpuProbe, **wanted: int) -> dict[str, str]:
    """Name -> what was found, of the checks that failed. Each names a command."""
    bad = [check for check in doctor_gpu.checks(found, Wanted(**wanted)) if not check.ok]
    assert all(check.fix for check in bad)
    return {check.name: check.found for check in bad}


def but(**changes: object) -> GpuProbe:
    from msgspec.structs import replace

    return replace(GOOD, **changes)


def test_a_machine_that_serves_passes_every_check() -> None:
    assert not failed(GOOD, max_ep_size=4, ranks_per_device=4)
    assert not failed(GOOD)
    texts = {check.name: check.found for check in doctor_gpu.checks(GOOD, Wanted(max_ep_size=4, ranks_per_device=4))}
    assert texts["multiprocessors"] == "132: 33 a rank, collectives of 16 programs"
    assert texts["CUDA"] == "13.0, the driver's 13.0"


@pytest.mark.parametrize(("found", "ok"), [("2.11.0+cu130", True), ("2.13.0", True), ("2.12.0", False)])
def test_torch_is_judged_by_the_platform(monkeypatch: pytest.MonkeyPatch, found: str, ok: bool) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == "torch" else real(name))
    on_gpu, on_cpu = (
        next(check for check in doctor_checks.versions(kind) if check.name == "torch") for kind in ("cuda", "cpu")
    )
    assert on_gpu.ok is ok and on_cpu.ok is (found == "2.13.0")
    assert ok or on_gpu.found == "2.12.0, needs 2.11.0 or 2.13.0"


def test_ranks_that_share_a_gpu_need_mps() -> None:
    assert not failed(but(mps=False), max_ep_size=1)
    assert failed(but(mps=False), max_ep_size=2, ranks_per_device=2) == {"MPS": "does not answer"}


def test_too_few_gpus_for_the_ranks() -> None:
    assert failed(GOOD, max_ep_size=4) == {"GPUs": "1; 4 ranks, 1 a GPU, need 4"}
    assert not failed(but(devices=(H100,) * 2), max_ep_size=4, ranks_per_device=2)


def test_memory_that_others_hold_is_found() -> None:
    from msgspec.structs import replace

    busy = but(devices=(H100, replace(H100, free=3 << 30)))
    assert not failed(busy, max_ep_size=4, ranks_per_device=4), "only the first GPU is used"
    assert set(failed(busy, max_ep_size=8, ranks_per_device=4)) == {"GPU memory"}


def test_more_ranks_than_a_gpu_has_room_for() -> None:
    assert set(failed(GOOD, max_ep_size=64, ranks_per_device=64)) == set()
    small = but(devices=(GpuDevice(name="small", free=79 << 30, total=80 << 30, multiprocessors=14),))
    assert set(failed(small, max_ep_size=8, ranks_per_device=8)) == {"multiprocessors"}


def test_what_does_not_load_is_named() -> None:
    assert failed(but(kernels_error="libcudart.so.12: cannot open shared object file")) == {
        "sglang-kernel": "libcudart.so.12: cannot open shared object file"
    }
    assert failed(GpuProbe(error="The NVIDIA driver on your system is too old")) == {
        "CUDA": "The NVIDIA driver on your system is too old"
    }


@pytest.mark.parametrize(("ranks", "programs"), [(1, 32), (2, 32), (4, 16), (8, 8), (64, 1)])
def test_programs_of_all_ranks_fit_twice(ranks: int, programs: int) -> None:
    room = LaunchRoom.of(132, ranks)
    assert room.programs == programs and 2 * ranks * room.programs <= 132


def test_no_room_is_a_sentence() -> None:
    with pytest.raises(UserInputError, match="67 ranks on one GPU leave 1 multiprocessors a rank"):
        LaunchRoom.of(132, 67)


@pytest.mark.process
def test_the_probe_says_why_there_is_no_gpu() -> None:
    found = doctor_gpu.probe()
    assert found.error or found.devices
    if not found.devices:
        assert {"CUDA"} <= set(failed(found))
