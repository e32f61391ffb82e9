"""What a device has for KV caches while no column moves; computed by a rank that starts and by the coordinator."""

from __future__ import annotations

from collections.abc import Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.hmm.vmm.base import round_up
from elasticmoe_sglang.planner import KvDevice, Placement
from elasticmoe_sglang.wire.to_hmm import DeviceUsage, ModelSpec


def weights_of(usage: DeviceUsage) -> int:
    """Bytes of the device's dense and column blocks now."""
    return usage.by_kind.get("dense", 0) + usage.by_kind.get("column", 0)


def others_of(usage: DeviceUsage) -> int:
    """Bytes of what is neither weights nor KV."""
    return usage.used - weights_of(usage) - usage.by_kind.get("kv", 0)


def device_at_rest(
    config: ElasticConfig,
    usage: DeviceUsage,
    model: ModelSpec,
    *,
    granularity: int,
    ranks: Sequence[int],
    placement: Placement,
    held: int = 0,
) -> KvDevice:
    """The device with the weights of this placement, whatever is allocated there at the moment.

    Args:
        ranks: those of the device, which share the rest.
        placement: of all ranks. Ranks of one device have a column's memory there in common.
        held: bytes of KV of other ranks there.
    """
    columns = len({column for column, rank in placement.held() if config.device_of(rank) == usage.device})
    shards = len({config.shard_of(rank) for rank in ranks})
    return KvDevice(
        budget=usage.budget,
        headroom=config.headroom_bytes(usage.budget),
        weights=shards * round_up(model.dense_bytes, granularity) + columns * round_up(model.column_bytes, granularity),
        others=others_of(usage),
        ranks=ranks,
        held=held,
    )
