"""The coordinator's `MemoryPort` over the real HMM."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.status import DeviceMemory, MemoryStatus
from elasticmoe_sglang.errors import HmmUnavailable, TransactionError
from elasticmoe_sglang.hmm.client import AsyncHmmClient, HmmClient
from elasticmoe_sglang.hmm.vmm.base import round_up
from elasticmoe_sglang.planner import Placement

logger = logging.getLogger(__name__)


class HmmMemory:
    """Args:
    client: connected to the server's HMM.
    """

    def __init__(self, client: AsyncHmmClient) -> None:
        self._client = client
        self._instances: dict[str, str | None] = {}  # of open transactions: the HMM that has them

    async def status(self) -> MemoryStatus:
        status = await self._client.status()
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
            # As the ledger charges them.
            column_bytes=round_up(model.column_bytes, status.granularity) if model else None,
            dense_bytes=round_up(model.dense_bytes, status.granularity) if model else None,
        )

    async def begin(self, operation_id: str) -> str:
        txn = await self._client.begin(operation_id)
        self._instances[txn] = self._client.attached_to()
        return txn

    async def commit(self, txn: str) -> Sequence[int]:
        del self._instances[txn]
        return (await self._client.commit(txn)).peak_bytes

    async def rollback(self, txn: str) -> Sequence[int]:
        instance = self._instances.pop(txn)
        try:
            return (await self._client.rollback(txn)).peak_bytes
        except (HmmUnavailable, TransactionError) as error:
            # With its HMM the transaction has ended, and nobody else has its memory: the ranks have unmapped it.
            if instance is not None and self._client.attached_to() == instance:
                raise
            logger.warning("transaction %s went with its HMM: %s", txn, error)
            return ()


def drop_kv(client: HmmClient) -> int:
    """Before a server's first rank boots: give back the KV of an earlier server on this HMM. Returns the blocks."""
    blocks = client.lookup(kind="kv")
    if blocks:
        client.release([block.block_id for block in blocks])
    return len(blocks)


async def release_leftovers(
    client: AsyncHmmClient, placement: Placement, ranks: Collection[int], config: ElasticConfig
) -> int:
    """Give back what nobody uses: weights of an earlier server or change, and KV of ranks that are not active.

    Returns:
        Number of blocks given back.
    """
    columns = [
        block.block_id
        for block in await client.lookup(kind="column")
        if block.column is not None and config.device_of(placement.owners[block.column]) != block.device
    ]
    devices = {config.device_of(rank) for rank in ranks}
    dense = [block.block_id for block in await client.lookup(kind="dense") if block.device not in devices]
    kv = [block.block_id for block in await client.lookup(kind="kv") if block.rank not in ranks]
    leftovers = [*columns, *dense, *kv]
    if leftovers:
        await client.release(leftovers)
    return len(leftovers)
