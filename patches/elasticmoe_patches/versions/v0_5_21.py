"""SGLang 0.5.21."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Api0521:
    """See `SglangApi`."""

    def controller_starts_workers(self) -> AbstractContextManager[None]:
        return nullcontext()  # it always does

    def record_init_infos(self, controller: Any, infos: list[dict[str, Any]]) -> None:
        controller.startup_time = infos[0]["startup_time"]

    batch_info_local: tuple[str, ...] = ("dp_size",)

    def data_parallel_ranks(self, info: Any) -> int:
        return int(info.dp_size)

    def fill_batch_info(self, info: Any, columns: list[tuple[int, ...]], waited_s: float) -> None:
        () = columns

    def whole_mlp(self) -> dict[str, Any]:
        return {"tp_rank": 0, "tp_size": 1}

    def keeps_prefixes(self, cache: Any) -> bool:
        return not cache.is_chunk_cache()

    def matched_rows(self, cache: Any, match: Any) -> torch.Tensor:
        rows: torch.Tensor = match.device_indices
        return rows

    def insert_request(self, cache: Any, req: Any, up_to: int) -> None:
        cache.insert_req(req, up_to=up_to)

    def prefix_rows(self, req: Any) -> torch.Tensor | None:
        rows = req.prefix_indices
        return rows if isinstance(rows, torch.Tensor) and len(rows) else None
