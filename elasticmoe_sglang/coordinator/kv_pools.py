"""How much KV each seat has, and the ways to change it: all of a device that weights and headroom leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.seat_lines import SeatLines
from elasticmoe_sglang.hmm.client import AsyncHmmClient
from elasticmoe_sglang.hmm.protocol import DeviceUsage, HmmStatus
from elasticmoe_sglang.hmm.vmm.base import round_up
from elasticmoe_sglang.planner import ColumnMove, KvDevice, KvShape, Placement
from elasticmoe_sglang.seats import messages as sm
from elasticmoe_sglang.seats.kv_room import device_at_rest, others_of, weights_of

logger = logging.getLogger(__name__)


class Moving(Protocol):
    """A plan by which columns move: of a change, or of a recovery."""

    @property
    def moves(self) -> Sequence[ColumnMove]: ...


class KvPools:
    """Knows the seats whose KV cache lies in HMM memory; others are left alone.

    Args:
        resize_s: for a seat's scheduler to take over a capacity.
    """

    def __init__(self, config: ElasticConfig, lines: SeatLines, hmm: AsyncHmmClient, *, resize_s: float) -> None:
        self._config = config
        self._lines = lines
        self._hmm = hmm
        self._resize_s = resize_s
        self._shapes: dict[int, KvShape] = {}
        self._chunks: dict[int, int] = {}
        self._numbers = 0
        self._busy = asyncio.Lock()

    def learn(self, seat: int, state: sm.KvState | None) -> None:
        """What a seat's process said when it had booted."""
        self.forget(seat)
        if state is not None:
            self._shapes[seat] = KvShape(
                token_bytes=state.token_bytes,
                page_tokens=state.page_tokens,
                chunk_bytes=state.chunk_bytes,
                cap_tokens=state.cap_tokens,
            )
            self._chunks[seat] = state.chunks

    def forget(self, seat: int) -> None:
        """The seat's process has ended."""
        self._shapes.pop(seat, None)
        self._chunks.pop(seat, None)

    def sizes(self) -> dict[int, int]:
        """Chunks of each seat, as far as they are in HMM memory."""
        return dict(self._chunks)

    def held(self) -> dict[int, int]:
        """Bytes of each seat."""
        return {seat: self._bytes(seat) for seat in self._chunks}

    def least_bytes(self) -> int:
        """What a seat cannot do without, on the seat that needs most."""
        return max((shape.least_chunks * shape.chunk_bytes for shape in self._shapes.values()), default=0)

    async def make_room(
        self, plan: Moving, *, seats: Sequence[int], joining: Sequence[int], leaving: Sequence[int] = ()
    ) -> dict[int, int]:
        """Shrink the seats that stay, so that old and new columns fit together; chunks for each joiner to begin with.

        Args:
            seats: who is there afterwards, joiners too.
            joining: those of them that boot now. leaving: seats that keep their KV for the time being.
        """
        async with self._busy:
            return await self._make_room(plan, seats, joining, leaving)

    async def _make_room(
        self, plan: Moving, seats: Sequence[int], joining: Sequence[int], leaving: Sequence[int]
    ) -> dict[int, int]:
        if not self._shapes:
            return {}
        shape = next(iter(self._shapes.values()))
        status = await self._hmm.status()
        wanted: dict[int, int] = {}
        for usage in status.devices:
            here = self._on(usage.device, seats)
            if not here:
                continue
            device = KvDevice(
                budget=usage.budget,
                headroom=self._config.headroom_bytes(usage.budget),
                weights=weights_of(usage) + self._incoming(plan, usage, status, joining),
                others=others_of(usage),
                seats=here,
                held=sum(self._bytes(seat) for seat in self._on(usage.device, leaving)),
            )
            wanted |= {seat: max(share, shape.least_chunks) for seat, share in device.targets(shape).items()}
        staying = [seat for seat in wanted if seat in self._chunks and seat not in joining]
        await self._set_sizes({seat: min(self._chunks[seat], wanted[seat]) for seat in staying})
        return {seat: wanted[seat] for seat in joining if seat in wanted}

    async def fill(
        self, whose: Callable[[], tuple[Sequence[int], Placement] | None], *, only_grow: bool = False
    ) -> None:
        """Give each seat all that its device has left while no column moves.

        Args:
            whose: the occupied seats and the placement, asked when nothing else changes KV; None to leave it be.
            only_grow: leave devices alone on which a seat would have to give something up.
        """
        async with self._busy:
            asked = whose()
            if asked is not None and self._shapes:
                await self._fill(*asked, only_grow)

    async def _fill(self, seats: Sequence[int], placement: Placement, only_grow: bool) -> None:
        status = await self._hmm.status()
        model = status.model
        assert model is not None, "seats serve and the HMM has no model"
        wanted: dict[int, int] = {}
        for usage in status.devices:
            here = [seat for seat in self._on(usage.device, seats) if seat in self._shapes]
            if not here:
                continue
            device = device_at_rest(
                self._config,
                usage,
                model,
                granularity=status.granularity,
                seats=here,
                owners=placement.owners,
            )
            shares = {}
            for seat in here:
                shape = self._shapes[seat]
                shares[seat] = max(device.targets(shape)[seat], shape.least_chunks)
            if not only_grow or all(share >= self._chunks[seat] for seat, share in shares.items()):
                wanted |= shares
        # Who gives goes first: seats of one device share what it has.
        await self._set_sizes({seat: chunks for seat, chunks in wanted.items() if chunks < self._chunks[seat]})
        await self._set_sizes(wanted)

    async def _set_sizes(self, wanted: Mapping[int, int]) -> None:
        """Have the seats that are still there take over these numbers of chunks, all together. Raises SeatError."""
        changes = {seat: n for seat, n in wanted.items() if seat in self._chunks and self._chunks[seat] != n}
        results = await asyncio.gather(
            *(self._resize(seat, chunks) for seat, chunks in changes.items()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def drop(self, seats: Iterable[int]) -> None:
        """Give back what lies in the HMM for seats whose processes have ended."""
        for seat in seats:
            self.forget(seat)
            blocks = await self._hmm.lookup(kind="kv", seat=seat)
            if blocks:
                await self._hmm.release([block.block_id for block in blocks])

    async def _resize(self, seat: int, chunks: int) -> None:
        self._numbers += 1
        operation = f"kv-{seat}-{self._numbers}"
        await self._lines.tell_seat(seat, sm.ResizeKv(operation_id=operation, chunks=chunks, timeout_s=self._resize_s))
        done = await self._lines.expect(sm.KvResized, seat=seat, operation_id=operation)
        self._chunks[seat] = done.chunks

    def _on(self, device: int, seats: Iterable[int]) -> list[int]:
        return [seat for seat in seats if self._config.device_of(seat) == device]

    def _bytes(self, seat: int) -> int:
        return self._chunks[seat] * self._shapes[seat].chunk_bytes if seat in self._chunks else 0

    def _incoming(self, plan: Moving, usage: DeviceUsage, status: HmmStatus, joining: Sequence[int]) -> int:
        """Bytes that will be allocated on the device before anything is given back there."""
        model = status.model
        assert model is not None, "seats serve and the HMM has no model"
        device_of = self._config.device_of
        new = sum(
            device_of(move.target) == usage.device and device_of(move.source) != usage.device for move in plan.moves
        )
        dense = bool(self._on(usage.device, joining)) and not usage.by_kind.get("dense")
        return new * round_up(model.column_bytes, status.granularity) + dense * round_up(
            model.dense_bytes, status.granularity
        )
