"""The coordinator's `MemoryPort` over the real HMM."""

from __future__ import annotations

from elasticmoe_sglang.coordinator.views import DeviceMemory, MemoryStatus
from elasticmoe_sglang.hmm.client import AsyncHmmClient


class HmmMemory:
    """Args:
    client: connected to the server's HMM.
    """

    def __init__(self, client: AsyncHmmClient) -> None:
        self._client = client

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
            column_bytes=model.column_bytes if model else None,
            dense_bytes=model.dense_bytes if model else None,
        )

    async def begin(self, operation_id: str) -> str:
        return await self._client.begin(operation_id)

    async def commit(self, txn: str) -> None:
        await self._client.commit(txn)

    async def rollback(self, txn: str) -> None:
        await self._client.rollback(txn)
