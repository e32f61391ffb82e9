"""Meetings of the ranks of an attention replica, where attention is tensor-parallel (docs/adr/0017).

They schedule the same batches because each sees the same things in the same iteration: SGLang's requests and commands,
which come to all of them by its broadcasts, and everything that reaches a rank by itself (a KV resize that its agent
has prepared, requests that move here, requests to give up, a recovery's commit), which `Replica.agree` makes one
iteration's on all. It also compares what the ranks have: those that differ end, and their requests go on elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elasticmoe_patches.worker.inbox import RetirementKey
from elasticmoe_patches.worker.requests import live_requests
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.worker.kv import Resized, ResizeJobs

logger = logging.getLogger(__name__)

_AVAILABLE, _WAITING, _RUNNING, _KV, _ORDERS, _COMMIT, _WIDTH = range(7)
_ATTEMPT_BITS = 16


class ReplicaLost(BaseException):
    """Unwinds SGLang's event loop because another rank of the replica is gone; not an Exception, which SGLang would
    take for a crash."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What has come to one rank and waits for the replica.

    Attributes:
        ready: retirements whose last output has been delivered (and, where this rank leads, whose requests have all
            come), in the order of their coming: whether this rank can copy their KV.
        give_ups: operations for which requests that wait here are to be given up.
    """

    ready: dict[RetirementKey, bool]
    give_ups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all ranks of the replica do in this iteration, in this order.

    Attributes:
        sent_again: encoded ElasticResumeReq of requests that are on no rank.
        retirements: of each that can be resumed, whether its KV is copied, and its encoded requests.
        give_ups: operations.
        aborted: ids of the requests above that were aborted while they were on their way.
    """

    sent_again: list[bytes] = field(default_factory=list)
    retirements: list[tuple[RetirementKey, bool, list[bytes]]] = field(default_factory=list)
    give_ups: tuple[str, ...] = ()
    aborted: frozenset[str] = frozenset()


class Replica:
    """A rank's end of its attention replica, for the scheduler's thread, between two batches.

    Args:
        scheduler: SGLang's. rank, mates: this rank, and all of the replica, ascending; the first leads it.
        jobs: changes of the KV capacity that this rank is ready for; None where that does not change.
        control: tells which ranks live.
    """

    def __init__(
        self, scheduler: Any, rank: int, mates: Sequence[int], jobs: ResizeJobs | None, control: ControlPage
    ) -> None:
        self._scheduler = scheduler
        self._rank = rank
        self._mates = mates
        self._jobs = jobs
        self._control = control

    def agree(
        self, resize: Callable[[int], Resized], *, orders: bool, commit: tuple[int, int] | None = None
    ) -> tuple[bool, bool]:
        """Meet the other ranks, and change the KV capacity where all are ready to.

        Args:
            resize: makes a number of tokens the scheduler's capacity.
            orders: this rank leads and may have some.
            commit: (epoch, attempt) of a recovery's commit that has come.

        Returns:
            Whether the leader may have orders (`exchange`), and whether all ranks have this commit.

        Raises:
            CollectiveError: a rank did not come. WorkerError: the ranks are not in the same state.
        """
        offered = self._jobs.claim() if self._jobs is not None else None
        done = False
        try:
            rows = self._gather(self._summary(offered, orders, commit))
            self._require_same("free KV tokens, waiting and running requests", [row[: _RUNNING + 1] for row in rows])
            if self._jobs is not None and offered is not None and len({row[_KV] for row in rows}) == 1:
                done = True
                self._jobs.run_claimed(resize)
        finally:
            if self._jobs is not None and offered is not None and not done:
                self._jobs.unclaim()
        return bool(rows[0][_ORDERS]), commit is not None and len({row[_COMMIT] for row in rows}) == 1

    def exchange(self, arrivals: Arrivals, compose: Callable[[list[Arrivals]], Orders]) -> Orders:
        """The leader's orders, by what has come to all ranks.

        Raises:
            CollectiveError: a rank did not come.
        """
        import torch.distributed as dist

        group, leads = self._scheduler.attn_tp_cpu_group, self._rank == self._mates[0]
        of_all: list[Any] = [None] * len(self._mates)
        dist.all_gather_object(of_all, arrivals, group=group)
        orders: list[Any] = [compose(of_all) if leads else None]
        dist.broadcast_object_list(orders, src=self._mates[0], group=group)
        found: Orders = orders[0]
        return found

    def least(self, value: int) -> int:
        """The smallest of the ranks' values. Raises CollectiveError."""
        return min(row[0] for row in self._gather([value]))

    def require_same_requests(self) -> None:
        """Ranks that stopped at the same point have the same requests, with the same tokens.

        Raises:
            WorkerError: they have not. CollectiveError: a rank did not come.
        """
        digest = hashlib.sha256()
        for req, tokens in live_requests(self._scheduler):
            digest.update(f"{req.rid} {tokens} {list(req.origin_input_ids)} {list(req.output_ids)}".encode())
        rows = self._gather([int.from_bytes(digest.digest()[:7], "little")])
        self._require_same("their requests (digests)", rows)

    def leave_if_one_is_lost(self) -> None:
        """Without one of its ranks a replica has a part of its KV only.

        Raises:
            ReplicaLost: the process of one is gone.
        """
        gone = [rank for rank in self._mates if rank != self._rank and not self._control.alive(rank)]
        if gone:
            logger.error("rank %d ends: it shares an attention replica with ranks %s, which are gone", self._rank, gone)
            raise ReplicaLost

    def _summary(self, offered: int | None, orders: bool, commit: tuple[int, int] | None) -> list[int]:
        scheduler, summary = self._scheduler, [0] * _WIDTH
        summary[_AVAILABLE] = scheduler.token_to_kv_pool_allocator.available_size()
        summary[_WAITING] = len(scheduler.waiting_queue)
        running = scheduler.running_batch
        summary[_RUNNING] = len(running.reqs) if running is not None else 0
        summary[_KV] = -1 if offered is None else offered
        summary[_ORDERS] = int(orders)
        summary[_COMMIT] = 0 if commit is None else commit[0] << _ATTEMPT_BITS | commit[1]
        return summary

    def _gather(self, mine: list[int]) -> list[list[int]]:
        from sglang.srt.distributed.utils import all_gather_single

        rows = torch.empty((len(self._mates), len(mine)), dtype=torch.int64)
        all_gather_single(rows.view(-1), torch.tensor(mine, dtype=torch.int64), group=self._scheduler.attn_tp_cpu_group)
        found: list[list[int]] = rows.tolist()
        return found

    def _require_same(self, what: str, rows: list[list[int]]) -> None:
        """Nobody knows which of the ranks is right: all end."""
        if any(row != rows[0] for row in rows):
            listed = ", ".join(f"{rank} has {row}" for rank, row in zip(self._mates, rows, strict=True))
            raise WorkerError(
                f"the ranks of an attention replica differ in {what}: {listed}",
                rank=self._rank,
                hint="They are replaced, and their requests continue; please report what the server was doing",
            )
