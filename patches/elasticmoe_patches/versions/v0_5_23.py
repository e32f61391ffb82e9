"""SGLang 0.5.23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Api0523:
    """See `SglangApi`."""

    @contextmanager
    def controller_starts_workers(self) -> Iterator[None]:
        """SGLang starts one scheduler process a rank before the controller, inactive ranks included, unless an elastic
        EP backend is named. It is named in the main process only and for as long as the launch asks: the processes
        started meanwhile read SGLang's arguments, which have none."""
        from sglang.srt.runtime_context import get_exec

        from elasticmoe_patches.launch import BACKEND

        with get_exec().moe.override(elastic_ep_backend=BACKEND):
            yield

    def record_init_infos(self, controller: Any, infos: list[dict[str, Any]]) -> None:
        controller._record_scheduler_init_infos(infos)

    batch_info_local: tuple[str, ...] = ("num_dp_ranks", "is_health_check", "attention_pairs")

    def data_parallel_ranks(self, info: Any) -> int:
        return int(info.num_dp_ranks)

    def fill_batch_info(self, info: Any, columns: list[tuple[int, ...]], waited_s: float) -> None:
        health_checks, pairs = columns
        info.any_health_check = any(health_checks)
        info.global_attention_pairs = list(pairs)
        info.sync_wait_seconds = waited_s

    def whole_mlp(self) -> dict[str, Any]:
        return {"parallel_group": "replicated"}

    def keeps_prefixes(self, cache: Any) -> bool:
        return bool(cache.supports_prefix_sharing())

    def matched_rows(self, cache: Any, match: Any) -> torch.Tensor:
        """A match says how long it is; its rows are read off the path to its node, and an empty match has none."""
        if match.device_prefix_len == 0:
            return torch.empty((0,), dtype=torch.int64, device=cache.token_to_kv_pool_allocator.device)
        rows: torch.Tensor = cache.path_device_indices(match.last_device_node)[: match.device_prefix_len]
        return rows

    def insert_request(self, cache: Any, req: Any, up_to: int) -> None:
        cache.checkpoint(req, up_to=up_to)

    def prefix_rows(self, req: Any) -> torch.Tensor | None:
        return None  # read off the tree whenever they are needed
