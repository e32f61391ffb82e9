"""A change of size on machines that are not available: a discrete-event SIMULATION over the costs of single steps.

It models this project: the Coordinator sends commands to the ranks one by one, a node's HMM answers one request after
the other, each receiver pulls its columns in order, a device sends one column at a time, all joining ranks read
the dense weights from rank 0's device, and the commit waits for the slowest. Nothing of this was run on more than one
host.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.scaling.costs import Costs
from benchmarks.scaling.events import Engine, Hold, Join, Process, Resource, Steps, Wait
from elasticmoe_sglang.planner import ColumnMove, Placement, initial_placement


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of one expert column and of the dense part, and the number of columns."""

    columns: int
    column_bytes: int
    dense_bytes: int

    def per_device(self, size: int) -> int:
        """On the fullest of `size` devices."""
        return self.dense_bytes + -(-self.columns // size) * self.column_bytes


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds. `prepare_s` ends with the last rank ready; `phases` are of the slowest joining rank (or survivor)."""

    old_size: int
    new_size: int
    prepare_s: float
    scale_latency_s: float
    finish_s: float
    columns_moved: int
    bytes_moved: int
    phases: Mapping[str, float]
    busiest_sender_s: float


def moves_between(columns: int, old: int, new: int) -> tuple[ColumnMove, ...]:
    """As few moves as a balanced placement over the new size needs; also beyond the planner's 64 ranks."""
    placement = initial_placement(columns, range(old))
    share, odd = divmod(columns, new)
    held = placement.counts()
    # The ranks that hold most keep the odd columns, so that fewer move.
    ranked = sorted(range(new), key=lambda rank: (-held.get(rank, 0), rank))
    room = {rank: share + (place < odd) for place, rank in enumerate(ranked)}
    kept: Counter[int] = Counter()
    homeless = []
    for column, owner in enumerate(placement.owners):
        if owner < new and kept[owner] < room[owner]:
            kept[owner] += 1
        else:
            homeless.append((column, owner))
    free = [rank for rank in range(new) for _ in range(room[rank] - kept[rank])]
    return tuple(
        ColumnMove(column=column, source=owner, target=target)
        for (column, owner), target in zip(homeless, _spread(free), strict=True)
    )


def _spread(free: Sequence[int]) -> list[int]:
    """Each rank once, then each once more: neighbours in the list are different receivers."""
    turn: Counter[int] = Counter()
    keyed = []
    for rank in free:
        keyed.append((turn[rank], rank))
        turn[rank] += 1
    return [rank for _, rank in sorted(keyed)]


class _Change:
    """One simulated change."""

    def __init__(self, costs: Costs, weights: Weights, old: int, new: int, *, capture: bool, standby: bool) -> None:
        self.costs, self.weights = costs, weights
        self.old, self.new = old, new
        self.capture, self.standby = capture, standby
        self.engine = Engine()
        self.coordinator = Resource("coordinator")
        self.hmm: dict[int, Resource] = defaultdict(lambda: Resource("hmm"))
        self.cores: dict[int, Resource] = defaultdict(lambda: Resource("cores", int(costs.cores_per_node.value)))
        self.near: dict[int, Resource] = defaultdict(lambda: Resource("link"))
        self.far: dict[int, Resource] = defaultdict(lambda: Resource("network"))
        self.moves = moves_between(weights.columns, old, new)
        self.incoming: dict[int, list[ColumnMove]] = defaultdict(list)
        for move in self.moves:
            self.incoming[move.target].append(move)
        self.marks: dict[int, dict[str, float]] = {}
        self.committed_at = 0.0

    def node(self, rank: int) -> int:
        return rank // self.costs.per_node

    def run(self) -> Prediction:
        self.engine.start(self._coordinate())
        finish = self.engine.run()
        ready = {rank: sum(phases.values()) for rank, phases in self.marks.items()}
        slowest = max(ready, key=lambda rank: ready[rank], default=None)
        senders = [*self.near.values(), *self.far.values()]
        joining_ranks = max(0, self.new - self.old)
        return Prediction(
            old_size=self.old,
            new_size=self.new,
            prepare_s=max(ready.values(), default=0.0),
            scale_latency_s=self.committed_at,
            finish_s=finish - self.committed_at,
            columns_moved=len(self.moves),
            bytes_moved=len(self.moves) * self.weights.column_bytes + joining_ranks * self.weights.dense_bytes,
            phases=self.marks.get(slowest, {}) if slowest is not None else {},
            busiest_sender_s=max((resource.busy_s for resource in senders), default=0.0),
        )

    def _coordinate(self) -> Steps:
        started: list[Process] = []
        receivers = sorted(set(self.incoming) | set(range(self.old, self.new)))
        for rank in receivers:
            yield Hold(self.coordinator, self.costs.message_s.value)
            started.append(self.engine.start(self._receive(rank, self.engine.now)))
        yield Join(started)
        members = max(self.old, self.new)
        yield Wait(self.costs.commit_s.value + members * self.costs.commit_rank_s.value)
        self.committed_at = self.engine.now
        releases = Counter(move.source for move in self.moves)
        yield Join([self.engine.start(self._release(rank, count)) for rank, count in releases.items()])

    def _receive(self, rank: int, told_at: float) -> Steps:
        marks = self.marks[rank] = {"told": told_at}
        clock = told_at
        joins = rank >= self.old

        def mark(phase: str) -> None:
            nonlocal clock
            marks[phase] = self.engine.now - clock
            clock = self.engine.now

        if joins:
            boot = self.costs.boot_s.value + (0.0 if self.standby else self.costs.cold_boot_s.value)
            yield Hold(self.cores[self.node(rank)], boot)
            mark("boot")
        yield Hold(self.hmm[self.node(rank)], (len(self.incoming[rank]) + joins) * self.costs.new_column_s.value)
        mark("map")
        if joins:
            yield self._copy(0, rank, self.weights.dense_bytes)
            mark("dense weights")
        for move in self.incoming[rank]:
            yield self._copy(move.source, rank, self.weights.column_bytes)
        mark("columns")
        if joins and self.capture:
            yield Wait(self.costs.capture_s.value)
            mark("graphs")

    def _copy(self, source: int, target: int, nbytes: int) -> Hold:
        if self.node(source) == self.node(target):
            return Hold(self.near[source], nbytes / self.costs.near_copy.value)
        return Hold(self.far[source], nbytes / self.costs.far_copy.value)

    def _release(self, rank: int, columns: int) -> Steps:
        yield Hold(self.hmm[self.node(rank)], columns * self.costs.old_column_s.value)


def predict(
    costs: Costs,
    weights: Weights,
    old: int,
    new: int,
    *,
    capture: bool = True,
    standby: bool = True,
) -> Prediction:
    """One change from `old` to `new` devices.

    Args:
        capture: the joining ranks capture their graphs before they join.
        standby: a warm standby is available for each joining rank.
    """
    return _Change(costs, weights, old, new, capture=capture, standby=standby).run()


def predict_cold_restart(costs: Costs, weights: Weights, new: int, *, capture: bool = True) -> float:
    """Stop and start at the new size: boot, read the checkpoint on every node, capture. Seconds."""
    nodes = -(-new // costs.per_node)
    in_node = min(new, costs.per_node)
    # Every node reads the dense part once and its own columns.
    columns = -(-weights.columns // nodes)
    nbytes = weights.dense_bytes + columns * weights.column_bytes
    copies = weights.dense_bytes * (in_node - 1) / costs.near_copy.value
    graphs = costs.cold_capture_s.value if capture else 0.0
    return costs.cold_boot_s.value + nbytes / costs.load_rate.value + copies + graphs


@dataclass(frozen=True, kw_only=True)
class DecodeLoad:
    """For the throughput model: bytes a token of KV cache, context length, and what a step exchanges.

    exchange_bytes: of one token in one layer, both directions. layers: that exchange.
    """

    kv_bytes: int
    context: int
    exchange_bytes: int
    layers: int
    max_batch: int = 256


def predict_throughput(costs: Costs, weights: Weights, size: int, load: DecodeLoad) -> float | None:
    """Output tokens per second of all devices, memory-bound decoding; None: the weights do not fit.

    A step reads the device's weights and its requests' KV cache once and exchanges every token with the experts.
    """
    held = weights.per_device(size)
    room = 0.9 * costs.hbm_bytes.value - held
    batch = min(load.max_batch, int(room // (load.kv_bytes * load.context))) if room > 0 else 0
    if batch < 1:
        return None
    exchange = costs.near_copy.value if size <= costs.per_node else costs.far_copy.value
    step = (held + batch * load.context * load.kv_bytes) / costs.memory_rate.value
    step += load.layers * (2 * costs.far_latency_s.value + batch * load.exchange_bytes / exchange)
    return size * batch / step


def placement_after(columns: int, old: int, new: int) -> Placement:
    """Where the moves lead."""
    owners = list(initial_placement(columns, range(old)).owners)
    for move in moves_between(columns, old, new):
        owners[move.column] = move.target
    return Placement(owners=tuple(owners))
