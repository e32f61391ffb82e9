"""MoE experts on NVIDIA GPUs (mirrors ``sglang/srt/layers/quantization/unquant.py``).

SGLang's own Triton MoE takes contiguous expert weights; columns are strided, and most slots have no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elasticmoe_patches.spec import HookSpec

if TYPE_CHECKING:
    import torch


class RowSlots:
    """What SGLang's dispatcher takes for its table of local experts: `table[topk_ids]`, on the device.

    Args:
        table: int32, expert id -> slot, -1 for not here.
        control: address of the windows' control block, which says which ranks are there.
        ranks: that exist.
    """

    def __init__(self, table: torch.Tensor, *, control: int, ranks: int) -> None:
        self._table = table
        self._control = control
        self._ranks = ranks

    def __getitem__(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """[T, K] expert ids -> int32 slots; -1 also in the rows of inactive ranks."""
        from sglang.srt.layers.dp_attention import is_dp_max_padding

        from elasticmoe_kernels.triton.slots import slots_of_rows

        # With rows padded to the longest batch every rank has an equal part; without, inactive ranks have no rows.
        rows = topk_ids.shape[0]
        equal_parts = self._ranks > 1 and is_dp_max_padding() and rows > 0 and rows % self._ranks == 0
        each = rows // self._ranks if equal_parts else None
        return slots_of_rows(topk_ids, self._table, control=self._control, rows_per_rank=each)


def forward(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """What the CPU platform computes too, see `moe.unquant.forward`, which imports SGLang and so is loaded here."""
    from elasticmoe_patches.srt.layers.moe import unquant

    return unquant.forward(self, layer, dispatch_output)


_METHOD = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"

# forward_native too: SGLANG_FORCE_FUSED_OP_BACKEND selects it, and it is the method that serves float32 on a GPU.
HOOKS: tuple[HookSpec, ...] = tuple(
    HookSpec(
        target=f"{_METHOD}.{name}",
        kind="replace",
        hook=f"{__name__}:forward",
        signature="(self, layer, dispatch_output)",
        reason="Expert columns are strided and partly unmapped; SGLang's MoE asserts contiguous weights, or reads all.",
        expires="SGLang's fused MoE takes strided expert weights.",
        processes=frozenset(("rank", "standby")),
    )
    for name in ("forward_cuda", "forward_native")
)
