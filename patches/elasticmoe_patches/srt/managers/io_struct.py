"""Our messages on SGLang's own sockets.

They travel tokenizer -> controller -> scheduler and scheduler -> detokenizer -> tokenizer, in order with SGLang's own
messages on the same sockets; that order is what makes the commit and the migration of requests safe.
"""

from __future__ import annotations

import pickle
from typing import Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    BaseReq,
    PickleWrapper,
    TokenizedGenerateReqInput,
    hook_custom_types,
)

from elasticmoe_sglang.wire.to_worker import CommitCommand


class ElasticCommandReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Coordinator -> controller -> all ranks: the commit."""

    command: CommitCommand


class ElasticRouteReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Coordinator -> controller: route new requests to these ranks only (after the commit, or after its abort)."""

    ranks: list[int]


class ElasticRecoverRouteReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Coordinator -> controller, after a rank's death: route to these ranks only, and send each a fence."""

    operation_id: str
    ranks: list[int]


class ElasticFenceReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Last message of a stream: controller -> retiring rank (nothing more is routed to it), retiring rank ->
    detokenizer -> tokenizer (all its output has been delivered)."""

    operation_id: str
    rank: int


class ElasticResumeReq(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Retiring rank -> survivor, or tokenizer -> controller -> rank: resume this request, or begin it there.

    Attributes:
        request: as the client sent it, tokenised.
        progress: what was generated and sent so far (`worker.migration.Progress`), in SGLang's own wrapper.
        kv_tokens: how many leading tokens' KV the retiring rank has for it; 0 for none.
        kv_pages: where it lies in the retiring rank's HMM memory, in order. Empty: it follows in the next frames.
        to_ranks: for the controller: to which of the active ranks; empty: to any.
    """

    operation_id: str
    retiring_rank: int
    request: TokenizedGenerateReqInput
    progress: PickleWrapper
    kv_tokens: int
    kv_pages: list[int]
    to_ranks: list[int] = []  # noqa: RUF012  (a message field: each message has its own)


def register_types() -> None:
    """Teach SGLang's decoder our messages; needed once in every process that receives them."""
    hook_custom_types(ElasticCommandReq, ElasticRouteReq, ElasticRecoverRouteReq, ElasticFenceReq, ElasticResumeReq)


def to_wire(message: Any) -> bytes:
    """A message in the encoding SGLang's own sockets use in this process (`sock_send` without the socket)."""
    if io_struct._USE_PICKLE_IPC:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return bytes(io_struct.msgpack_encode(message))


def from_wire(data: bytes) -> Any:
    """The inverse of `to_wire`."""
    return pickle.loads(data) if io_struct._USE_PICKLE_IPC else io_struct.msgpack_decode(data)
