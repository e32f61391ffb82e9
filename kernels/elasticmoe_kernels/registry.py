"""What runs where: every backend of the MoE layer, the devices and dtypes it serves, and how far it was proven."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from elasticmoe_kernels.errors import NoBackend, ShapeError

MoeExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the MoE layer."""

    name: str
    target: str
    """`module:function`, imported on first use: importing this package must not import Triton or torch_npu."""
    devices: tuple[str, ...]
    """`torch.device.type` values it accepts."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of the activations."""
    proven: str
    """What was run, in words; `docs/hardware.md` repeats it and claims no more."""

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type in self.devices and dtype in self.dtypes

    @functools.cache  # noqa: B019  (instances are the few of BACKENDS)
    def load(self) -> MoeExperts:
        module, _, function = self.target.partition(":")
        loaded: MoeExperts = getattr(importlib.import_module(module), function)
        return loaded


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        # In the order of preference: "auto" takes the first that serves the tensors.
        Backend(
            name="triton",
            target="elasticmoe_kernels.triton.moe:moe_experts",
            devices=("cuda",),
            dtypes=(torch.bfloat16, torch.float16),
            proven="run and timed on one H200; every kernel also runs in the Triton interpreter on CPU",
        ),
        Backend(
            name="ascend",
            target="elasticmoe_kernels.ascend.moe:moe_experts",
            devices=("npu",),
            dtypes=_FLOATS,
            proven="not run on an NPU; lowered by triton-ascend to Linalg, which was run on a CPU",
        ),
        Backend(
            name="cpu",
            target="elasticmoe_kernels.cpu.moe:moe_experts",
            devices=("cpu",),
            dtypes=(*_FLOATS, torch.float64),
            proven="run",
        ),
        Backend(
            name="reference",
            target="elasticmoe_kernels.reference.moe:moe_experts_like_input",
            devices=("cpu", "cuda", "npu"),
            dtypes=(*_FLOATS, torch.float64),
            proven="run on CPU and CUDA",
        ),
    )
}


def select(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Backend:
    """The backend for these tensors. Raises NoBackend with what exists when none fits."""
    if backend == "auto":
        for candidate in BACKENDS.values():
            if candidate.serves(device, dtype):
                return candidate
        raise NoBackend(f"no MoE backend for {dtype} on {device.type}; there are: {_listing()}")
    found = BACKENDS.get(backend)
    if found is None:
        raise NoBackend(f"no MoE backend is called {backend!r}; there are: {_listing()}")
    if not found.serves(device, dtype):
        raise NoBackend(f"MoE backend {backend!r} does not serve {dtype} on {device.type}; there are: {_listing()}")
    return found


def _listing() -> str:
    return "; ".join(
        f"{b.name} ({'/'.join(b.devices)}: {', '.join(str(d).removeprefix('torch.') for d in b.dtypes)})"
        for b in BACKENDS.values()
    )


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The MoE layer over the slots of one rank: sum over k of weight * expert(slot, x[t]).

    Args:
        x: [T, H] activations.
        w13: [S, 2I, H], gate rows first, then up rows; dim 0 may have any stride (the slot pitch), dims 1-2 contiguous.
        w2: [S, H, I], likewise. A slot that no entry of `topk_slots` names is never read: it may have no memory.
        topk_slots: [T, K] int32 or int64, -1 = this expert is not here, the pair adds nothing.
        topk_weights: [T, K] float32.
        backend: a name in `BACKENDS`, or "auto".

    Returns: [T, H] in x's dtype. Raises ShapeError, NoBackend.
    """
    check_shapes(x, w13, w2, topk_slots, topk_weights)
    return select(x.device, x.dtype, backend).load()(x, w13, w2, topk_slots, topk_weights)


def check_shapes(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_slots: torch.Tensor, topk_weights: torch.Tensor
) -> None:
    """Raise ShapeError, naming the tensor, when the arguments of `moe_experts` do not belong together."""
    if x.dim() != 2 or w13.dim() != 3 or w2.dim() != 3 or topk_slots.dim() != 2:
        raise ShapeError(
            f"expected x [T, H], w13 [S, 2I, H], w2 [S, H, I], topk_slots [T, K]; got {tuple(x.shape)}, "
            f"{tuple(w13.shape)}, {tuple(w2.shape)}, {tuple(topk_slots.shape)}"
        )
    hidden, inter = x.shape[1], w2.shape[2]
    if tuple(w13.shape[1:]) != (2 * inter, hidden) or w2.shape[1] != hidden or w13.shape[0] != w2.shape[0]:
        raise ShapeError(
            f"w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} do not fit x {tuple(x.shape)}: "
            f"expected [S, 2I, {hidden}] and [S, {hidden}, I]"
        )
    if topk_slots.shape[0] != x.shape[0] or topk_weights.shape != topk_slots.shape:
        raise ShapeError(
            f"topk_slots {tuple(topk_slots.shape)} and topk_weights {tuple(topk_weights.shape)} must both be "
            f"[{x.shape[0]}, K]"
        )
    if topk_slots.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"topk_slots must be int32 or int64, not {topk_slots.dtype}")
    if w13.dtype != w2.dtype or x.dtype != w13.dtype:
        raise ShapeError(f"x, w13 and w2 must share one dtype; got {x.dtype}, {w13.dtype}, {w2.dtype}")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.stride()[1:] != (weight.shape[2], 1):
            raise ShapeError(f"{name}: one slot's matrix must be contiguous; strides are {weight.stride()}")
