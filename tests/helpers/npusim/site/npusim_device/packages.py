"""Python packages that SGLang imports on an NPU and that no registry has for this machine.

- `acl`: CANN's own Python package, of which SGLang asks the architecture.
- `torchair`: CANN's graph compiler for torch.compile; its backend runs the graph as it is.
- `sgl_kernel_npu`: SGLang's kernels. Those that SGLang's path for Qwen3-MoE and DeepSeek-V2 calls are here, by what
  their call sites say: unverified. Any other raises NotImplementedError with its name when it is called.
- Triton, in its interpreter, for SGLang's small kernels of KV bookkeeping.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npusim_device.dispatch import CHECKED, count, device_of, to_device, to_host

_ARCHITECTURE = 2201  # Ascend 910B's, as `acl.rt.get_device_info` answers


def install() -> None:
    sys.modules.setdefault(
        "acl", _module("acl", rt=types.SimpleNamespace(get_device_info=lambda *_: (_ARCHITECTURE, 0)))
    )
    _install_torchair()
    sys.meta_path.append(_Kernels())
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_triton()


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    module.__dict__.update(attributes)
    return module


def _install_torchair() -> None:
    class CompilerConfig:
        def __init__(self) -> None:
            self.mode = None
            self.debug = types.SimpleNamespace(run_eagerly=False)

    def backend(compiler_config: Any = None) -> Callable[[Any, Any], Any]:
        return lambda graph, _inputs: graph.forward

    inner = "torchair.ge_concrete_graph.ge_converter.experimental"
    names = {
        "torchair": {"get_npu_backend": backend, "CompilerConfig": CompilerConfig},
        "torchair.configs": {},
        "torchair.configs.compiler_config": {"CompilerConfig": CompilerConfig},
        "torchair.ge_concrete_graph": {},
        "torchair.ge_concrete_graph.ge_converter": {},
        inner: {},
        f"{inner}.patch_for_hcom_allreduce": {},
    }
    for name, attributes in names.items():
        sys.modules[name] = _module(name, **attributes)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def _interpret_triton() -> None:
    """SGLang's Triton kernels see host aliases of their tensors; results are in place."""
    from triton.runtime import interpreter

    def to_host_arguments(
        self: Any, arguments: Sequence[Any], options: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        name = f"triton::{getattr(self.fn, '__name__', '?')}"
        count(name)
        CHECKED[name] = "SGLang's source, in Triton's interpreter"
        return to_host(list(arguments), name), to_host(options, name)

    interpreter.GridExecutor._init_args_hst = to_host_arguments
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


# sgl_kernel_npu


def _rms(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return values if weight is None else values * weight.float()


def split_qkv_rmsnorm_rope(
    qkv: Tensor,
    sin: Tensor,
    cos: Tensor,
    q_hidden: int,
    kv_hidden: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope_dim: int | None = None,
    **_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.split([q_hidden, kv_hidden, kv_hidden], -1)
    tokens = qkv.shape[0]
    cos, sin = cos.view(tokens, 1, -1).float(), sin.view(tokens, 1, -1).float()

    def turn(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        heads = x.reshape(tokens, -1, head_dim)
        values = heads.float() if weight is None else _rms(heads, weight, eps or 0.0)
        values = values if bias is None else values + bias.float()
        width = cos.shape[-1]
        first, second = values[..., :width].chunk(2, -1)
        turned = values[..., :width] * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((turned, values[..., width:]), -1).reshape(x.shape).to(x.dtype)

    return turn(query, q_weight, q_bias), turn(key, k_weight, k_bias), value.contiguous()


def fused_split_qk_norm(
    fused: Tensor,
    q_a_layernorm: Any,
    kv_a_layernorm: Any,
    q_lora_rank: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    query, latent, rope = fused.split([q_lora_rank, kv_lora_rank, qk_rope_head_dim], -1)

    def norm(x: Tensor, layer: Any) -> Tensor:
        weight = torch.ops.npusim.alias(layer.weight.data, "sgl_kernel_npu::fused_split_qk_norm")
        return _rms(x, weight, layer.variance_epsilon).to(x.dtype)

    return norm(query, q_a_layernorm), norm(latent, kv_a_layernorm).unsqueeze(1), rope.unsqueeze(1)


def l1_norm(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def alloc_extend(
    prefix_lens: Tensor,
    seq_lens: Tensor,
    last_loc: Tensor,
    free_pages: Tensor,
    out: Tensor,
    _batch: int,
    page: int,
    _most: int,
) -> None:
    """KV rows for the new tokens of each request: the rest of its last page, then free pages."""
    at = taken = row = 0
    for prefix, end, last in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
        for place in range(prefix, end):
            if place == prefix and place % page:
                row = last + 1
            elif place % page == 0:
                row = int(free_pages[taken]) * page
                taken += 1
            else:
                row += 1
            out[at] = row
            at += 1


class _Launched:
    """A kernel that is called as `kernel[grid](...)` and writes into its arguments."""

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        self._name, self._function = name, function

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        count(self._name)
        CHECKED[self._name] = "SGLang's call sites only"
        host = to_host((arguments, options), self._name)
        self._function(*host[0], **host[1])


class _TransferDirection(enum.IntEnum):
    H2D = 1
    D2H = 2


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "norm.split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope": split_qkv_rmsnorm_rope,
    "norm.fused_split_qk_norm.fused_split_qk_norm": fused_split_qk_norm,
    "norm.l1_norm.l1_norm": l1_norm,
}
_VALUES: dict[str, Any] = {
    "mem_cache.allocator.alloc_extend_kernel": _Launched("sgl_kernel_npu::alloc_extend_kernel", alloc_extend),
    "kvcacheio.TransferDirection": _TransferDirection,
    "norm.split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope_pos_cache_half_npu": None,  # SGLang asks whether it is there
}


def _on_device(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    full = f"sgl_kernel_npu::{name.rpartition('.')[2]}"
    CHECKED[full] = "SGLang's call sites only"

    def run(*arguments: Any, **options: Any) -> Any:
        count(full)
        device = device_of((arguments, options), full)
        host = to_host((arguments, options), full)
        return to_device(function(*host[0], **host[1]), device)

    return run


def _absent(name: str) -> Callable[..., Any]:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise NotImplementedError(f"npusim: {name} has no implementation")

    return refuse


class _Kernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every module under sgl_kernel_npu: what is implemented, and for any other name what refuses."""

    ROOT = "sgl_kernel_npu"

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != self.ROOT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        inside = module.__name__.removeprefix(self.ROOT).lstrip(".")

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            full = f"{inside}.{name}"
            if full in _VALUES:
                return _VALUES[full]
            return _on_device(full, _FUNCTIONS[full]) if full in _FUNCTIONS else _absent(f"{self.ROOT}.{full}")

        module.__getattr__ = attribute  # type: ignore[method-assign]
