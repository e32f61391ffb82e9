"""What stands in for SGLang's exchange of batch sizes fills the same fields as SGLang's own."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticmoe_patches.worker import batch_sizes

FIELDS = (
    "global_num_tokens", "global_num_tokens_for_logprob", "can_run_decode_cuda_graph", "is_extend_in_batch",
    "can_run_prefill_cuda_graph", "prefill_cuda_graph_max_prefix_len", "can_run_draft_cuda_graph",
)  # fmt: skip
OLD = version("sglang") == "0.5.21"
SINCE_0_5_23 = () if OLD else ("any_health_check", "global_attention_pairs")
LOCAL = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(0, 4096),
        "num_tokens_for_logprob": st.integers(0, 64),
        "can_run_decode_cuda_graph": st.booleans(),
        "can_run_draft_cuda_graph": st.booleans(),
        "can_run_prefill_cuda_graph": st.booleans(),
        "is_extend_in_batch": st.booleans(),
        "local_can_run_tbo": st.booleans(),
        "local_forward_mode": st.integers(1, 6),
        "prefill_cuda_graph_max_prefix_len": st.integers(0, 4096),
        **({} if OLD else {"is_health_check": st.booleans(), "attention_pairs": st.integers(0, 1 << 20)}),
    }
)


class Group:
    """Every active rank's row, as a gather over them would deliver it."""

    def __init__(self, rank: int, rows: dict[int, torch.Tensor]) -> None:
        self._rank = rank
        self._rows = rows
        self.gathers = 0

    def rank(self) -> int:
        return self._rank

    def gather(self, out: torch.Tensor, mine: torch.Tensor, group: Group) -> None:
        assert group is self and torch.equal(mine, self._rows[self._rank])
        self.gathers += 1
        view = out.view(-1, mine.numel())
        for rank, row in self._rows.items():
            view[rank] = row


def info(local: dict[str, Any], size: int) -> Any:
    from sglang.srt.managers.scheduler_components.dp_attn import MLPSyncBatchInfo

    return MLPSyncBatchInfo(**{"dp_size" if OLD else "num_dp_ranks": size}, tp_size=1, cp_size=1, **local)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(locals_=st.dictionaries(st.integers(0, 5), LOCAL, min_size=1), spare=st.integers(0, 2), data=st.data())
def test_the_same_as_sglangs_own(
    monkeypatch: pytest.MonkeyPatch, locals_: dict[int, dict[str, Any]], spare: int, data: st.DataObject
) -> None:
    from sglang.srt.distributed import utils
    from sglang.srt.managers.scheduler_components import dp_attn

    size = max(locals_) + 1 + spare
    me = data.draw(st.sampled_from(sorted(locals_)))
    rows = {rank: info(local, size)._get_local_tensor(device="cpu") for rank, local in locals_.items()}
    group = Group(me, rows)
    parallel = SimpleNamespace(tp_group=SimpleNamespace(active_ranks_cpu=torch.ones(size, dtype=torch.int64)))
    monkeypatch.setattr(dp_attn, "get_parallel", lambda: parallel)
    monkeypatch.setattr(dp_attn, "all_gather_single" if OLD else "exchange_sync_rows", group.gather)
    monkeypatch.setattr(utils, "all_gather_single", group.gather)
    theirs, ours = info(locals_[me], size), info(locals_[me], size)
    theirs.all_gather(device="cpu", group=group)
    alone = set(locals_) == {me}
    batch_sizes.share_batch_info(ours, group, alone=alone)
    assert group.gathers == (1 if alone else 2)
    for name in (*FIELDS, *SINCE_0_5_23):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert torch.equal(ours.tp0_info_cpu, theirs.tp0_info_cpu)


def test_sizes_are_uploaded_when_they_change() -> None:
    sizes = batch_sizes.UploadedSizes()
    first = sizes.tensor("tokens", [3, 0], "cpu", pinned=False)
    assert sizes.tensor("tokens", [3, 0], "cpu", pinned=False) is first
    assert sizes.tensor("logprobs", [3, 0], "cpu", pinned=False) is not first
    assert sizes.tensor("tokens", [4, 0], "cpu", pinned=False).tolist() == [4, 0]
    assert first.tolist() == [3, 0]
