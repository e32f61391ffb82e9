"""`elasticmoe hmm` without --budget: what the machine's devices have; and what it calls itself."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from elasticmoe_sglang.errors import DeviceFault, DriverUnsupported, UserInputError
from elasticmoe_sglang.hmm import default_budget
from elasticmoe_sglang.hmm.__main__ import parse_config
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm import cuda_driver
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend

pytestmark = pytest.mark.process


MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
ENDPOINT = ["--endpoint", "ipc:///nowhere/hmm.sock"]
GPUS = [80 << 30, 141 << 30]


def use_driver(monkeypatch: pytest.MonkeyPatch, gpus: list[int]) -> None:
    """A driver with these GPUs, as cuda-bindings show it: every call returns its status first."""
    api = SimpleNamespace(
        cuDeviceGetCount=lambda: (0, len(gpus)),
        cuDeviceGet=lambda number: (0, number),
        cuDeviceTotalMem=lambda device: (0, gpus[device]),
    )
    monkeypatch.setattr(cuda_driver, "load", lambda: cuda_driver.CudaDriver(api))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load() -> cuda_driver.CudaDriver:
        raise DriverUnsupported("the package cuda-bindings is not installed", code=0)

    monkeypatch.setattr(cuda_driver, "load", load)
    monkeypatch.setattr(default_budget, "_NVIDIA_GPUS", tmp_path / "none")


def test_the_cpus_memory_is_the_machines(no_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = parse_config(ENDPOINT)
    assert (config.backend, config.budgets) == ("cpu", (MEMORY,))
    assert "this machine's memory" in caplog.text and not [r for r in caplog.records if r.levelno > logging.INFO]
    assert parse_config([*ENDPOINT, "--devices", "4"]).budgets == (MEMORY // 4,) * 4


def test_each_gpu_gives_all_it_has(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use_driver(monkeypatch, GPUS)
    caplog.set_level(logging.INFO)
    config = parse_config(ENDPOINT)
    assert (config.backend, config.budgets) == ("cuda", tuple(GPUS))
    assert "80 GiB, 141 GiB (all memory of each GPU)" in caplog.text
    assert parse_config([*ENDPOINT, "--devices", "1"]).budgets == (GPUS[0],)
    config = parse_config([*ENDPOINT, "--budget", "1GiB"])
    assert (config.backend, config.budgets) == ("cuda", (1 << 30,))
    assert parse_config([*ENDPOINT, "--backend", "cpu"]).budgets == (MEMORY,)
    with pytest.raises(UserInputError, match="3 devices are asked for, and there are 2"):
        parse_config([*ENDPOINT, "--devices", "3"])


def test_gpus_that_cannot_be_used_are_named(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(default_budget, "_NVIDIA_GPUS", tmp_path)
    assert parse_config(ENDPOINT).backend == "cpu"
    assert "cuda-bindings is not installed" in caplog.text
    with pytest.raises(DriverUnsupported, match="cuda-bindings"):
        parse_config([*ENDPOINT, "--backend", "cuda"])


def test_no_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> cuda_driver.CudaDriver:
        raise DeviceFault("cuInit failed: CUDA_ERROR_NO_DEVICE (100)", code=100)

    monkeypatch.setattr(cuda_driver, "load", load)
    assert parse_config(ENDPOINT).backend == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices 0 leaves no device"),
        (["--backend", "xpu"], "'xpu' devices cannot be looked up"),
    ],
)
def test_what_cannot_be_chosen(no_gpu: None, arguments: list[str], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        parse_config([*ENDPOINT, *arguments])


def test_the_command_serves_without_a_budget(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/h/hmm.sock"
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "hmm", "--endpoint", endpoint, "--backend", "cpu"]
    ready_out, ready_in = os.pipe()
    with subprocess.Popen(
        [*command, "--ready-fd", str(ready_in)], pass_fds=[ready_in], stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(ready_in)
        assert os.read(ready_out, 64)
        os.close(ready_out)
        with HmmClient(endpoint, name="test", backend=CpuBackend()) as client:
            assert [device.budget for device in client.status().devices] == [MEMORY]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "budget: " in log and "this machine's memory" in log


@pytest.mark.parametrize("arguments", [["--endpoint", "tcp://h"], [], ["--no-such-flag"]])
def test_the_command_is_called_by_its_name(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "hmm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "elasticmoe hmm: " in done.stderr and "elasticmoe_sglang.hmm" not in done.stderr
