"""What runs where: every backend of the MoE layer, the devices and dtypes it serves, and how far it was proven."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from elasticmoe_kernels.errors import NoBackend, ShapeError

MoeExperts = Callable[..., torch.Tensor]

FP8 = torch.float8_e4m3fn
GROUP = 128
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
    fp8: bool = False
    """Takes e4m3 weights with scales by 128 x 128 blocks, too: `target` takes `w13_scale` and `w2_scale`."""
    biased: bool = False
    """Computes experts with biases and a clamped SwiGLU, too: `target` takes `w13_bias`, `w2_bias` and `clamped`."""

    def serves(self, device: torch.device, dtype: torch.dtype, fp8: bool = False, biased: bool = False) -> bool:
        able = (self.fp8 or not fp8) and (self.biased or not biased)
        return device.type in self.devices and dtype in self.dtypes and able

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
            target="elasticmoe_kernels.triton.moe:fused_moe",
            devices=("cuda",),
            dtypes=(torch.bfloat16, torch.float16),
            proven="run and timed on one H200, biased experts not; every kernel in the Triton interpreter on CPU, too",
            fp8=True,
            biased=True,
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
            fp8=True,
            biased=True,
        ),
        Backend(
            name="reference",
            target="elasticmoe_kernels.reference.moe:moe_experts_like_input",
            devices=("cpu", "cuda", "npu"),
            dtypes=(*_FLOATS, torch.float64),
            proven="run on CPU and CUDA",
            biased=True,
        ),
    )
}


def select(
    device: torch.device, dtype: torch.dtype, backend: str = "auto", *, fp8: bool = False, biased: bool = False
) -> Backend:
    """The backend for these activations, with e4m3 weights if `fp8`, with biases and a clamped SwiGLU if `biased`.
    Raises NoBackend with what exists when none fits."""
    what = f"{dtype}{' with e4m3 weights' if fp8 else ''}{' with biased experts' if biased else ''} on {device.type}"
    if backend == "auto":
        for candidate in BACKENDS.values():
            if candidate.serves(device, dtype, fp8, biased):
                return candidate
        raise NoBackend(f"no MoE backend for {what}; there are: {_listing()}")
    found = BACKENDS.get(backend)
    if found is None:
        raise NoBackend(f"no MoE backend is called {backend!r}; there are: {_listing()}")
    if not found.serves(device, dtype, fp8, biased):
        raise NoBackend(f"MoE backend {backend!r} does not serve {what}; there are: {_listing()}")
    return found


def _listing() -> str:
    return "; ".join(
        f"{b.name} ({'/'.join(b.devices)}: {', '.join(str(d).removeprefix('torch.') for d in b.dtypes)}"
        f"{', e4m3 weights' if b.fp8 else ''}{', biased experts' if b.biased else ''})"
        for b in BACKENDS.values()
    )


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: tuple[float, float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The MoE layer over the slots of one rank: sum over k of weight * expert(slot, x[t]).

    Args:
        x: [T, H] activations.
        w13: [S, 2I, H], gate rows first, then up rows; dim 0 may have any stride (the slot pitch), dims 1-2 contiguous.
        w2: [S, H, I], likewise. A slot that no entry of `topk_slots` names is never read: it may have no memory.
        topk_slots: [T, K] int32 or int64, -1 = this expert is not here, the pair adds nothing.
        topk_weights: [T, K] float32.
        w13_scale, w2_scale: with e4m3 weights, what each block of 128 x 128 is multiplied by: float32
            [S, 2I / 128, H / 128] and [S, H / 128, I / 128], strides as of the weights; H and I are multiples of 128.
        w13_bias, w2_bias: float32 [S, 2I] and [S, H], any stride in dim 0: what is added to both products of a pair,
            before its weight. Not with e4m3 weights.
        clamped: given with biases, and only then: (alpha, limit) of gpt-oss's gate * sigmoid(alpha * gate) * (up + 1),
            gate at most limit, up within -limit ... limit, in the place of silu(gate) * up.
        backend: a name in `BACKENDS`, or "auto".

    Returns: [T, H] in x's dtype. Raises ShapeError, NoBackend.
    """
    check_shapes(x, w13, w2, topk_slots, topk_weights, w13_scale, w2_scale)
    check_biases(w13, w2, w13_bias, w2_bias, clamped)
    more = {} if w13_scale is None else {"w13_scale": w13_scale, "w2_scale": w2_scale}
    biases = {} if w13_bias is None else {"w13_bias": w13_bias, "w2_bias": w2_bias, "clamped": clamped}
    found = select(x.device, x.dtype, backend, fp8=bool(more), biased=bool(biases))
    return found.load()(x, w13, w2, topk_slots, topk_weights, **more, **biases)


def check_shapes(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
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
    if w13_scale is not None or w2_scale is not None:
        _check_scales(w13, w2, w13_scale, w2_scale)
    elif w13.dtype != w2.dtype or x.dtype != w13.dtype:
        raise ShapeError(f"x, w13 and w2 must share one dtype; got {x.dtype}, {w13.dtype}, {w2.dtype}")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.stride()[1:] != (weight.shape[2], 1):
            raise ShapeError(f"{name}: one slot's matrix must be contiguous; strides are {weight.stride()}")


def check_biases(
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    clamped: tuple[float, float] | None,
) -> None:
    """Raise ShapeError when the biases of `moe_experts` do not belong to the weights."""
    if w13_bias is None and w2_bias is None and clamped is None:
        return
    if w13_bias is None or w2_bias is None or clamped is None:
        raise ShapeError("w13_bias, w2_bias and clamped go together: SwiGLU is clamped where experts have biases")
    if w13.dtype == FP8:
        raise ShapeError("biases do not go with e4m3 weights")
    for name, weight, bias in (("w13_bias", w13, w13_bias), ("w2_bias", w2, w2_bias)):
        if bias.dtype != torch.float32 or bias.shape != weight.shape[:2] or bias.stride(1) != 1:
            raise ShapeError(
                f"{name} must be float32 {list(weight.shape[:2])} with contiguous rows; got {bias.dtype} "
                f"{list(bias.shape)} with strides {bias.stride()}"
            )


def _check_scales(
    w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor | None, w2_scale: torch.Tensor | None
) -> None:
    if w13.dtype != FP8 or w2.dtype != FP8 or w13_scale is None or w2_scale is None:
        raise ShapeError(f"scales go with {FP8} weights, both of them; the weights are {w13.dtype} and {w2.dtype}")
    _, hidden, inter = w2.shape
    if hidden % GROUP or inter % GROUP:
        raise ShapeError(f"blocks of {GROUP} need H and I in multiples of {GROUP}; got {hidden} and {inter}")
    for name, weight, scale in (("w13_scale", w13, w13_scale), ("w2_scale", w2, w2_scale)):
        slots, rows, columns = weight.shape
        expected = (slots, rows // GROUP, columns // GROUP)
        if scale.dtype != torch.float32 or tuple(scale.shape) != expected or scale.stride()[1:] != (expected[2], 1):
            raise ShapeError(
                f"{name} must be float32 {list(expected)} with contiguous matrices; got {scale.dtype} "
                f"{list(scale.shape)} with strides {scale.stride()}"
            )
