"""What the main process knows of every running request, so that another rank can continue it when its rank has died.

The tokenizer sends each request and receives each of its tokens; together they are what another rank needs to continue
where the client's stream stopped. The journal is in memory only and ends with the server.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elasticmoe_patches.live import live
from elasticmoe_patches.worker.migration import Progress

logger = logging.getLogger(__name__)

JOURNAL = "elasticmoe_request"
"""Attribute of SGLang's ReqState that holds the tokenised request."""
RESENDS = "elasticmoe_resends"
"""Attribute of SGLang's ReqState that holds its `Resends`."""

MOST_RESENDS_IN_PLACE = 2
"""How often a request is sent again without a new token in between: it may be what ends the ranks it comes to."""
MOST_RESENDS = 16
"""How often a request is sent again at all: it may end ranks and yet get a token from each."""
NO_TOKEN_IDS = "the rank of this request was lost, and a request without token ids cannot continue on another rank"


@dataclass
class Resends:
    """How often a request was sent again that may be the cause.

    Attributes:
        count: in its life. in_place: since it got its last new token.
        tokens: how many tokens it had when it was last sent again.
    """

    count: int = 0
    in_place: int = 0
    tokens: int = 0

    def admit(self, tokens: int) -> str | None:
        """Count another resend of a request that has so many tokens now. A sentence where it must not be sent."""
        if tokens > self.tokens:
            self.in_place = 0
        if self.in_place >= MOST_RESENDS_IN_PLACE or self.count >= MOST_RESENDS:
            times = self.count if self.count >= MOST_RESENDS else self.in_place
            return (
                f"the rank of this request was lost {times} times after it had been sent again: it is not sent to "
                "another one, because it may be the cause"
            )
        self.count += 1
        self.in_place += 1
        self.tokens = tokens
        return None


def remember(tokenizer_manager: Any, tokenized: Any) -> None:
    """Keep a tokenised request with its state, for as long as SGLang keeps that."""
    state = tokenizer_manager.rid_to_state.get(tokenized.rid)
    if state is not None:
        setattr(state, JOURNAL, tokenized)
        live(tokenizer_manager).sent(tokenized.rid, state)


def open_requests(tokenizer_manager: Any) -> set[str]:
    """Requests that were sent to a scheduler and are not finished."""
    return {
        rid
        for rid, state in tokenizer_manager.rid_to_state.items()
        if not state.finished and state.dispatched and hasattr(state, JOURNAL)
    }


def _continuation(tokenizer_manager: Any, rid: str, suspect: bool) -> tuple[Any, Progress] | None:
    """The request and what its client has received; None when it has ended, meanwhile or here with an error."""
    state = tokenizer_manager.rid_to_state.get(rid)
    if state is None or state.finished:
        return None
    request = getattr(state, JOURNAL)
    if request.input_ids is None:  # input embeddings; refused at admission
        end_with_error(tokenizer_manager, rid, NO_TOKEN_IDS)
        return None
    resends = getattr(state, RESENDS, None) or Resends()
    setattr(state, RESENDS, resends)
    refusal = resends.admit(len(state.output_ids)) if suspect else None
    if refusal is not None:
        end_with_error(tokenizer_manager, rid, refusal)
        return None
    return request, _progress(state, request)


def end_with_error(tokenizer_manager: Any, rid: str, sentence: str) -> None:
    """Answer a request that no rank has with HTTP 500 and this sentence, behind the tokens it has."""
    from sglang.srt.managers.io_struct import AbortReq

    logger.error("request %s ends: %s", rid, sentence)
    reason = {"type": "abort", "status_code": 500, "message": sentence}
    tokenizer_manager._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))


def _progress(state: Any, request: Any) -> Progress:
    from sglang.srt.managers.schedule_batch import INIT_INCREMENTAL_DETOKENIZATION_OFFSET

    sent = tuple(state.output_ids)
    # As Req.init_incremental_detokenize counts: a few prompt tokens, then the output.
    lead = min(len(request.input_ids), INIT_INCREMENTAL_DETOKENIZATION_OFFSET)
    carried: dict[str, Any] = {
        "send_token_offset": len(sent),
        "send_decode_id_offset": lead + len(sent) if sent else 0,
    }
    if request.return_logprob and sent:
        carried |= {"send_output_token_logprobs_offset": len(sent), "input_logprob_sent": True}
    return Progress(
        output_ids=sent, carried=carried, aborted=state.abort_sent, unseen_logprobs=len(sent), sent_again=True
    )


def send_again(tokenizer_manager: Any, rids: set[str], *, suspect: bool, ranks: Sequence[int] = ()) -> int:
    """Send requests to the controller, which gives each to a living rank. Returns how many were still open.

    Args:
        ranks: to these only, as far as they are active; empty: to any.
        suspect: the requests may be what ended their rank; then each is sent again a few times only.
    """
    from sglang.srt.managers.io_struct import wrap_as_pickle

    from elasticmoe_patches.srt.managers.io_struct import ElasticResumeReq

    sent = 0
    for rid in sorted(rids):
        found = _continuation(tokenizer_manager, rid, suspect)
        if found is None:
            continue
        request, progress = found
        stats = request.time_stats
        request.wrap_pickle_fields()
        tokenizer_manager._dispatch_to_scheduler(
            ElasticResumeReq(
                operation_id="",
                retiring_rank=-1,
                request=request,
                progress=wrap_as_pickle(progress),
                kv_tokens=0,
                kv_pages=[],
                to_ranks=list(ranks),
            )
        )
        request.time_stats = stats
        sent += 1
    return sent
