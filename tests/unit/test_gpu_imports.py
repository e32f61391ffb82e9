"""SGLang's imports on a machine with GPUs, answered without CUDA. Only a GPU can show that a fork can use it then."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches import imm
from elasticmoe_sglang.imm import gpu_imports
from elasticmoe_sglang.imm.gpu_imports import CudaAsked, preload_without_cuda, without_cuda

pytestmark = pytest.mark.pure

GPUS = [
    SimpleNamespace(name="first", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132),
    SimpleNamespace(name="second", major=10, minor=3, total_memory=180 << 30, multi_processor_count=148),
]


def test_torch_knows_the_gpus_inside_and_asks_cuda_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with without_cuda(GPUS) as asked:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (9, 0)
        for second in (1, "cuda:1", torch.device("cuda", 1)):
            assert torch.cuda.get_device_capability(second) == (10, 3)
            assert torch.cuda.get_device_name(second) == "second"
        assert torch.cuda.get_device_properties("cuda").multi_processor_count == 132
        with pytest.raises(AttributeError):  # not a number that nobody has read
            torch.cuda.get_device_properties(0).is_integrated  # noqa: B018
        bound_at_import = torch.cuda.device_count
    assert not asked
    assert torch.cuda.device_count() == 0 == bound_at_import()


def test_who_initialises_cuda_is_refused_and_named() -> None:
    with without_cuda(GPUS) as asked:
        with pytest.raises(CudaAsked):
            torch.cuda._lazy_init()
        with pytest.raises(CudaAsked):
            torch.cuda.synchronize()
    assert len(asked) == 2 and "test_gpu_imports" in asked[0]


@pytest.mark.parametrize("forks", [True, False])
def test_a_process_forks_only_after_a_fork_has_computed(forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_imports, "_ask", lambda: GPUS)
    monkeypatch.setattr(gpu_imports, "_fork_computes", lambda: forks)
    assert preload_without_cuda(lambda: None) is forks


def test_an_import_that_uses_cuda_means_programs_even_where_its_module_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def preload() -> None:
        with contextlib.suppress(RuntimeError):
            torch.cuda.init()

    def never() -> bool:
        raise AssertionError("nothing is forked")

    monkeypatch.setattr(gpu_imports, "_ask", lambda: GPUS)
    monkeypatch.setattr(gpu_imports, "_fork_computes", never)
    assert not preload_without_cuda(preload)
    assert "programs of their own" in caplog.text and "an import uses CUDA" in caplog.text


def test_where_the_gpus_cannot_be_asked_standbys_are_programs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*_args: Any, **_kwargs: Any) -> Any:
        return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nDeviceFault: no driver")

    monkeypatch.setattr(gpu_imports.subprocess, "run", run)

    def imported() -> None:
        raise AssertionError("the IMM imports nothing then")

    assert not preload_without_cuda(imported)
    assert "no driver" in caplog.text


@pytest.mark.parametrize(
    ("backend", "imports", "forked"), [("cuda", True, True), ("cuda", False, False), ("npu", True, False)]
)
def test_the_imm_forks_where_its_imports_allow_it(
    backend: str, imports: bool, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Server:
        def __init__(self, path: str, worker_main: Any, **options: Any) -> None:
            given.update(options, worker_main=worker_main)

        def serve(self) -> None:
            given["served"] = True

    config = SimpleNamespace(standbys=1, max_ep_size=2)
    paths = SimpleNamespace(imm_socket="imm.sock", lifeline="lifeline")
    monkeypatch.setattr(imm, "current_runtime", lambda: SimpleNamespace(paths=paths, config=config))
    monkeypatch.setattr(imm, "leave_signals_to_main", lambda: None)
    monkeypatch.setattr(imm, "tie", lambda path: None)
    monkeypatch.setattr(imm, "preload_without_cuda", lambda preload: imports)
    monkeypatch.setattr(imm, "ImmServer", Server)
    monkeypatch.setattr(imm.logging, "basicConfig", lambda **_: None)
    imm.serve(backend)
    assert given["served"]
    assert (given["become"] is None) == (given["worker_main"] is imm.worker_main) == (given["warm"] is not None)
    assert (given["become"] is None) == forked
