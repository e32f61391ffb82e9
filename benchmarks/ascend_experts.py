"""`python -m benchmarks.ascend_experts grouped_matmul|triton`: an expert layer on an NPU against float64 on the host.

The shapes are Qwen3-30B-A3B's, half of the experts are on this rank, one has no rows. Exit status 1 when a relative
error (2-norm) is beyond its dtype's bound; with times, which are for comparison between the two ways only.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from elasticmoe_kernels.reference.moe import moe_experts
from elasticmoe_patches.srt.layers.moe.moe_runner.ascend import GEMMS, expert_rows_triton

_HIDDEN, _INTER, _EXPERTS, _ROWS = 2048, 768, 16, 512
_BOUNDS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""bfloat16 keeps 8 bits: rounding gate, up, their product and the result gives about 0.5 %."""
_ROUNDS = 20


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [R, H] by expert, w13 [S, 2I, H], w2 [S, H, I], counts [E] int64, slots [E] int32 (-1 = elsewhere)."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, by: float = 0.03) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * by).to(dtype)

    rows = random(_ROWS, _HIDDEN, by=1.0)
    w13, w2 = random(_EXPERTS // 2, 2 * _INTER, _HIDDEN), random(_EXPERTS // 2, _HIDDEN, _INTER)
    counts = [0, *(_ROWS // (_EXPERTS - 1) for _ in range(_EXPERTS - 2))]
    counts.append(_ROWS - sum(counts))
    slots = [expert // 2 if expert % 2 == 0 else -1 for expert in range(_EXPERTS)]
    return rows, w13, w2, torch.tensor(counts), torch.tensor(slots, dtype=torch.int32)


def compute(
    gemm: str, rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """As the server's runner core does it, on the device."""
    if gemm == "triton":
        return expert_rows_triton(rows, w13, w2, counts, slots)
    from elasticmoe_kernels.ascend import npu_ops

    return npu_ops.expert_mlp(rows, counts, npu_ops.local_experts(w13, w2, slots.tolist()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ascend_experts", description=__doc__)
    parser.add_argument("gemm", choices=GEMMS)
    parser.add_argument("--device", default="npu:0", help="default: %(default)s")
    args = parser.parse_args()
    if args.device.startswith("npu"):
        import torch_npu  # noqa: F401

    passed = True
    for dtype, bound in _BOUNDS.items():
        rows, w13, w2, counts, slots = case(dtype)
        given = [each.to(args.device) for each in (rows, w13, w2, counts, slots)]
        made = compute(args.gemm, *given).cpu()
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            compute(args.gemm, *given)
        made_again = compute(args.gemm, *given).cpu()
        each_ms = (time.perf_counter() - began) / (_ROUNDS + 1) * 1000
        wanted = moe_experts(rows, w13, w2, slots.repeat_interleave(counts)[:, None], torch.ones(_ROWS, 1))
        error = float((made.double() - wanted).norm() / wanted.norm())
        same = torch.equal(made, made_again)
        passed = passed and error <= bound and same
        print(
            f"{args.gemm} {str(dtype).removeprefix('torch.')}: relative error {error:.2e} (bound {bound:.1e}), "
            f"{'the same' if same else 'ANOTHER RESULT'} when repeated, {each_ms:.2f} ms"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
