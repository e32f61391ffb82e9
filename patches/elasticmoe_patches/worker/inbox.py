"""What retiring ranks send to a survivor, kept by change: two retirements of one rank are different ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_patches.worker.migration import Progress
from elasticmoe_patches.worker.requests import RecentAborts
from elasticmoe_sglang.hmm.kv_space import KvWindow

RetirementKey = tuple[str, int]
"""(change, rank that retires; of a replica with several the one that leads it)."""


@dataclass
class Retirement:
    """What one retiring rank has sent here, held until all its output has reached the tokenizer.

    Attributes:
        held: ElasticResumeReq of each request that has arrived.
        expected: this rank has committed the change; before, only the coordinator's messages can come.
        count: how many requests were sent, known once all were.
        released: its output has been delivered.
        window: its KV memory, where it could be mapped.
        mapped: set once it was mapped, or could not be.
    """

    expected: bool = False
    held: list[Any] = field(default_factory=list)
    count: int | None = None
    released: bool = False
    window: KvWindow | None = None
    mapped: threading.Event = field(default_factory=threading.Event)


@dataclass
class MigrationInbox:
    """The retirements under way, as one survivor sees them. `map_window`, `release` and `await_mapped` are for any
    thread, the rest for the scheduler's.

    Attributes:
        aborted: aborts since requests may have been on their way here.
        resuming: request id -> progress, from the message until SGLang has built the request.
    """

    aborted: RecentAborts = field(default_factory=RecentAborts)
    resuming: dict[str, Progress] = field(default_factory=dict)
    _retirements: dict[RetirementKey, Retirement] = field(default_factory=dict)
    _ended: set[RetirementKey] = field(default_factory=set)
    """Those whose rank died: what still arrives of them is dropped. As many as there were such deaths."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, operation_id: str, retiring_ranks: Iterable[int]) -> None:
        """The change was committed here, and these ranks retire."""
        with self._lock:
            for rank in retiring_ranks:
                self._retirements.setdefault((operation_id, rank), Retirement()).expected = True
        self.aborted.clear()

    def arrived(self, operation_id: str, retiring_rank: int, migrated: Any) -> None:
        """A request. Dropped if the rank was given up, or if this process is another than the one it was sent to:
        such requests are sent again from the journal."""
        if (retirement := self._expected(operation_id, retiring_rank)) is not None:
            retirement.held.append(migrated)

    def all_sent(self, operation_id: str, retiring_rank: int, count: int) -> None:
        if (retirement := self._expected(operation_id, retiring_rank)) is not None:
            retirement.count = count

    def _expected(self, operation_id: str, retiring_rank: int) -> Retirement | None:
        with self._lock:
            retirement = self._retirements.get((operation_id, retiring_rank))
        return retirement if retirement is not None and retirement.expected else None

    def _any(self, operation_id: str, retiring_rank: int) -> Retirement | None:
        """None if it has ended. The lock is held."""
        key = (operation_id, retiring_rank)
        return None if key in self._ended else self._retirements.setdefault(key, Retirement())

    def map_window(self, operation_id: str, retiring_rank: int, window: KvWindow | None) -> None:
        """Its KV memory was mapped, or, None, could not be. Closed at once if the rank was given up meanwhile."""
        with self._lock:
            retirement = self._any(operation_id, retiring_rank)
            if retirement is not None:
                retirement.window = window
                retirement.mapped.set()
        if retirement is None and window is not None:
            window.close()

    def await_mapped(self, operation_id: str, retiring_rank: int, timeout_s: float) -> None:
        """Wait for `map_window`, which another thread may be about to call."""
        with self._lock:
            retirement = self._any(operation_id, retiring_rank)
        if retirement is not None:
            retirement.mapped.wait(timeout_s)

    def release(self, operation_id: str, retiring_rank: int) -> None:
        """All its output has been delivered."""
        with self._lock:
            retirement = self._any(operation_id, retiring_rank)
            if retirement is not None:
                retirement.released = True

    def ready(self, *, sent: bool) -> dict[RetirementKey, bool]:
        """Those that may resume here: whether their KV can be copied.

        Args:
            sent: and whose requests have all arrived, which they do at the rank that leads a replica.
        """
        with self._lock:
            return {
                key: each.window is not None
                for key, each in self._retirements.items()
                if each.expected and each.released and (not sent or len(each.held) == each.count)
            }

    def take_ready(self) -> list[tuple[str, int, Retirement]]:
        """(change, rank, what it sent) of those whose requests have all arrived and may resume."""
        return [(*key, self.take(key)) for key in self.ready(sent=True)]

    def messages(self, key: RetirementKey) -> list[Any]:
        """ElasticResumeReq of each request that has arrived."""
        with self._lock:
            return self._retirements[key].held

    def take(self, key: RetirementKey) -> Retirement:
        """It resumes now."""
        with self._lock:
            return self._retirements.pop(key)

    def forget(self, retiring_rank: int) -> None:
        """The rank died: what has arrived of it may be incomplete, and the rest must be dropped."""
        with self._lock:
            keys = [key for key in self._retirements if key[1] == retiring_rank]
            self._ended.update(keys)
            windows = [self._retirements.pop(key).window for key in keys]
        for window in windows:
            if window is not None:
                window.close()

    def held(self) -> set[str]:
        """Ids of the requests that have arrived and not been resumed."""
        with self._lock:
            return {message.request.rid for each in self._retirements.values() for message, _, _ in each.held}
