"""A model's shapes stay as its checkpoint has them (mirrors sglang/srt/configs/update_config.py).

On CPUs SGLang pads heads and intermediate sizes to multiples of the tensor-parallel size. That size is the capacity
here, but nothing is split by it: a rank has whole experts, and whole attention heads (all of them, or those of its
place in its attention replica).
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_sglang.errors import UnsupportedFeature
from elasticmoe_sglang.runtime import current_runtime

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "replace",
    "adjust_config_with_unaligned_cpu_tp(model_config, load_config, tp_size)",
    expires="SGLang pads by the size over which attention and experts are really split.",
    rebind=("sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",),
)
def keep_config(model_config: Any, load_config: Any, tp_size: int) -> Any:
    """SGLang pads heads and intermediate sizes to multiples of the tp size, which no checkpoint fits,
    though attention is split within a replica only, whose size divides its heads (`launch.py`), and experts not at all.

    Returns `model_config` as it is.

    Raises:
        UnsupportedFeature: attention or experts are split over other ranks, so that padding might be needed.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    runtime = current_runtime()
    expected = {"attn_tp_size": runtime.config.attention_tp if runtime is not None else 1, "moe_tp_size": 1}
    split = {name: size for name, whole in expected.items() if (size := getattr(parallel, name)) != whole}
    if split:
        raise UnsupportedFeature(
            f"SGLang splits tensors of the model over ranks ({split}) in a server of tp size {tp_size}",
            hint="Leave SGLang's parallelism flags out: --elasticmoe-max-ep-size sets them",
        )
    return model_config
