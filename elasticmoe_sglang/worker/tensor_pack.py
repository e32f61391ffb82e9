"""Nested lists of tensors as one header and a list of buffers, for ZMQ multipart messages without a copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

Nested = Any
"""A tensor, or a list of these: what SGLang's KV pools return from `get_cpu_copy`."""


def pack(nested: Nested) -> tuple[bytes, list[memoryview]]:
    """Describe the structure and expose each tensor's bytes.

    Args:
        nested: CPU tensors in nested lists; a tensor that is not contiguous is copied.

    Returns:
        header: JSON; structure with [dtype, shape] at the leaves.
        buffers: one per leaf, depth first. They keep their tensors alive.
    """
    buffers: list[memoryview] = []

    def walk(node: Nested) -> Any:
        if isinstance(node, torch.Tensor):
            flat = node.contiguous().reshape(-1).view(torch.uint8)
            buffers.append(flat.numpy().data)
            return {"dtype": str(node.dtype).removeprefix("torch."), "shape": list(node.shape)}
        return [walk(child) for child in node]

    return json.dumps(walk(nested)).encode(), buffers


def unpack(header: bytes, buffers: Sequence[bytes | memoryview]) -> Nested:
    """The inverse of `pack`; tensors share the buffers' memory and must not be written to.

    Raises:
        ValueError: the number or size of buffers does not match the header.
    """
    remaining = iter(buffers)

    def walk(node: Any) -> Nested:
        if isinstance(node, list):
            return [walk(child) for child in node]
        buffer = next(remaining, None)
        if buffer is None:
            raise ValueError("fewer buffers than tensors in the header")
        dtype = getattr(torch, node["dtype"])
        if len(buffer) == 0:
            return torch.empty(node["shape"], dtype=dtype)
        return torch.frombuffer(bytearray(buffer), dtype=torch.uint8).view(dtype).reshape(node["shape"])

    nested = walk(json.loads(header))
    if next(remaining, None) is not None:
        raise ValueError("more buffers than tensors in the header")
    return nested
