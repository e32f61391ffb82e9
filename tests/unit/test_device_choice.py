"""What a launch finds out about its devices before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elasticmoe_patches import device
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
