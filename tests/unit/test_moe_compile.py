"""Biased experts' kernels are compiled for an H100 or H200, without one: gpt-oss's shape, default plans."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elasticmoe_kernels.triton import gemm_down, gemm_swiglu
from elasticmoe_kernels.triton.config import GemmConfig, default_plan

pytestmark = pytest.mark.process

WIDTH, TOP_K, EXPERTS = 2880, 4, 32
POINTERS = {
    **dict.fromkeys(("x_ptr", "xs_ptr", "h_ptr", "hs_ptr", "y_ptr"), "*bf16"),
    **dict.fromkeys(("w_ptr", "ws_ptr", "b_ptr"), "i64"),
    **dict.fromkeys(
        ("ids_ptr", "table_ptr", "pair_of_row_ptr", "block_slot_ptr", "block_rows_ptr", "num_blocks_ptr"), "*i32"
    ),
    **dict.fromkeys(("w_stride", "b_stride"), "i64"),
    **dict.fromkeys(("alpha", "limit"), "fp32"),
}
PLANS = {"direct": default_plan(4, TOP_K, EXPERTS, fp8=False), "sorted": default_plan(512, TOP_K, EXPERTS, fp8=False),
         "prefill": default_plan(8192, TOP_K, EXPERTS, fp8=False)}  # fmt: skip


def ptx_of(kernel: Any, config: GemmConfig) -> str:
    known = {
        "K_P2": TOP_K, "HAS_TABLE": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "GROUP_M": config.group_m, "SWAP_AB": config.swap_ab, "TMA": config.tma,
        "TMA_ROWS": config.tma_rows, "FP8": False, "QUANT_IN": False, "QUANT_OUT": False,
        "EVEN_K": WIDTH % config.block_k == 0, "ONE_DOT": config.one_dot, "BIASED": True,
        "PERSISTENT": config.persistent, "PARTS": 1, "W_TYPE": tl.bfloat16, "NUM_STAGES": config.num_stages,
        "PDL": True,
    }  # fmt: skip
    names = kernel.arg_names
    signature = {name: "constexpr" if name in known else POINTERS.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in known.items() if name in names}
    # As launched: rows and addresses are aligned, and so are the widths.
    aligned = [n for n in names if n in POINTERS and POINTERS[n] != "fp32"] + ["hidden", "inter", "x_stride"]
    marks = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names}
    made = triton.compile(
        ASTSource(kernel, signature, places, marks),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    return str(made.asm["ptx"])


@pytest.mark.parametrize("name", PLANS)
def test_both_products_of_biased_experts_compile(name: str) -> None:
    plan = PLANS[name]
    assert plan.direct == (name == "direct")
    first = gemm_swiglu._direct_kernel if plan.direct else gemm_swiglu._sorted_kernel
    second = gemm_down._direct_kernel if plan.direct else gemm_down._sorted_kernel
    for kernel, config in ((first, plan.w13), (second, plan.w2)):
        ptx = ptx_of(kernel, config)
        assert "wgmma" in ptx or "mma.sync" in ptx
        assert "cp.async" in ptx, "weights are loaded ahead"
        assert ".local" not in ptx, "nothing spilled"
