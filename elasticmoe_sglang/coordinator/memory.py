"""The coordinator's `MemoryPort` on the HMM, and releasing memory that nothing uses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.status import DeviceMemory, MemoryStatus
from elasticmoe_sglang.errors import HmmUnavailable, TransactionError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm.base import round_up
from elasticmoe_sglang.planner import View

logger = logging.getLogger(__name__)


class HmmMemory:
    """Args:
    client: of the server's HMM; its calls run in threads.
    """

    def __init__(self, client: HmmClient) -> None:
        self._client = client
        self._instances: dict[str, str | None] = {}  # open transaction -> HMM instance

    async def status(self) -> MemoryStatus:
        status = await asyncio.to_thread(self._client.status)
        devices = [
            DeviceMemory(
                device=device.device,
                budget=device.budget,
                used=device.used,
                peak=device.peak,
                by_kind=dict(device.by_kind),
            )
            for device in status.devices
        ]
        model = status.model
        return MemoryStatus(
            available=True,
            endpoint=self._client.endpoint,
            pid=status.pid,
            devices=devices,
            # Rounded up, as the ledger counts them.
            column_bytes=round_up(model.column_bytes, status.granularity) if model else None,
            dense_bytes=round_up(model.dense_bytes, status.granularity) if model else None,
        )

    async def begin(self, operation_id: str) -> str:
        txn = await asyncio.to_thread(self._client.begin, operation_id)
        self._instances[txn] = self._client.attached_to()
        return txn

    async def commit(self, txn: str) -> Sequence[int]:
        peaks = (await asyncio.to_thread(self._client.commit, txn)).peak_bytes
        self._instances.pop(txn, None)
        return peaks

    async def rollback(self, txn: str) -> Sequence[int]:
        instance = self._instances.get(txn)
        try:
            peaks = (await asyncio.to_thread(self._client.rollback, txn)).peak_bytes
            self._instances.pop(txn, None)
            return peaks
        except (HmmUnavailable, TransactionError) as error:
            # The transaction ended with its HMM, and its memory is free: the workers have unmapped it already.
            if instance is not None and self._client.attached_to() == instance:
                raise
            self._instances.pop(txn, None)
            logger.warning("transaction %s ended with its HMM: %s", txn, error)
            return ()


def drop_kv(client: HmmClient) -> int:
    """Release the KV that an earlier server left in this HMM, before the first worker boots. Returns the number of
    blocks."""
    blocks = client.lookup(kind="kv")
    if blocks:
        client.release([block.block_id for block in blocks])
    return len(blocks)


def release_leftovers(client: HmmClient, view: View, config: ElasticConfig, *, hot: Collection[int] = ()) -> int:
    """Release what no rank uses: weights of an earlier server or change, and KV of inactive ranks.

    Args:
        hot: inactive ranks with a hot standby, which has KV and maps its device's dense block.

    Returns:
        Number of released blocks.
    """
    placed = {(column, config.device_of(rank)) for column, rank in view.placement.held()}
    columns = [block.block_id for block in client.lookup(kind="column") if (block.column, block.device) not in placed]
    staying = (*view.ranks, *hot)
    used = {(config.device_of(rank), config.shard_of(rank)) for rank in staying}
    dense = [block.block_id for block in client.lookup(kind="dense") if (block.device, block.shard) not in used]
    kv = [block.block_id for block in client.lookup(kind="kv") if block.rank not in staying]
    leftovers = [*columns, *dense, *kv]
    if leftovers:
        client.release(leftovers)
    return len(leftovers)
