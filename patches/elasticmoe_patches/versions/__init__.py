"""What differs between the supported versions of SGLang beyond signatures: one adapter a version, chosen once.

The rest of the package calls `api()` and never asks SGLang what it has. Of a hook whose target has another signature in
another version, the declaration says so (`spec.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from elasticmoe_patches.preflight import check_version
from elasticmoe_patches.targets import sglang_version

if TYPE_CHECKING:
    import torch


class SglangApi(Protocol):
    """SGLang under one set of names."""

    def controller_starts_workers(self) -> AbstractContextManager[None]:
        """While the engine launches: it starts the data-parallel controller and leaves the ranks to that."""

    def record_init_infos(self, controller: Any, infos: list[dict[str, Any]]) -> None:
        """Tell the data-parallel controller what the first ranks said when they were ready, in rank order."""

    batch_info_local: tuple[str, ...]
    """What a rank says of its batch in MLPSyncBatchInfo, beside what it says in all versions."""

    def data_parallel_ranks(self, info: Any) -> int:
        """Attention replicas of a MLPSyncBatchInfo."""

    def fill_batch_info(self, info: Any, columns: list[tuple[int, ...]], waited_s: float) -> None:
        """Fill what a MLPSyncBatchInfo has beside what it has in all versions.

        Args:
            columns: what the ranks said behind the nine numbers of all versions, a tuple with one number a rank each.
            waited_s: seconds in which the ranks' numbers were gathered.

        Raises:
            ValueError: another number of columns than this version has.
        """

    def whole_mlp(self) -> dict[str, Any]:
        """Arguments of a parallel MLP that every rank holds whole."""

    def keeps_prefixes(self, cache: Any) -> bool:
        """Whether the prefix cache keeps what a request computed for others."""

    def matched_rows(self, cache: Any, match: Any) -> torch.Tensor:
        """Rows of the KV pool that a match found, [matched tokens] int64, on the pool's device."""

    def insert_request(self, cache: Any, req: Any, up_to: int) -> None:
        """Give the KV of a running request's first `up_to` tokens to the cache."""

    def prefix_rows(self, req: Any) -> torch.Tensor | None:
        """The request's own copy of its prefix's rows in the KV pool; None where it holds none."""


@cache
def api() -> SglangApi:
    """The adapter of the installed SGLang.

    Raises:
        HookError: its version is not supported.
    """
    check_version()
    if sglang_version() == "0.5.21":
        from elasticmoe_patches.versions.v0_5_21 import Api0521

        return Api0521()
    from elasticmoe_patches.versions.v0_5_23 import Api0523

    return Api0523()
