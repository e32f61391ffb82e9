"""Sizes of the ranks' KV caches: all device memory that weights and headroom leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.worker_channel import WorkerChannel
from elasticmoe_sglang.errors import ElasticMoEError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm.base import round_up
from elasticmoe_sglang.planner import KvDevice, KvShape, TransitionPlan, View
from elasticmoe_sglang.wire import to_coordinator, to_worker
from elasticmoe_sglang.wire.to_hmm import DeviceUsage, HmmStatus
from elasticmoe_sglang.worker.kv_share import device_at_rest, others_of, weights_of

logger = logging.getLogger(__name__)

_LOOK_S = 2.0


class KvBalancer:
    """Resizes the KV caches that lie in HMM memory; KV caches that SGLang allocated keep their size.

    Args:
        resize_s: seconds for a worker's scheduler to adopt a new capacity.
    """

    def __init__(self, config: ElasticConfig, channel: WorkerChannel, hmm: HmmClient, *, resize_s: float) -> None:
        self._config = config
        self._channel = channel
        self._hmm = hmm
        self._resize_s = resize_s
        self._shapes: dict[int, KvShape] = {}
        self._boot_chunks = 0
        self._chunks: dict[int, int] = {}
        self._resizes = 0
        self._busy = asyncio.Lock()

    def learn(self, rank: int, state: to_coordinator.KvState | None) -> None:
        """Note the KV cache that a worker reported when it had booted."""
        self.forget(rank)
        if state is not None:
            self._shapes[rank] = KvShape(
                token_bytes=state.token_bytes,
                page_tokens=state.page_tokens,
                chunk_bytes=state.chunk_bytes,
                cap_tokens=state.cap_tokens,
            )
            self._chunks[rank] = state.chunks
            self._boot_chunks = state.boot_chunks

    def expect(self, rank: int) -> int:
        """A hot standby boots for this rank: its KV counts from now on. Returns its chunks."""
        self.forget(rank)
        if not self._shapes:
            return 0
        self._shapes[rank] = next(iter(self._shapes.values()))
        self._chunks[rank] = self._boot_chunks
        return self._boot_chunks

    def resized(self, rank: int, chunks: int) -> None:
        """A rank that is not active has so many chunks now."""
        if rank in self._shapes:
            self._chunks[rank] = chunks

    def forget(self, rank: int) -> None:
        """The rank's worker has exited."""
        self._shapes.pop(rank, None)
        self._chunks.pop(rank, None)

    def sizes(self) -> dict[int, int]:
        """Chunks of HMM memory of each rank's KV cache."""
        return dict(self._chunks)

    def held(self) -> dict[int, int]:
        """Bytes of HMM memory of each rank's KV cache. May be called from any thread."""
        # Copying is atomic in CPython; ranks may come and go meanwhile.
        held, shapes = dict(self._chunks), dict(self._shapes)
        return {rank: chunks * shapes[rank].chunk_bytes for rank, chunks in held.items() if rank in shapes}

    def least_bytes(self) -> int:
        """The least KV a rank needs, of the rank that needs most."""
        return max((shape.least_chunks * shape.chunk_bytes for shape in self._shapes.values()), default=0)

    async def shrink_kv(self, plan: TransitionPlan, *, ranks: Sequence[int], joining: Sequence[int]) -> dict[int, int]:
        """Shrink survivors' KV so that old and new columns fit at the same time.

        Args:
            ranks: the active ranks after the change; joining: those of them that boot for it. Others keep their KV
                until the change has ended: retiring ranks and hot standbys.

        Returns:
            Chunks for each joining rank to start with.
        """
        async with self._busy:
            return await self._shrink_kv(plan, ranks, joining)

    async def _shrink_kv(self, plan: TransitionPlan, ranks: Sequence[int], joining: Sequence[int]) -> dict[int, int]:
        if not self._shapes:
            return {}
        shape = next(iter(self._shapes.values()))
        status = await asyncio.to_thread(self._hmm.status)
        wanted: dict[int, int] = {}
        for usage in status.devices:
            here = self._on(usage.device, ranks)
            if not here:
                continue
            device = KvDevice(
                budget=usage.budget,
                headroom=self._config.headroom_bytes(usage.budget),
                weights=weights_of(usage) + self._incoming(plan, usage, status, joining),
                others=others_of(usage),
                ranks=here,
                held=self._held_besides(usage.device, ranks),
            )
            wanted |= {rank: max(share, shape.least_chunks) for rank, share in device.targets(shape).items()}
        wanted = self._alike(wanted)
        staying = [rank for rank in wanted if rank in self._chunks and rank not in joining]
        await self._set_sizes(self._alike({rank: min(self._chunks[rank], wanted[rank]) for rank in staying}))
        return {rank: wanted[rank] for rank in joining if rank in wanted}

    async def grow_kv(self, whose: Callable[[], View | None], *, only_grow: bool = False) -> None:
        """Resize each rank's KV to its share of the device, while no column moves.

        Args:
            whose: returns the view, or None to change nothing; called once no other resize runs.
            only_grow: skip devices on which a rank would have to shrink.
        """
        async with self._busy:
            asked = whose()
            if asked is not None and self._shapes:
                await self._grow_kv(asked, only_grow)

    async def run(self, whose: Callable[[], View | None]) -> None:
        """Grow KV into memory that is released between changes, every few seconds until cancelled."""
        logged = ""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.grow_kv(whose, only_grow=True)
                logged = ""
            except (ElasticMoEError, OSError) as error:
                if logged != (logged := str(error)):
                    logger.warning("KV could not grow into all free memory: %s", error)

    async def _grow_kv(self, view: View, only_grow: bool) -> None:
        status = await asyncio.to_thread(self._hmm.status)
        model = status.model
        assert model is not None, "the HMM of serving ranks has no model"
        wanted: dict[int, int] = {}
        for usage in status.devices:
            here = [rank for rank in self._on(usage.device, view.ranks) if rank in self._shapes]
            if not here:
                continue
            device = device_at_rest(
                self._config,
                usage,
                model,
                granularity=status.granularity,
                ranks=here,
                placement=view.placement,
                held=self._held_besides(usage.device, view.ranks),
            )
            shares = {}
            for rank in here:
                shape = self._shapes[rank]
                shares[rank] = max(device.targets(shape)[rank], shape.least_chunks)
            if not only_grow or all(share >= self._chunks[rank] for rank, share in shares.items()):
                wanted |= shares
        wanted = self._alike(wanted)
        # Shrink before growing: ranks of one device share its memory.
        smaller = [rank for rank, chunks in wanted.items() if chunks < self._chunks[rank]]
        first = {mate for rank in smaller for mate in self._config.mates_of(rank)}
        await self._set_sizes({rank: chunks for rank, chunks in wanted.items() if rank in first})
        await self._set_sizes(wanted)

    async def _set_sizes(self, wanted: Mapping[int, int]) -> None:
        """Resize to these numbers of chunks, concurrently, on ranks that still have a worker. Raises WorkerError."""
        changed = {rank for rank, n in wanted.items() if rank in self._chunks and self._chunks[rank] != n}
        # The ranks of a replica change the capacity together, also those that have the memory.
        together = {mate for rank in changed for mate in self._config.mates_of(rank)}
        changes = {rank: n for rank, n in wanted.items() if rank in self._chunks and rank in together}
        results = await asyncio.gather(
            *(self._resize(rank, chunks) for rank, chunks in changes.items()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def drop(self, ranks: Iterable[int], *, settled: bool = False) -> None:
        """Release the HMM memory of ranks whose workers have exited; with `settled` only what is of no transaction."""
        for rank in ranks:
            self.forget(rank)
            found = await asyncio.to_thread(self._hmm.lookup, kind="kv", rank=rank)
            blocks = [block for block in found if block.txn is None or not settled]
            if blocks:
                await asyncio.to_thread(self._hmm.release, [block.block_id for block in blocks])

    async def _resize(self, rank: int, chunks: int) -> None:
        self._resizes += 1
        message = to_worker.ResizeKv(operation_id=f"kv-{rank}-{self._resizes}", chunks=chunks, timeout_s=self._resize_s)
        self._chunks[rank] = (await self._channel.ask(rank, message, to_worker.KvResized)).chunks

    def _alike(self, wanted: Mapping[int, int]) -> dict[int, int]:
        """The ranks of an attention replica hold parts of the same tokens: none has more chunks than another. Of a
        replica that is not here whole nothing changes."""
        whole = {rank: n for rank, n in wanted.items() if all(mate in wanted for mate in self._config.mates_of(rank))}
        return {rank: min(wanted[mate] for mate in self._config.mates_of(rank)) for rank in whole}

    def _on(self, device: int, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if self._config.device_of(rank) == device]

    def _is_on(self, usage: DeviceUsage, rank: int) -> bool:
        return self._config.device_of(rank) == usage.device

    def _held_besides(self, device: int, ranks: Sequence[int]) -> int:
        """Bytes of KV on the device of other ranks than these."""
        return sum(self._bytes(rank) for rank in self._on(device, self._chunks) if rank not in ranks)

    def _bytes(self, rank: int) -> int:
        return self._chunks[rank] * self._shapes[rank].chunk_bytes if rank in self._chunks else 0

    def _incoming(self, plan: TransitionPlan, usage: DeviceUsage, status: HmmStatus, joining: Sequence[int]) -> int:
        """Bytes that the plan allocates on the device before any are released there."""
        model = status.model
        assert model is not None, "the HMM of serving ranks has no model"
        here = {column for column, rank in plan.before.placement.held() if self._is_on(usage, rank)}
        new = len({move.column for move in plan.moves if self._is_on(usage, move.target)} - here)
        column, dense = (round_up(each, status.granularity) for each in (model.column_bytes, model.dense_bytes))
        shards = {self._config.shard_of(rank) for rank in self._on(usage.device, plan.after.ranks)}
        copies = (
            max(0, len(shards) - usage.by_kind.get("dense", 0) // max(1, dense))
            if self._on(usage.device, joining)
            else 0
        )
        return new * column + copies * dense
