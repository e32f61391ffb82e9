"""Compile the kernels for Hopper into Triton's cache on any machine, GPU or not."""

from __future__ import annotations

from dataclasses import replace

import torch
from moe_cases import MODELS, make_layers, plans

from elasticmoe_kernels.triton.config import shape_name, tuned_entries
from elasticmoe_kernels.triton.moe import fused_moe


def compile_part(part: int, parts: int, *, every: bool) -> None:
    """Compile this part's share of the installed plans, or of every candidate, for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Target:
        """Stand-in for the CUDA driver: compiling needs only the target."""

        utils = type("utils", (), {"get_device_properties": staticmethod(lambda d: {"max_shared_mem": 232448})})

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    import elasticmoe_kernels.triton.gemm_down as down
    import elasticmoe_kernels.triton.gemm_swiglu as swiglu
    import elasticmoe_kernels.triton.moe as layer_module

    driver.set_active(Target())  # type: ignore[arg-type]
    launch = jit.JITFunction.run
    jit.JITFunction.run = lambda self, *a, grid, warmup, **k: launch(self, *a, grid=grid, warmup=True, **k)
    layer_module.supports_pdl = lambda device: True
    down.multiprocessors = swiglu.multiprocessors = lambda device: 132
    down.address = swiglu.address = lambda tensor: 1 << 40  # any 64-bit multiple of 16
    # The longest to compile first, dealt out like cards.
    failed = 0
    for model in MODELS:
        layer = make_layers(replace(model, layers=1), "meta", copies=False)[0]
        name = shape_name(model.hidden, model.inter, model.weight_dtype)
        wanted = list(plans(model)) if every else []
        wanted += list(dict.fromkeys((e.tokens, e.plan) for e in tuned_entries(name)))
        for index, (tokens, plan) in enumerate(wanted):
            if index % parts != part:
                continue
            x = torch.empty(tokens, model.hidden, dtype=torch.bfloat16, device="meta")
            ids = torch.empty(tokens, model.top_k, dtype=torch.int32, device="meta")
            table_ = torch.empty(model.experts, dtype=torch.int32, device="meta")
            try:
                fused_moe(
                    x, layer.w13, layer.w2, ids, torch.empty(tokens, model.top_k, device="meta"), slot_table=table_,
                    w13_scale=layer.w13_scale, w2_scale=layer.w2_scale, plan=plan,
                )  # fmt: skip
            except Exception as e:
                failed += 1
                print("does not compile:", model.name, plan, f"{type(e).__name__}: {e}"[:300])
    if part == 0 or failed:
        print(f"compile part {part}: done, {failed} failed")
