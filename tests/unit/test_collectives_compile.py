"""What Triton makes of the collectives for an H100 or H200, without one: access widths, memory order, no spills."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elasticmoe_kernels.triton import collective_kernels as kernels
from elasticmoe_kernels.triton.windows import WindowLayout

LAYOUT = WindowLayout(capacity=4)
GEOMETRY = {
    "channel": 0,
    "SIZE": 4,
    "LEAST": 256,
    "CAPACITY": 4,
    "RANKS": 4,
    "BLOCKS": LAYOUT.blocks,
    "HEADERS": LAYOUT.headers_offset,
    "DATA_OFFSET": LAYOUT.data_offset,
    "DATA_BYTES": LAYOUT.data_bytes,
}
ADDRESSES = ("out", "inp", "control", "base", "global_ranks", "header")


def ptx_of(kernel: Any, **constants: Any) -> str:
    known = {**GEOMETRY, **constants}
    signature = {
        name: "constexpr" if name in known else "i64" if name in ADDRESSES else "i32" for name in kernel.arg_names
    }
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, signature, {(places[name],): value for name, value in known.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    return str(made.asm["ptx"])


@pytest.mark.process
@pytest.mark.parametrize(
    ("kernel", "constants", "width"),
    [
        (kernels.all_gather_kernel, {"ZERO": True, "T": tl.int64, "FACTOR": 2, "TILE": 2048}, "v2.b64"),
        (
            kernels.reduce_scatter_kernel,
            {"OP": 1, "T": tl.bfloat16, "ACC": tl.float32, "FACTOR": 8, "TILE": 8192},
            "v4.b32",
        ),
    ],
    ids=["all_gather", "reduce_scatter"],
)
def test_accesses_are_wide_and_flags_have_system_scope(kernel: Any, constants: dict[str, Any], width: str) -> None:
    ptx = ptx_of(kernel, **constants)
    assert f"ld.global.{width}" in ptx and f"st.global.{width}" in ptx, "16 bytes a thread"
    assert not re.search(r"(ld|st)\.global\.b(8|16)\b", ptx)
    assert "ld.global.sys.acquire.b64" in ptx and "atom.global.sys.release.max.s64" in ptx
    assert ".local" not in ptx, "nothing spilled"
