"""What a launch finds out about its devices before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe_patches import device
from elasticmoe_sglang import cpu_bind
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import HmmUnavailable, UserInputError
from elasticmoe_sglang.hmm.process import spawn_hmm

pytestmark = pytest.mark.process


SHARED = ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=4)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with one GPU, an MPS control program on the PATH and a folder for its pipes."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    return tmp_path


def control(folder: Path, status: int) -> None:
    program = folder / "nvidia-cuda-mps-control"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\nexit {status}\n")
    program.chmod(0o755)


def test_the_cpus_devices_share_the_machines_memory() -> None:
    first, second = device.budgets(ElasticConfig(ep_size=1, max_ep_size=2))
    assert first == second
    assert first + second <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device.budgets(ElasticConfig(ep_size=1, max_ep_size=2, device_budget=77)) == [77, 77]
    assert device.memory_backend() == "cpu"
    device.check_devices(SHARED)


@pytest.mark.process
def test_ranks_share_a_gpu_where_mps_answers(one_gpu: Path) -> None:
    control(one_gpu, 0)
    assert device.memory_backend() == "cuda"
    device.check_devices(SHARED)


@pytest.mark.process
def test_mps_that_does_not_answer_is_named_with_the_way_to_start_it(one_gpu: Path) -> None:
    control(one_gpu, 1)
    with pytest.raises(UserInputError, match="MPS") as refused:
        device.check_devices(SHARED)
    assert "nvidia-cuda-mps-control -d" in str(refused.value)


def test_mps_without_its_pipes_is_not_asked(one_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control(one_gpu, 0)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(one_gpu / "absent"))
    with pytest.raises(UserInputError, match="MPS"):
        device.check_devices(SHARED)


def test_a_rank_a_gpu_needs_no_mps_but_as_many_gpus(one_gpu: Path) -> None:
    device.check_devices(ElasticConfig(ep_size=1, max_ep_size=1))
    with pytest.raises(UserInputError, match="need 4 GPUs, not 1"):
        device.check_devices(ElasticConfig(ep_size=1, max_ep_size=4))


def test_an_hmm_of_ones_own_must_fit_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"ipc://{tmp_path}/h/hmm.sock"
    four = ElasticConfig(ep_size=1, max_ep_size=4, hmm_endpoint=endpoint)
    with pytest.raises(HmmUnavailable, match="elasticmoe hmm --endpoint"):
        device.check_hmm(four)
    with spawn_hmm(endpoint, [1 << 20]):
        with pytest.raises(UserInputError, match=r"need 4 devices, and the HMM at .* has 1\b.*--devices 4"):
            device.check_hmm(four)
        device.check_hmm(ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=4, hmm_endpoint=endpoint))
        monkeypatch.setattr(device, "on_cuda", lambda: True)
        with pytest.raises(UserInputError, match="memory of kind cpu, and the server needs cuda"):
            device.check_hmm(four)
    device.check_hmm(SHARED)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[int]]]:
    """A process that may run on four cores; what it was bound to since."""
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cpu_bind, "bind_process", lambda cores: bound.append(set(cores)))
    threads = torch.get_num_threads()
    yield bound
    torch.set_num_threads(threads)


def test_cores_of_devices_and_of_the_others(
    four_cores: list[set[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    config = device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="0,1;2"))
    device.leave_cores_to_ranks(config)
    device.bind_rank(config, 0)
    assert torch.get_num_threads() == 2
    device.bind_rank(config, 1)
    assert torch.get_num_threads() == 1
    assert four_cores == [{3}, {0, 1}, {2}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    device.bind_rank(config, 0)
    assert torch.get_num_threads() == 1, "the user's variable is the most"
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    device.bind_rank(ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=2, cpu_bind="0-1;2-3"), 1)
    assert torch.get_num_threads() == 1, "ranks of one device share its cores"
    assert not caplog.records


def test_where_no_core_is_left_the_others_are_not_bound(four_cores: list[set[int]]) -> None:
    config = device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=4, cpu_bind="auto"))
    assert config.cpu_bind == "0;1;2;3"
    device.leave_cores_to_ranks(config)
    off = ElasticConfig(ep_size=1, max_ep_size=4)
    assert device.settle_cores(off) == off
    device.leave_cores_to_ranks(off)
    device.bind_rank(off, 0)
    assert not four_cores


def test_auto_says_where_it_binds_nothing(four_cores: list[set[int]], caplog: pytest.LogCaptureFixture) -> None:
    assert device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=5, cpu_bind="auto")).cpu_bind == "off"
    assert "not bound to cores: 5 ranks, 4 cores" in caplog.text


def test_impossible_cores_are_refused(four_cores: list[set[int]]) -> None:
    with pytest.raises(UserInputError, match=r"may not run on core 7\. It may run on 0-3"):
        device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="0;7"))


def test_gpus_have_no_cores(one_gpu: Path) -> None:
    assert device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="auto")).cpu_bind == "off"
    with pytest.raises(UserInputError, match="ranks that compute on the CPU"):
        device.settle_cores(ElasticConfig(ep_size=1, max_ep_size=2, cpu_bind="0;1"))


@pytest.mark.process
def test_kv_leaves_a_gpu_what_its_ranks_compute_with(one_gpu: Path) -> None:
    four = ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=4)
    assert device.settle_headroom(four, 0.9).headroom_bytes(80 << 30) == (8 + 3 * 2) << 30
    assert device.settle_headroom(ElasticConfig(ep_size=1, max_ep_size=2), None).headroom_bytes(1000) == 120
    eight = ElasticConfig(ep_size=1, max_ep_size=8, ranks_per_device=8)
    assert device.settle_headroom(eight, 0.9).headroom_bytes(80 << 30) == (8 + 7 * 2) << 30
    chosen = ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=4, headroom="0.03")
    assert device.settle_headroom(chosen, 0.9) == chosen


def test_kv_leaves_little_of_a_cpus_memory() -> None:
    config = ElasticConfig(ep_size=1, max_ep_size=2)
    assert device.settle_headroom(config, 0.5) == config
    assert config.headroom_bytes(1000) == 10
