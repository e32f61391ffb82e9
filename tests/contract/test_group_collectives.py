"""The collectives that the CPU platform supplies to SGLang's GroupCoordinator, between two processes over gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elasticmoe_patches.srt.distributed.parallel_state import all_gatherv, reduce_scatterv

WORLD = 2


def rows_of(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(rows * 3).reshape(rows, 3) + 100 * rank).to(dtype)


def check_collectives(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    group = SimpleNamespace(world_size=WORLD, rank_in_group=rank, device_group=dist.group.WORLD)
    for sizes in ([3, 1], [0, 4], [2, 2]):
        total = sum(rows_of(other, 4) for other in range(WORLD))
        start = sum(sizes[:rank])
        mine = rows_of(rank, 4)
        output = torch.empty(sizes[rank], 3)
        assert reduce_scatterv(group, mine, output=output, sizes=sizes) is output
        assert torch.equal(output, total[start : start + sizes[rank]])
        assert torch.equal(mine, rows_of(rank, 4)), "the input is not changed"
        everything = torch.cat([rows_of(other, size) for other, size in enumerate(sizes)])
        gathered = torch.empty(4, 3)
        assert all_gatherv(group, rows_of(rank, sizes[rank]), sizes=sizes, output=gathered) is gathered
        assert torch.equal(gathered, everything)
        first, second = all_gatherv(group, [rows_of(rank, sizes[rank]), rows_of(rank, sizes[rank], torch.int64)], sizes)
        assert torch.equal(first, everything) and torch.equal(second, everything.long())
    assert torch.equal(reduce_scatterv(group, rows_of(rank, 4)), total[2 * rank : 2 * rank + 2]), "equal parts"
    assert all_gatherv(group, rows_of(rank, 2)).shape == (4, 3)
    with pytest.raises(ValueError, match="5 rows"):
        reduce_scatterv(group, rows_of(rank, 5), sizes=[2, 2])
    dist.destroy_process_group()


def test_against_the_sum_and_the_concatenation(tmp_path: Path) -> None:
    mp.spawn(check_collectives, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
