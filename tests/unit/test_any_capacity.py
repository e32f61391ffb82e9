"""The hooks by which a capacity need not divide experts, heads or the tokens of a prefill step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.srt.arg_groups.parallel_hook import after_handle_data_parallelism
from elasticmoe_patches.srt.configs.update_config import keep_config
from elasticmoe_patches.srt.eplb.expert_location import around_init_common
from elasticmoe_sglang.errors import UnsupportedFeature

pytestmark = pytest.mark.process


EXPERTS = 16


class Parallel(SimpleNamespace):
    """What SGLang's parallel context has here."""

    def __init__(self, **sizes: Any) -> None:
        defaults = {"ep_size": 3, "attn_tp_size": 1, "moe_tp_size": 1, "elastic_ep_initial_size": None}
        super().__init__(**{**defaults, **sizes})


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's `_init_common`, unhooked, for a model of 16 experts on 3 ranks; `redundant` adds physical experts."""
    from sglang.srt.eplb import expert_location

    found = SimpleNamespace(num_logical_experts=EXPERTS, num_layers=2, num_groups=None)
    moe = SimpleNamespace(ep_num_redundant_experts=0, ep_join_mode=None)
    monkeypatch.setattr(expert_location, "get_parallel", Parallel)
    monkeypatch.setattr(expert_location, "get_exec", lambda: SimpleNamespace(moe=moe))
    monkeypatch.setattr(
        expert_location.ModelConfigForExpertLocation, "from_model_config", lambda config: found if config else None
    )
    return SimpleNamespace(original=expert_location.ExpertLocationMetadata._init_common, moe=moe)


def test_sglang_itself_wants_equal_shares(sizes: Any) -> None:
    """When this fails, the hook can go."""
    with pytest.raises(AssertionError):
        sizes.original("model")


def test_all_experts_are_one_share(sizes: Any) -> None:
    from sglang.srt.eplb import expert_location

    common = around_init_common(sizes.original, "model")
    assert (common["num_physical_experts"], common["num_local_physical_experts"], common["ep_size"]) == (16, 16, 1)
    assert expert_location.get_parallel is Parallel, "only that one call sees one share"


def test_a_model_without_experts_has_no_map(sizes: Any) -> None:
    assert around_init_common(sizes.original, None) is None


def test_experts_that_are_no_columns_are_refused(sizes: Any) -> None:
    sizes.moe.ep_num_redundant_experts = 2
    with pytest.raises(UnsupportedFeature, match=r"16 experts out as .*18.*redundant"):
        around_init_common(sizes.original, "model")


def test_a_models_shapes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_parallel", Parallel)
    config = SimpleNamespace(num_attention_heads=8)
    assert keep_config(config, None, 3) is config and vars(config) == {"num_attention_heads": 8}


@pytest.mark.parametrize("name", ["attn_tp_size", "moe_tp_size"])
def test_split_tensors_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_parallel", lambda: Parallel(**{name: 2}))
    with pytest.raises(UnsupportedFeature, match=f"'{name}': 2"):
        keep_config(SimpleNamespace(), None, 4)


@pytest.mark.parametrize(
    ("share", "page", "rounded"),
    [(1365, 16, 1360), (1360, 16, 1360), (1365, 1, 1365), (32, 64, 64), (-1, 16, -1), (0, 16, 0)],
)
def test_a_share_of_a_chunk_is_whole_pages(share: int, page: int, rounded: int) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="dummy", chunked_prefill_size=share, page_size=page)
    after_handle_data_parallelism(None, args)
    assert resolving_view(args).chunked_prefill_size == rounded
