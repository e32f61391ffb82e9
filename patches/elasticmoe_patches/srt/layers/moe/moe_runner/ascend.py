"""Expert columns under SGLang's NPU MoE path: a runner core under the name "ascend".

SGLang's own core of that name multiplies with one contiguous [experts, ...] weight that NPU loading has
cast to FRACTAL_NZ. Here weights are columns wherever they are mapped, in ND format, and some experts are not on this
rank. Everything around it stays SGLang's: `AscendTPDispatcher` sorts the rows by expert and counts them, and sums the
experts' rows of each token afterwards.

Two ways to multiply, chosen by ELASTICMOE_NPU_GEMM:
- triton (default): our Triton-Ascend grouped GEMM. Reads slots from device memory: a graph outlives a change.
- grouped_matmul: CANN's `npu_grouped_matmul` over a list of this rank's experts. The list is fixed when a graph is
  captured, so NPU graphs must be off.

Written against SGLang 0.5.21 and the operator schemas of torch_npu 2.13.0; not run on an NPU (docs/hardware.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError

if TYPE_CHECKING:
    import torch

GEMM_ENV = "ELASTICMOE_NPU_GEMM"
GEMMS = ("triton", "grouped_matmul")
ND_ENV = "SGLANG_NPU_DISABLE_ACL_FORMAT_WEIGHT"

_registered = False


def chosen_gemm() -> str:
    """The value of ELASTICMOE_NPU_GEMM. Raises UserInputError for an unknown one."""
    gemm = os.environ.get(GEMM_ENV, GEMMS[0])
    if gemm not in GEMMS:
        raise UserInputError(f"{GEMM_ENV}={gemm} is unknown", hint=f"Use one of {', '.join(GEMMS)}.")
    return gemm


def register() -> None:
    """Register our core, once a process; SGLang prefers it to its own."""
    global _registered
    if _registered:
        return
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core

    # SGLang casts weights to FRACTAL_NZ unless told not to; a column must stay plain rows.
    os.environ[ND_ENV] = "1"
    register_moe_runner_core("ascend", make_core)
    _registered = True


def make_core(config: Any) -> Any:
    """The core of one layer, from its MoeRunnerConfig. Raises UnsupportedFeature for what it would compute wrongly."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.moe.moe_runner.ascend import AscendRunnerOutput
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerCore
    from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend

    if not envs.SGLANG_NPU_DISABLE_ACL_FORMAT_WEIGHT.get():
        raise UnsupportedFeature("expert columns need weights in ND format", hint=f"Set {ND_ENV}=1.")
    plain = config.activation == "silu" and config.is_gated and not config.apply_router_weight_on_input
    limits = (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
    if not plain or any(limit is not None for limit in limits):
        raise UnsupportedFeature("the NPU path computes plain SwiGLU experts only")
    if not get_moe_a2a_backend().is_none():
        raise UnsupportedFeature(
            "on NPUs expert columns work with --moe-a2a-backend none only",
            hint="DeepEP numbers experts by rank, which an elastic placement does not.",
        )
    gemm = chosen_gemm()

    class ColumnRunnerCore(MoeRunnerCore):  # type: ignore[misc]
        """Rows sorted by expert in, the experts' outputs in the same places out; zeros for experts elsewhere."""

        runner_backend = MoeRunnerBackend.ASCEND

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self._local: Any = None
            self._local_of: list[int] | None = None

        def run(self, runner_input: Any, quant_info: Any, running_state: dict[str, Any], hooks: Any = None) -> Any:
            rows, counts = runner_input.hidden_states, runner_input.expert_tokens
            if runner_input.hidden_states_scale is not None or runner_input.group_list_type != 1:
                raise UnsupportedFeature("the NPU path takes unquantised rows with counts by expert")
            # Set by the loader: the slot of each expert, -1 for those on other ranks.
            slots = self.config.layer.dispatcher.local_expert_mapping[: counts.shape[0]]
            if gemm == "triton":
                out = expert_rows_triton(rows, quant_info.w13_weight, quant_info.w2_weight, counts, slots)
            else:
                out = self._grouped_matmul(rows, quant_info, counts, slots)
            return AscendRunnerOutput(hidden_states=out)

        def _grouped_matmul(self, rows: Any, quant_info: Any, counts: Any, slots: Any) -> Any:
            from elasticmoe_kernels.ascend import npu_ops

            # Reads the table back to the host: a wait for the device, and the price of a list of weights.
            now = slots.tolist()
            if now != self._local_of:
                self._local = npu_ops.local_experts(quant_info.w13_weight, quant_info.w2_weight, now)
                self._local_of = now
            return npu_ops.expert_mlp(rows, counts, self._local)

    return ColumnRunnerCore(config)


def expert_rows_triton(
    rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Our kernels on SGLang's layout.

    Args:
        rows: [R, H], experts in ascending order. counts: [E] int64, rows of each expert.
        w13: [S, 2I, H]; w2: [S, H, I]. slots: [E] int32, -1 = elsewhere.

    Returns: [R, H], zero in rows of experts elsewhere and in rows of no expert.
    """
    import torch

    from elasticmoe_kernels.ascend import moe

    offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=rows.device)
    offsets[1:] = torch.cumsum(counts, 0)
    return moe.expert_mlp(rows, w13, w2, offsets, slots.to(torch.int32), out=torch.zeros_like(rows))
