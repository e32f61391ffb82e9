"""Requests that are sent again from the journal: what continues, and what ends with an error instead."""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches import journal
from elasticmoe_patches.worker.migration import Progress

pytestmark = pytest.mark.process


class Tokenizer:
    """SGLang's tokenizer manager with requests and without sockets: `sent` is what would go to the controller."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        self.sent: list[Any] = []
        self.manager: Any = object.__new__(TokenizerManager)
        self.manager.rid_to_state = {}
        self.manager.incremental_streaming_output = False
        self.manager.enable_lora = False
        monkeypatch.setattr(
            TokenizerManager, "_dispatch_to_scheduler", lambda _self, message: self.sent.append(message)
        )
        monkeypatch.setattr(TokenizerManager, "config_value", lambda _self, name: name)

    def add(self, rid: str, prompt: list[int] | None, **fields: Any) -> Any:
        """A running request's state."""
        from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
        from sglang.srt.managers.tokenizer_manager import ReqState
        from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
        from sglang.srt.sampling.sampling_params import SamplingParams

        stats = APIServerReqTimeStats()
        state = ReqState([], False, asyncio.Event(), GenerateReqInput(rid=rid, input_ids=prompt), stats)
        state.dispatched = True
        self.manager.rid_to_state[rid] = state
        message = TokenizedGenerateReqInput(
            rid=rid,
            input_text=None,
            input_ids=None if prompt is None else array("q", prompt),
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=SamplingParams(),
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            time_stats=stats,
            **{"input_embeds": None, **fields},
        )

        async def remember() -> None:
            journal.remember(self.manager, message)

        asyncio.run(remember())
        return state

    def resend(self, *rids: str, suspect: bool = True) -> int:
        return journal.send_again(self.manager, set(rids), suspect=suspect)

    def progress(self) -> list[tuple[str, int]]:
        """Request id and number of tokens of each message that was sent."""
        from sglang.srt.managers.io_struct import unwrap_from_pickle

        sent = [(message.request.rid, unwrap_from_pickle(message.progress)) for message in self.sent]
        assert all(isinstance(progress, Progress) for _, progress in sent)
        return [(rid, len(progress.output_ids)) for rid, progress in sent]


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    return Tokenizer(monkeypatch)


def ending(state: Any) -> dict[str, Any]:
    assert state.finished and state.event.is_set()
    reason: dict[str, Any] = state.out_list[-1]["meta_info"]["finish_reason"]
    return reason


def test_a_request_that_cannot_be_sent_again_ends_with_an_error_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    """One with input embeddings has no token ids; the journal cannot continue it."""
    embeds = tokenizer.add("embeds", None, input_embeds=[[0.0, 1.0]])
    tokenizer.add("ids", [5, 6, 7])
    assert tokenizer.resend("embeds", "ids") == 1
    assert tokenizer.progress() == [("ids", 0)]
    assert ending(embeds) == {"type": "abort", "status_code": 500, "message": journal.NO_TOKEN_IDS}
    assert list(tokenizer.manager.rid_to_state) == ["ids"]


def test_a_request_whose_ranks_die_twice_without_another_token_is_not_sent_a_third_time(tokenizer: Tokenizer) -> None:
    """It may be what ends them: each resend could cost another rank."""
    state = tokenizer.add("poison", [5, 6, 7])
    state.output_ids.extend([1, 2])
    assert [tokenizer.resend("poison") for _ in range(3)] == [1, 1, 0]
    assert tokenizer.progress() == [("poison", 2), ("poison", 2)]
    reason = ending(state)
    assert reason["status_code"] == 500 and "2 times" in reason["message"]
    assert state.out_list[-1]["output_ids"] == [1, 2]
    assert tokenizer.resend("poison") == 0, "it has ended"


def test_a_request_that_goes_on_after_each_death_is_sent_again_each_time(tokenizer: Tokenizer) -> None:
    state = tokenizer.add("innocent", [5, 6, 7])
    for token in range(5):
        assert tokenizer.resend("innocent") == 1
        state.output_ids.append(token)
    assert tokenizer.progress() == [("innocent", tokens) for tokens in range(5)]
    assert not state.finished


def test_a_request_that_ends_ranks_a_token_at_a_time_is_stopped_too(tokenizer: Tokenizer) -> None:
    state = tokenizer.add("slow poison", [5, 6, 7])
    for token in range(journal.MOST_RESENDS):
        assert tokenizer.resend("slow poison") == 1
        state.output_ids.append(token)
    assert tokenizer.resend("slow poison") == 0
    assert f"{journal.MOST_RESENDS} times" in ending(state)["message"]


def test_a_rank_that_somebody_killed_is_no_requests_doing(tokenizer: Tokenizer) -> None:
    tokenizer.add("a", [5, 6, 7])
    for _ in range(40):
        assert tokenizer.resend("a", suspect=False) == 1
    assert [tokenizer.resend("a") for _ in range(4)] == [1, 1, 0, 0]


def test_logprobs_of_the_prompt_are_not_computed_again() -> None:
    """They were sent; SGLang would count the output with the prompt, fail an assertion and end the rank."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    req: Any = object.__new__(Req)
    req.return_logprob, req.grammar, req.sampling_params = True, None, SamplingParams()
    names = [f"{kind}_{part}" for kind in KINDS for part in ("val", "idx")]
    req.logprob = SimpleNamespace(**dict.fromkeys(names))
    Progress(output_ids=(4, 5), carried={}, aborted=False, unseen_logprobs=2, sent_again=True).apply(req)
    assert all(getattr(req.logprob, f"input_{kind}_{part}") == [] for kind in INPUTS for part in ("val", "idx"))
    assert req.logprob.output_token_logprobs_idx == [4, 5]


INPUTS = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
KINDS = tuple(f"{side}_{kind}" for side in ("input", "output") for kind in INPUTS)
