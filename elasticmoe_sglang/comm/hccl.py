"""One communicator an epoch, where shared-memory windows cannot reach: HCCL groups of NPU ranks.

An HCCL communicator cannot change its members, ranks or buffers. So a change of membership needs a new communicator.
Making one takes all members and seconds, so it is made before the commit, while the old one serves:

1. `prepare(membership)` in the background, on every member, joining ranks included: the group is created over store
   keys of that epoch and tested by one all-reduce, which also makes HCCL connect its links and take its buffers.
2. `adopt(epoch)` at the commit: a pointer changes. Nothing is created, nothing waits.
3. `retire()` once no launched kernel uses an older epoch's group: those are shut down.
`discard(epoch)` instead of 2 and 3 when the change is rolled back.

The library is a parameter: `build_hccl` on NPUs, which was not run on one (docs/hardware.md); tests drive the same code
over gloo, and construct the real ProcessGroupHCCL over the stand-in for CANN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import AllreduceOptions, PrefixStore, Store
from torch.distributed import DistError

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import CollectiveMismatch, CommitError, PeerTimeout


class Group(Protocol):
    """What is used of torch's `Backend` objects here."""

    def allreduce(self, tensors: list[torch.Tensor], opts: Any, /) -> Any: ...

    def shutdown(self) -> None: ...


Build = Callable[[Store, int, int, timedelta], Group]
"""(store of this epoch, rank, size, timeout) -> group."""


def build_hccl(store: Store, rank: int, size: int, timeout: timedelta) -> Group:
    """A communicator on the calling thread's current NPU. The links are made by the first collective."""
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    made: Group = ProcessGroupHCCL(store, rank, size, timeout)
    return made


@dataclass(frozen=True, kw_only=True)
class EpochGroup:
    """A tested group and its members."""

    membership: Membership
    group: Group


class EpochGroups:
    """The groups of one rank. `prepare`, `discard` and `retire` belong to its agent's thread, `adopt` and `current` to
    the thread that runs batches.

    Args:
        store: reaches all ranks and outlives each of them (the launcher's TCPStore).
        rank: this rank's number.
        device: where collectives run, such as "npu:0".
        build: creates a group.
    """

    def __init__(self, store: Store, rank: int, *, device: str, build: Build = build_hccl) -> None:
        self._store = store
        self._rank = rank
        self._device = torch.device(device)
        self._build = build
        self._lock = threading.Lock()
        self._groups: dict[int, EpochGroup] = {}
        self._current: EpochGroup | None = None

    @property
    def current(self) -> EpochGroup:
        """The adopted epoch's group. Raises CommitError before the first adopt."""
        if self._current is None:
            raise CommitError("no communicator was adopted yet", rank=self._rank)
        return self._current

    def prepare(self, membership: Membership, *, timeout_s: float, attempt: str = "") -> None:
        """Creates and tests the group of `membership`; returns when all its members have. Does nothing when it exists.

        Args:
            timeout_s: for all members to come.
            attempt: the operation's id. An epoch that was rolled back is tried again under the same number, and must
                not meet the keys that the first try left in the store.

        Raises PeerTimeout when a member does not come; whatever was made here is shut down then.
        """
        epoch, rank = membership.epoch, self._rank
        if self._rank not in membership.ranks:
            raise CommitError("this rank is no member of the epoch to prepare", rank=rank, epoch=epoch)
        with self._lock:
            existing = self._groups.get(epoch)
        if existing is not None:
            if existing.membership != membership:
                raise CommitError("the epoch was prepared with other members", rank=rank, epoch=epoch)
            return
        timeout = timedelta(seconds=timeout_s)
        store = PrefixStore(f"elasticmoe/communicator/{epoch}/{attempt}", self._store)
        store.set_timeout(timeout)
        group_rank, size = membership.ranks.index(rank), membership.size
        group: Group | None = None
        try:
            group = self._build(store, group_rank, size, timeout)
            present = self._count(group)
        except (RuntimeError, DistError) as error:
            if group is not None:
                group.shutdown()
            raise PeerTimeout(
                f"the communicator of {size} ranks did not form in {timeout_s:g} s: {error}",
                rank=rank,
                epoch=epoch,
                operation="prepare communicator",
                hint="One of them is slow, gone, or cannot be reached over HCCS or RoCE.",
            ) from error
        if present != size:
            group.shutdown()
            raise CollectiveMismatch(f"the new communicator counted {present} ranks of {size}", rank=rank, epoch=epoch)
        with self._lock:
            self._groups[epoch] = EpochGroup(membership=membership, group=group)

    def _count(self, group: Group) -> int:
        ones = torch.ones(1, dtype=torch.float32, device=self._device)
        group.allreduce([ones], AllreduceOptions()).wait()
        return int(ones.item())

    def adopt(self, epoch: int) -> EpochGroup:
        """Makes the prepared group the current one. Raises CommitError when it was not prepared."""
        with self._lock:
            if epoch not in self._groups:
                raise CommitError(
                    "the epoch's communicator was not prepared", rank=self._rank, epoch=epoch, operation="adopt"
                )
            self._current = self._groups[epoch]
            return self._current

    def discard(self, epoch: int) -> None:
        """Takes a prepared group back; does nothing where there is none."""
        with self._lock:
            if self._current is not None and self._current.membership.epoch == epoch:
                raise CommitError("the current communicator cannot be discarded", rank=self._rank, epoch=epoch)
            dropped = self._groups.pop(epoch, None)
        if dropped is not None:
            dropped.group.shutdown()

    def retire(self) -> list[int]:
        """Shuts down the groups of earlier epochs and returns their numbers. Call when nothing launched uses them."""
        epoch = self.current.membership.epoch
        with self._lock:
            old = [self._groups.pop(number) for number in sorted(self._groups) if number < epoch]
        for group in old:
            group.group.shutdown()
        return [group.membership.epoch for group in old]
