"""SGLang's map of experts needs no equal share for every rank (mirrors sglang/srt/eplb/expert_location.py).

The map says which logical expert a physical one is, and cuts the physical ones into equal runs over the ranks. Here a
physical expert is a column and every rank has a slot for each of them (docs/adr/0001-slots-are-columns.md); who holds
which column is the placement's business. So the map is made for one rank that has all of them.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_sglang.errors import UnsupportedFeature


class _OneShare:
    """SGLang's parallel context, except that all experts are one rank's share."""

    ep_size = 1

    def __init__(self, parallel: Any) -> None:
        self._parallel = parallel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parallel, name)


HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "ExpertLocationMetadata._init_common(model_config)",
    expires="SGLang takes the placement of experts as an argument, or an uneven one.",
)
def around_init_common(original: Any, model_config: Any) -> Any:
    """SGLang asserts that the ranks divide the experts; columns are placed without equal shares.

    Returns SGLang's sizes of the map, with as many local experts as there are logical ones; None without experts.

    Raises:
        UnsupportedFeature: there are more physical experts than logical ones, so slots would not be columns.
    """
    from sglang.srt.eplb import expert_location

    real = expert_location.get_parallel
    expert_location.get_parallel = lambda: _OneShare(real())
    try:
        sizes = original(model_config)
    finally:
        expert_location.get_parallel = real
    if sizes is None:
        return None
    columns = sizes["model_config_for_expert_location"].num_logical_experts
    found = {name: sizes[name] for name in ("num_physical_experts", "num_local_physical_experts", "ep_size")}
    if found != {"num_physical_experts": columns, "num_local_physical_experts": columns, "ep_size": 1}:
        raise UnsupportedFeature(
            f"SGLang lays {columns} experts out as {found}, but a rank has one slot for each expert",
            hint="Leave out flags for SGLang's own elastic EP; redundant experts are --elasticmoe-redundant-experts",
        )
    return sizes
