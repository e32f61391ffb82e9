"""What status says of ranks without a process: a standby is counted when it is ready, not before."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.migration import snapshot
from elasticmoe_sglang.wire.to_coordinator import Hello
from elasticmoe_sglang.wire.to_imm import Population


@pytest.mark.parametrize(
    ("standbys", "starting", "expected"),
    [
        ([], [], [("inactive", None), ("inactive", None)]),
        ([], [21], [("starting", 21), ("inactive", None)]),
        ([22], [21], [("standby", 22), ("starting", 21)]),
        ([22, 23], [], [("standby", 22), ("standby", 23)]),
        ([11, 22], [10], [("standby", 22), ("inactive", None)]),
    ],
)
def test_a_starting_standby_is_no_standby_yet(
    standbys: list[int], starting: list[int], expected: list[tuple[str, int | None]]
) -> None:
    infos = snapshot(
        ElasticConfig(ep_size=2, max_ep_size=4),
        active=(0, 1),
        pids={0: 10, 1: 11},
        population=Population(ranks={0: 10, 1: 11}, standbys=standbys, starting=starting),
        joining=(),
        retiring=(),
        hot=(),
        booting=(),
        hellos={},
        first_uses={},
        kv=lambda rank: (0, 0, 0),
        kv_bytes={},
    )
    assert [(info.state.value, info.pid) for info in infos[:2]] == [("active", 10), ("active", 11)]
    assert [(info.state.value, info.pid) for info in infos[2:]] == expected


def test_kernels_loaded_while_serving_are_counted_by_rank() -> None:
    hello = Hello(rank=1, columns=8, checkpoint_bytes=0, pulled_bytes=0, boot_s=1.0, load_s=0.5)
    infos = snapshot(
        ElasticConfig(ep_size=2, max_ep_size=3),
        active=(0, 1),
        pids={0: 10, 1: 11},
        population=Population(ranks={0: 10, 1: 11}, standbys=[], starting=[]),
        joining=(),
        retiring=(),
        hot=(),
        booting=(),
        hellos={0: replace(hello, rank=0), 1: hello},
        first_uses={1: 2},
        kv=lambda rank: (0, 0, 0),
        kv_bytes={},
    )
    assert [info.first_uses for info in infos] == [0, 2, None]
