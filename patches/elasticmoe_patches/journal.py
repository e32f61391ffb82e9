"""What the main process knows of every running request, so that one can be continued when its rank has died.

The tokenizer sees each request on its way out and each token on its way back; together they are what another rank needs
to go on where the client's stream stands. Nothing is written anywhere: the journal lives and dies with the server.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.worker.migration import Progress

JOURNAL = "elasticmoe_request"
"""Attribute of SGLang's ReqState that holds the tokenised request."""


def remember(tokenizer_manager: Any, tokenized: Any) -> None:
    """Keep a tokenised request with its state; it goes when SGLang drops the state."""
    state = tokenizer_manager.rid_to_state.get(tokenized.rid)
    if state is not None:
        setattr(state, JOURNAL, tokenized)


def open_requests(tokenizer_manager: Any) -> set[str]:
    """Requests that were sent to a scheduler and are not finished."""
    return {
        rid
        for rid, state in tokenizer_manager.rid_to_state.items()
        if not state.finished and state.dispatched and hasattr(state, JOURNAL)
    }


def migrated(tokenizer_manager: Any, rid: str) -> tuple[Any, Progress] | None:
    """The request and how far its client's stream has come; None when it has ended meanwhile."""
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
        found = migrated(tokenizer_manager, rid)
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
