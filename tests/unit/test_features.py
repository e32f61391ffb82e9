"""Every feature of the table is kept, and moved and killed by an end-to-end test, or refused with its sentence."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches import featuredocs
from elasticmoe_patches.features import FEATURES, LAUNCH_REFUSALS, pin_refusal, refusal, seed_refusal
from elasticmoe_sglang.config import ElasticConfig
from tests.helpers.corpus import FEATURE_NAMES

REFUSED = [feature for feature in FEATURES if feature.refused]
FIELDS = [(name, feature.note) for feature in REFUSED for name in feature.fields]
VALUES: dict[str, Any] = {"session_params": {"id": "a"}, "max_thinking_tokens": 0, "lora_path": "adapter"}
"""What a client might give; otherwise true."""


def request(**fields: Any) -> Any:
    return SimpleNamespace(**{"sampling_params": {"temperature": 0}, **fields})


def test_a_kept_feature_has_requests_that_tests_move_and_kill() -> None:
    kept = [feature for feature in FEATURES if not feature.refused]
    assert all(feature.cases for feature in kept)
    assert {case for feature in kept for case in feature.cases} == set(FEATURE_NAMES)
    assert not any(feature.cases for feature in REFUSED)


def test_a_refused_feature_is_refused_somewhere_and_says_why() -> None:
    for feature in REFUSED:
        assert feature.fields or feature.flags or feature.sampling, feature.name
        assert feature.died == feature.moved == "refused" and feature.note


@pytest.mark.parametrize(("name", "note"), FIELDS, ids=[name for name, _ in FIELDS])
def test_a_request_with_a_refused_field_is_refused_with_its_reason(name: str, note: str) -> None:
    assert refusal(request(**{name: VALUES.get(name, True)})) == f"{name} is not supported by an elastic server: {note}"
    for empty in (None, False, [], "", {}):
        assert refusal(request(**{name: empty})) is None


def test_a_beam_is_refused_and_a_width_of_one_is_none() -> None:
    assert "beam_width is not supported" in str(refusal(request(sampling_params={"beam_width": 2})))
    assert refusal(request(sampling_params={"beam_width": 1})) is None
    assert refusal(request(sampling_params=None)) is None


def test_a_pin_to_a_rank_that_is_not_active_is_refused() -> None:
    assert pin_refusal(None, (0, 2)) is None and pin_refusal(2, (0, 2)) is None
    assert pin_refusal(1, (0,), "replicas") == "routed_dp_rank 1 is not active; the active replicas are 0"
    assert pin_refusal(1, (2, 0)) == "routed_dp_rank 1 is not active; the active ranks are 0, 2"


def test_a_seed_is_refused_where_it_would_have_no_effect() -> None:
    assert seed_refusal({"temperature": 1.0}, "flashinfer") is None
    assert seed_refusal({"sampling_seed": 3, "temperature": 0}, "flashinfer") is None
    assert seed_refusal({"sampling_seed": 3}, "pytorch") is None
    assert re.search(
        "no effect with --sampling-backend flashinfer", str(seed_refusal({"sampling_seed": 3}, "flashinfer"))
    )
    assert re.search("n > 1 would give equal answers", str(seed_refusal({"sampling_seed": 3, "n": 2}, "pytorch")))


def test_every_flag_of_a_refused_feature_ends_the_launch() -> None:
    assert set(LAUNCH_REFUSALS) == {flag for feature in FEATURES for flag in feature.flags}
    assert {"lora_paths", "enable_return_hidden_states", "return_hidden_states_mode"} <= set(LAUNCH_REFUSALS)


REPOSITORY = Path(__file__).parents[2]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_the_tables_in_the_documents_are_those_in_the_code() -> None:
    assert featuredocs.main(["--check", str(REPOSITORY / "docs" / "operations.md")]) == 0


def test_the_tables_are_written_where_their_marks_are(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- features -->\nold\n<!-- end of features -->\n<!-- endpoints -->\n<!-- end of endpoints -->\n"
    )
    assert featuredocs.main(["--check", str(page)]) == 1
    assert featuredocs.main([str(page)]) == 0
    assert featuredocs.main(["--check", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("a\n") and "`/pause_generation`" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        featuredocs.main([str(page)])


def test_every_row_names_tests_that_exist() -> None:
    for row in featuredocs.render("features").splitlines()[2:]:
        named = NAMED.findall(row)
        assert named, row
        for file, test in named:
            [path] = (REPOSITORY / "tests").rglob(file)
            assert f"def {test}(" in path.read_text(), row


@pytest.mark.process
def test_admission_refuses_before_a_request_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook looks at the request, at its sampling parameters and at the ranks that are active."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    from elasticmoe_patches import services
    from elasticmoe_patches.srt.managers.tokenizer_manager import before_validate_one_request
    from elasticmoe_sglang.errors import UnsupportedFeature

    exec_ = SimpleNamespace(kernel=SimpleNamespace(sampling_backend="flashinfer"))
    control = SimpleNamespace(read_membership=lambda: SimpleNamespace(ranks=(0, 2)))
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: exec_)
    runtime = SimpleNamespace(config=ElasticConfig(ep_size=2, max_ep_size=4))
    monkeypatch.setattr(services, "services", lambda: SimpleNamespace(control=control, runtime=runtime))

    def admit(sampling: dict[str, Any] | None = None, **fields: Any) -> None:
        asked = GenerateReqInput(input_ids=[5, 6], sampling_params=sampling or {}, **fields)
        asked.normalize_batch_and_arguments()
        before_validate_one_request(None, asked, [5, 6])

    admit()
    admit(routed_dp_rank=2, return_logprob=True, extra_key="a")
    for words, refused in (
        ("routed_dp_rank 1 is not active; the active ranks are 0, 2", {"routed_dp_rank": 1}),
        ("image_data is not supported", {"image_data": "file.png"}),
        ("session_params is not supported", {"session_params": {"id": "a"}}),
        ("no effect with --sampling-backend", {"sampling": {"sampling_seed": 4}}),
        ("beam_width is not supported", {"sampling": {"beam_width": 4}}),
    ):
        with pytest.raises(UnsupportedFeature, match=words):
            admit(**refused)
    # SGLang's data-parallel ranks are replicas; ranks 0, 1, 4 and 5 are the first and the third.
    runtime.config = ElasticConfig(ep_size=2, max_ep_size=6, attention_tp=2)
    control.read_membership = lambda: SimpleNamespace(ranks=(0, 1, 4, 5))
    admit(routed_dp_rank=2)
    with pytest.raises(UnsupportedFeature, match="routed_dp_rank 1 is not active; the active replicas are 0, 2"):
        admit(routed_dp_rank=1)
