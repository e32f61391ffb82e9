"""What a launch finds out about NPUs before anything starts, over a torch and a CANN that say what a test wants."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches import device, imm
from elasticmoe_patches.srt.server_args import _prepare_npu
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import DriverError, UserInputError
from elasticmoe_sglang.hmm import default_budget
from elasticmoe_sglang.hmm.__main__ import parse_config
from elasticmoe_sglang.hmm.vmm import acl_probe
from elasticmoe_sglang.hmm.vmm.acl_probe import NpuDevice, NpuProbe

pytestmark = pytest.mark.process

TWO = ElasticConfig(ep_size=1, max_ep_size=2)
MEMORY = (64 << 30, 63 << 30)
FOUND = NpuProbe(soc="Ascend910B3", devices=tuple(NpuDevice(free=total - (1 << 30), total=total) for total in MEMORY))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[NpuProbe], None]:
    """Choose what torch_npu and CANN find; two NPUs to begin with. The driver's device node is there."""
    (tmp_path / "davinci_manager").touch()
    monkeypatch.setattr(acl_probe, "NODES", tmp_path)
    monkeypatch.delenv(acl_probe.VISIBLE, raising=False)

    def use(answer: NpuProbe) -> None:
        acl_probe.total_memory.cache_clear()
        monkeypatch.setattr(acl_probe, "probe", lambda: answer)
        count = len(answer.devices)
        monkeypatch.setattr(torch, "npu", SimpleNamespace(device_count=lambda: count), raising=False)

    use(FOUND)
    yield use
    acl_probe.total_memory.cache_clear()


Use = Callable[[NpuProbe], None]


def test_npus_are_chosen_where_torch_sees_them(found: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.memory_backend() == "npu"
    device.check_device_flag("npu")
    device.check_device_flag(None)
    device.check_devices(TWO)
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    assert device.memory_backend() == "cuda"
    with pytest.raises(UserInputError, match="NVIDIA GPUs, which come first"):
        device.check_device_flag("npu")


def test_budgets_are_the_devices_own_memory(found: Use) -> None:
    assert device.budgets(TWO) == list(MEMORY)
    assert device.budgets(ElasticConfig(ep_size=1, max_ep_size=2, device_budget=7 << 30)) == [7 << 30] * 2
    assert parse_config(["--endpoint", "ipc:///nowhere/hmm.sock"]).budgets == MEMORY
    assert default_budget.default_budget("npu", 1).devices == MEMORY[:1]
    found(NpuProbe(error="libascendcl.so cannot be loaded"))
    with pytest.raises(DriverError, match=r"no NPU can be used: libascendcl.so cannot be loaded\. Source CANN"):
        default_budget.default_budget("npu", None)
    assert parse_config(["--endpoint", "ipc:///nowhere/hmm.sock"]).backend == "cpu"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ElasticConfig(ep_size=1, max_ep_size=4), r"4 ranks need 4 NPUs, not 2\."),
        (ElasticConfig(ep_size=1, max_ep_size=4, ranks_per_device=2), "2 ranks an NPU are not supported"),
    ],
)
def test_ranks_that_npus_cannot_take(found: Use, config: ElasticConfig, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        device.check_devices(config)


def test_the_variable_that_hides_npus_is_named(found: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(acl_probe.VISIBLE, "2,5")
    with pytest.raises(UserInputError, match=r"need 4 NPUs, not 2 \(ASCEND_RT_VISIBLE_DEVICES=2,5\)"):
        device.check_devices(ElasticConfig(ep_size=1, max_ep_size=4))


@pytest.mark.parametrize(
    ("installed", "visible", "answer", "message"),
    [
        (False, None, NpuProbe(), "torch_npu is not installed"),
        (True, "", NpuProbe(), "ASCEND_RT_VISIBLE_DEVICES is empty"),
        (True, None, NpuProbe(error="libascendcl.so cannot be loaded: no such file"), "libascendcl.so cannot be"),
        (True, None, NpuProbe(), "CANN finds no NPU"),
        (True, "1,0", NpuProbe(), r"not in ascending order.*Write ASCEND_RT_VISIBLE_DEVICES=0,1"),
        (True, "npu0", NpuProbe(), "'npu0' is not a list of device ids"),
    ],
)
def test_an_environment_without_npus_is_refused_with_the_reason(
    found: Use, monkeypatch: pytest.MonkeyPatch, installed: bool, visible: str | None, answer: NpuProbe, message: str
) -> None:
    found(answer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object() if installed else None)
    if visible is not None:
        monkeypatch.setenv(acl_probe.VISIBLE, visible)
    with pytest.raises(UserInputError, match=message):
        device.check_device_flag("npu")


def test_another_kind_than_the_machines_is_refused(found: Use) -> None:
    with pytest.raises(UserInputError, match=r"--device cpu contradicts .* npu .*export ASCEND_RT_VISIBLE_DEVICES="):
        device.check_device_flag("cpu")
    found(NpuProbe())
    device.check_device_flag("cpu")
    with pytest.raises(UserInputError, match=r"--device cuda contradicts this machine, whose cpu devices"):
        device.check_device_flag("cuda")


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", (0,)), ("0,1,7", (0, 1, 7)), ("", ()), (None, None), ("10,11", (10, 11))]
)
def test_visible_devices_are_read_as_cann_reads_them(text: str | None, numbers: tuple[int, ...] | None) -> None:
    assert acl_probe.visible_devices({} if text is None else {acl_probe.VISIBLE: text}) == numbers


@pytest.mark.parametrize("text", ["1,0", "0,0", "0;1", "0-3", "0,,1", ",", "0,1,", " 0"])
def test_lists_that_cann_would_cut_or_drop_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match=acl_probe.VISIBLE):
        acl_probe.visible_devices({acl_probe.VISIBLE: text})


