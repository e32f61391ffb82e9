"""The CPU platform's own decisions: when it is active, and what it leaves to the user."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elasticmoe_patches import platform
from elasticmoe_patches.platform import environment, torchvision_ops

VARIABLES = ("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "SGLANG_USE_CPU_ENGINE", "TORCHDYNAMO_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that whatever the code sets is undone
        monkeypatch.delenv(name)


def test_active_without_accelerator() -> None:
    assert platform.activate() == "elasticmoe_patches.platform.cpu.ElasticCpuPlatform"
    assert os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] == "false"


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps", "npu"])
def test_not_active_beside_an_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cuda":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    elif name == "npu":
        monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    else:
        module = torch.xpu if name == "xpu" else torch.backends.mps
        monkeypatch.setattr(module, "is_available", lambda: True)
    assert platform.accelerator() == name
    assert platform.activate() is None
    assert not any(variable in os.environ for variable in VARIABLES), "an inactive platform changes nothing"


def test_not_active_for_sglangs_own_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


@pytest.mark.parametrize(
    ("ranks", "cores", "bind", "threads"),
    [
        (1, 2, None, "2"),
        (2, 2, "0|1", "1"),
        (4, 2, "0|1|0|1", "1"),
        (2, 8, "0,1,2,3|4,5,6,7", "4"),
        (3, 1, "0|0|0", "1"),
    ],
)
def test_cores_are_shared_among_ranks(
    ranks: int, cores: int, bind: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: list(range(cores)))
    environment.set_rank_defaults(ranks)
    assert os.environ.get("SGLANG_CPU_OMP_THREADS_BIND") == bind
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_workers_that_bind_themselves_choose_their_threads() -> None:
    environment.set_rank_defaults(2, [(0, 1), (5,)])
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|5"
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_users_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "mine")
    environment.set_defaults()
    environment.set_rank_defaults(4)
    assert {os.environ[name] for name in VARIABLES} == {"mine"}


def arguments(**changes: object) -> SimpleNamespace:
    defaults = {"attention_backend": None, "mem_fraction_static": None, "max_total_tokens": None, "dtype": "auto"}
    sizes = {"model_path": "nowhere", "tp_size": 1, "dp_size": 1, "pp_size": 1, "nnodes": 1}
    rest = {"enable_dp_attention": False, "disable_hybrid_swa_memory": False, "moe_runner_backend": "auto"}
    return SimpleNamespace(**{**defaults, **sizes, **rest, **changes})


@pytest.mark.process
def test_server_defaults(tmp_path: Path) -> None:
    # SGLang first: importing the class before would find SGLang looking for it half-way.
    from sglang.srt.platforms import current_platform

    from elasticmoe_patches.platform.cpu import KV_TOKENS, ElasticCpuPlatform, ranks

    assert type(current_platform) is ElasticCpuPlatform

    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    plain = arguments(model_path=str(tmp_path))
    ElasticCpuPlatform().apply_server_args_defaults(plain)
    assert (plain.attention_backend, plain.max_total_tokens, plain.dtype) == ("torch_native", KV_TOKENS, "float32")
    assert (plain.disable_hybrid_swa_memory, plain.moe_runner_backend) == (True, "triton")
    chosen = arguments(attention_backend="x", mem_fraction_static=0.5, dtype="bfloat16", model_path=str(tmp_path))
    ElasticCpuPlatform().apply_server_args_defaults(chosen)
    assert (chosen.attention_backend, chosen.max_total_tokens, chosen.dtype) == ("x", None, "bfloat16")
    assert ranks(arguments(tp_size=4, dp_size=4, enable_dp_attention=True)) == 4
    assert ranks(arguments(tp_size=2, dp_size=3)) == 6
    assert ranks(arguments(tp_size=8, nnodes=2)) == 4


def test_operator_names_are_read_from_torchvisions_source(tmp_path: Path) -> None:
    source = '@register_meta("roi_align")\n@torch.library.register_fake("torchvision::nms")\nregister_meta(name)\n'
    (tmp_path / "_meta_registrations.py").write_text(source)
    assert torchvision_ops.operator_names(tmp_path) == ["nms", "roi_align"]


@pytest.mark.process
def test_torchvision_imports() -> None:
    torchvision_ops.declare_if_unloadable()
    import torchvision

    assert torchvision.__version__
