"""What the main process knows of every running request, so that another rank can continue it when its rank has died.

The tokenizer sends each request and receives each of its tokens; together they are what another rank needs to continue
where the client's stream stopped. The journal is in memory only and ends with the server.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.live import live
from elasticmoe_patches.worker.migration import Progress

JOURNAL = "elasticmoe_request"
"""Attribute of SGLang's ReqState that holds the tokenised request."""


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


def _continuation(tokenizer_manager: Any, rid: str) -> tuple[Any, Progress] | None:
    """The request and what its client has received; None when it has ended meanwhile."""
    state = tokenizer_manager.rid_to_state.get(rid)
    if state is None or state.finished:
        return None
    request = getattr(state, JOURNAL)
    return request, _progress(state, request)


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
    return Progress(output_ids=sent, carried=carried, aborted=state.abort_sent, unseen_logprobs=len(sent))


def send_again(tokenizer_manager: Any, rids: set[str]) -> int:
    """Send requests to the controller, which gives each to a living rank. Returns how many were still open."""
    from sglang.srt.managers.io_struct import wrap_as_pickle

    from elasticmoe_patches.srt.managers.io_struct import ElasticResumeReq

    sent = 0
    for rid in sorted(rids):
        found = _continuation(tokenizer_manager, rid)
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
            )
        )
        request.time_stats = stats
        sent += 1
    return sent