def test_the_probe_says_why_there_is_no_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    assert "libascendcl.so cannot be loaded" in acl_probe.probe().error
    assert not acl_probe.has_driver()


def test_a_probe_that_breaks_is_an_error_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: crashed)
    assert acl_probe.probe() == NpuProbe(error="exit status -11")


class Parameter:
    """A parameter on the second device of a kind that this torch cannot make tensors on; whoever moves it fails."""

    device = torch.device("cuda", 1)
    is_meta = False

    def __init__(self) -> None:
        self.data: Any = self

    def to(self, device: torch.device) -> None:
        raise AssertionError(f"SGLang moved a parameter that is on its rank's device to {device}")


def test_a_parameter_on_its_ranks_device_is_left_there() -> None:
    """A joining rank's slots are partly unmapped. A device without its number made SGLang copy them."""
    from sglang.srt.model_loader.loader import device_loading_context

    owner = SimpleNamespace(_parameters={"w13_weight": Parameter()}, _buffers={})
    module = SimpleNamespace(modules=lambda: [owner])
    with device_loading_context(module, device.torch_device("cuda", 1)):
        pass
    with (
        pytest.raises(AssertionError, match="moved a parameter"),
        device_loading_context(module, torch.device("cuda")),
    ):
        pass
    assert device.torch_device("cpu", 3) == torch.device("cpu")


@pytest.mark.parametrize(("backend", "forks"), [("cpu", True), ("cuda", False), ("npu", False)])
def test_standbys_are_forked_only_where_a_fork_survives(
    monkeypatch: pytest.MonkeyPatch, backend: str, forks: bool
) -> None:
    """ACL, like CUDA, does not survive a fork: the IMM imports nothing there, and its children become programs."""
    made: dict[str, Any] = {}
    runtime = SimpleNamespace(
        paths=SimpleNamespace(lifeline="", imm_socket=""), config=SimpleNamespace(standbys=1, max_ep_size=2)
    )

    class Server:
        def __init__(self, _socket: str, main: Any, **options: Any) -> None:
            made.update(options, main=main)

        def serve(self) -> None:
            return

    monkeypatch.setattr(imm, "current_runtime", lambda: runtime)
    monkeypatch.setattr(imm, "preload", lambda: made.update(preloaded=True))
    monkeypatch.setattr(imm, "ImmServer", Server)
    for name in ("leave_signals_to_main", "tie"):
        monkeypatch.setattr(imm, name, lambda *_args: None)
    imm.serve(backend)
    assert made.get("preloaded", False) is forks
    assert (made["become"] is None) is forks
    assert made["main"] is (imm.worker_main if forks else imm.never_forked)


def test_npu_graphs_are_refused_and_switched_off(found: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_NPU_DISABLE_ACL_FORMAT_WEIGHT", "0")
    args = argparse.Namespace(disable_cuda_graph=False, cuda_graph_backend_decode=None, mem_fraction_static=None)
    _prepare_npu(args, TWO)
    assert args.disable_cuda_graph and args.mem_fraction_static == round(53 / 63, 3)
    args.cuda_graph_backend_decode = "full"
    with pytest.raises(UserInputError, match="--cuda-graph-backend-decode full is not supported on NPUs"):
        _prepare_npu(args, TWO)


@pytest.mark.parametrize(("gib", "fraction"), [(2, 0.5), (16, 0.5), (20, 0.5), (32, 0.688), (64, 0.844)])
def test_a_fraction_of_a_devices_memory_is_one_on_any_device(gib: int, fraction: float) -> None:
    """On 2 GiB SGLang's own rule arrives at -2.422."""
    assert device.static_fraction(gib << 30) == fraction
