"""Which quantised checkpoints can be served: e4m3 weights with one float32 scale for each block of 128 x 128."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elasticmoe_sglang.errors import UnsupportedFeature
from elasticmoe_sglang.models.base import Architecture, Config

BLOCK = 128
BLOCK_FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of such a checkpoint, as DeepSeek-V3 and Qwen3-*-FP8 have it."""

SUPPORTED = f"unquantised weights, and fp8 in blocks of {BLOCK} x {BLOCK} as a checkpoint has them"


def is_block_fp8(config: Config, architecture: Architecture) -> bool:
    """Whether the weights of a model with this config.json are block-quantised fp8; False: unquantised.

    Raises:
        UnsupportedFeature: they are quantised otherwise, or its experts are not made of whole blocks. KeyError: the
            configuration does not say how wide its experts are.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return False
    method = found.get("quant_method")
    if not architecture.fp8:
        raise UnsupportedFeature(
            f"the model is quantised: its quant_method is {method}, and a {architecture.name} is served unquantised",
            hint="Serve a checkpoint in bfloat16: transformers writes one if it loads an mxfp4 checkpoint with "
            "Mxfp4Config(dequantize=True) and saves it",
        )
    if method != BLOCK_FP8["quant_method"]:
        raise _unsupported(f"its quant_method is {method}")
    blocks = found.get("weight_block_size")
    if blocks is None:
        raise _unsupported("its fp8 weights have one scale a tensor or a channel (no weight_block_size)")
    check_blocks(blocks)
    scheme = found.get("activation_scheme")
    if scheme != BLOCK_FP8["activation_scheme"]:
        raise _unsupported(f"the activation_scheme of its fp8 weights is {scheme}, not dynamic")
    fmt = found.get("fmt", BLOCK_FP8["fmt"])
    if fmt not in (BLOCK_FP8["fmt"], "float8_e4m3fn"):
        raise _unsupported(f"the fmt of its fp8 weights is {fmt}, not e4m3")
    for name in ("hidden_size", architecture.inner_field):
        if config[name] % BLOCK:
            raise UnsupportedFeature(
                f"the model is block-quantised, and its {name} of {config[name]} is no multiple of {BLOCK}",
                hint="Serve its unquantised checkpoint",
            )
    return True


def check_blocks(blocks: Sequence[int]) -> None:
    """Raises UnsupportedFeature: [rows, columns] of a block are others than can be computed."""
    if list(blocks) != BLOCK_FP8["weight_block_size"]:
        raise _unsupported(f"its fp8 weights are in blocks of {' x '.join(map(str, blocks))}")


def _unsupported(what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"the model is quantised: {what}", hint=f"Supported: {SUPPORTED}")
