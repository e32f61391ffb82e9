"""The baseline: SGLang's own fused MoE (Triton) with contiguous weights, called as its server calls it."""

from __future__ import annotations

import types
from typing import Any

import torch
from moe_cases import Layer, Model


class SglangMoe:
    """`fused_experts` of the installed SGLang, with its tuned configs for this GPU where it ships any."""

    def __init__(self) -> None:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
        from sglang.srt.layers.moe.topk import StandardTopKOutput
        from sglang.srt.runtime_context import get_parallel
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
        # One rank: the layer only asks the group whether it spans several.
        override = get_parallel().override(tp_group=types.SimpleNamespace(world_size=1))
        override.__enter__()
        self._keep = override
        self._fused = fused_moe.fused_experts
        self._config = MoeRunnerConfig
        self._topk = StandardTopKOutput

    def __call__(
        self, model: Model, layer: Layer, share: int, x: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """local_ids [T, K] int32, -1 for experts of other ranks."""
        local = model.experts // share
        config = self._config(
            num_experts=model.experts, num_local_experts=local, hidden_size=model.hidden,
            intermediate_size_per_partition=model.inter, top_k=model.top_k, activation="silu", inplace=False,
        )  # fmt: skip
        w13, w2 = (w[:local] for w in layer.contiguous)
        extra: dict[str, Any] = {}
        if model.fp8:
            assert layer.w13_scale is not None and layer.w2_scale is not None
            extra = {
                "use_fp8_w8a8": True, "w1_scale": layer.w13_scale[:local], "w2_scale": layer.w2_scale[:local],
                "block_shape": [128, 128],
            }  # fmt: skip
        out: torch.Tensor = self._fused(x, w13, w2, self._topk(weights, local_ids, weights), config, **extra)
        return out
