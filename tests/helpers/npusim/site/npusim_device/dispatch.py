"""How an operator of torch_npu gets its implementation here: plain torch on host aliases, checked against torch_npu.

Each is registered under its own schema at the dispatcher's PrivateUse1 key, so names, order and types of arguments are
torch_npu's. What comes out is compared in shape and dtype with torch_npu's own Meta kernel for the same call. One that
has none here keeps torch_npu's, which ends in the stand-in's error with its name.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

Function = Callable[..., Any]

CHECKED: dict[str, str] = {}
"""Operator -> "Meta kernel", or why its output was not compared."""
_counted: collections.Counter[str] = collections.Counter()
_addresses: dict[str, set[int]] = collections.defaultdict(set)
_libraries: list[torch.library.Library] = []


def calls() -> dict[str, int]:
    """Operator -> how often this process has run it."""
    made = (line.rpartition(" ") for line in torch.ops.npusim.calls())
    return {**{name: int(count) for name, _, count in made}, **_counted}


def count(name: str) -> None:
    _counted[name] += 1


def note_address(name: str, tensor: torch.Tensor) -> None:
    """Where a kernel was told to find weights or a cache: a graph that captured the call would go on looking there."""
    _addresses[name].add(tensor.data_ptr())


def addresses() -> dict[str, list[int]]:
    """Of `note_address`, of this process."""
    return {name: sorted(found) for name, found in list(_addresses.items())}


def to_host(value: Any, name: str) -> Any:
    """NPU tensors in a nest of arguments as host tensors over the same bytes; checked to be mapped."""

    def alias(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "npu":
            return torch.ops.npusim.alias(leaf, name)
        return leaf

    return tree_map(alias, value)


def to_device(value: Any, device: torch.device, given: Mapping[int, torch.Tensor] | None = None) -> Any:
    """Results as tensors on the device, with the same strides. A result that is one of the arguments, such as a cache
    that was written to, is that argument again.

    Args:
        given: id of a host alias -> the tensor of which it is one.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if given and id(leaf) in given:
            return given[id(leaf)]
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        if leaf.numel():
            torch.ops.npusim.alias(made, "result").copy_(leaf)
        return made

    return tree_map(moved, value)


def device_of(value: Any, name: str) -> torch.device:
    """The one NPU that the tensors of a call are on. Raises RuntimeError when they are on several, or on none."""
    tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "npu"}
    if len(devices) != 1:
        raise RuntimeError(f"npusim: {name} gets tensors of {sorted(map(str, devices)) or 'no NPU'}")
    return devices.pop()


def register(operators: Mapping[str, Function]) -> None:
    """Under torch.ops.npu. One that writes into an argument returns that."""
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for name, function in operators.items():
        library.impl(name, _kernel(name, function), "PrivateUse1")


def _kernel(name: str, function: Function) -> Function:
    full = f"npu::{name}"

    def run(*arguments: Any, **options: Any) -> Any:
        count(full)
        device = device_of((arguments, options), full)
        host = to_host((arguments, options), full)
        out = function(*host[0], **host[1])
        _check(name, arguments, options, out)
        pairs = zip(tree_flatten(host)[0], tree_flatten((arguments, options))[0], strict=True)
        return to_device(out, device, {id(alias): leaf for alias, leaf in pairs})

    return run


def _check(name: str, arguments: Any, options: Any, out: Any) -> None:
    """Compare with the Meta kernel. Raises RuntimeError where shapes or dtypes differ."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta"):
        CHECKED[f"npu::{name}"] = "torch_npu has no Meta kernel"
        return

    def meta(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return leaf

    arguments, options = tree_map(meta, (arguments, options))
    kinds = [
        [(tuple(leaf.shape), leaf.dtype) for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
        for value in (getattr(torch.ops.npu, name)(*arguments, **options), out)
    ]
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"npusim: npu::{name} computes {kinds[1]}, and torch_npu's Meta kernel says {kinds[0]}")
    CHECKED[f"npu::{name}"] = "Meta kernel"
