"""The envelope that every control message travels in, and the codec that reads nothing it does not understand.

One ZMQ frame (or one SEQPACKET packet) is one msgpack-encoded `Envelope`. Its body is one `Message` of a closed tagged
union that the `Codec` was made for; each part of the system names its own. Nothing is ever pickled. Whatever arrives is
either a valid envelope or a `MalformedMessage`, which carries the request id where that much could be read, so that the
sender gets a typed error back. Only the HMM's answers are told apart by request ids; what workers, IMM and coordinator
say to each other names rank and operation in its body, and travels by `pack` and `unpack`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from elasticmoe_sglang.errors import ElasticMoEError, MalformedMessage, ProtocolError

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20
"""No frame is larger; bulk data goes through shared memory, never through messages."""
MAX_DEADLINE_S = 24 * 3600.0
NO_REQUEST = "?"
"""The request id of what answers no request, or one whose id could not be read."""

# Bounds that keep a hostile or broken peer from costing more than its message. Sizes stay below 2^53, epochs and
# counters below 2^62, so arithmetic on them never leaves 64 bits.
RequestId = Annotated[str, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=4096)]
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_DEADLINE_S)]
Epoch = Annotated[int, Meta(ge=0, lt=1 << 62)]
ByteCount = Annotated[int, Meta(ge=0, lt=1 << 53)]
Index = Annotated[int, Meta(ge=0, lt=1 << 31)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True, forbid_unknown_fields=True):
    """Base of every body. Its class name is its tag on the wire."""


BodyT = TypeVar("BodyT")


class Envelope(msgspec.Struct, Generic[BodyT], frozen=True, kw_only=True):
    """What every message carries around its body.

    version: of this protocol; another one is refused with a sentence that says so.
    request_id: chosen by the requester; the answer repeats it, and so does a retry, which is executed at most once.
    epoch: the membership epoch the sender acts in; None where there is none yet.
    deadline_s: for a request, how many seconds from its arrival the sender goes on waiting. Relative, since two
        processes' clocks need not agree.
    """

    version: Annotated[int, Meta(ge=0, lt=1 << 31)] = PROTOCOL_VERSION
    request_id: RequestId
    epoch: Epoch | None = None
    deadline_s: Seconds = 0.0
    body: BodyT


class _Header(msgspec.Struct):
    """As much of an envelope as is read when the whole cannot be."""

    version: int = -1
    request_id: str = ""


class Codec(Generic[BodyT]):
    """Encodes and decodes envelopes around one closed union of bodies.

    Args:
        body: the union type, such as `Ping | Pong`; mypy cannot express "a union of Message classes".
        max_bytes: larger frames are refused unread, and never produced.
    """

    def __init__(self, body: Any, *, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Envelope[BodyT]] = msgspec.msgpack.Decoder(Envelope[body])
        self._header = msgspec.msgpack.Decoder(_Header)

    def encode(self, envelope: Envelope[BodyT]) -> bytes:
        """Raises ProtocolError when the result would be larger than any receiver accepts."""
        frame = self._encoder.encode(envelope)
        if len(frame) > self.max_bytes:
            raise ProtocolError(
                f"a {type(envelope.body).__name__} of {len(frame)} bytes exceeds the limit of {self.max_bytes}",
                hint="Split it.",
            )
        return frame

    def decode(self, frame: bytes | memoryview) -> Envelope[BodyT]:
        """Raises MalformedMessage for everything that is not a valid envelope of this version."""
        size = memoryview(frame).nbytes
        if size > self.max_bytes:
            raise MalformedMessage(f"a frame of {size} bytes exceeds the limit of {self.max_bytes}", hint="Split it.")
        try:
            envelope = self._decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._explain(frame, str(error)) from error
        if envelope.version != PROTOCOL_VERSION:
            raise self._explain(frame, "")
        return envelope

    def pack(self, body: BodyT) -> bytes:
        """Encodes a message that is no answer to a request id. Raises as `encode`."""
        return self.encode(Envelope(request_id=NO_REQUEST, body=body))

    def unpack(self, frame: bytes | memoryview) -> BodyT:
        """The body of a frame. Raises as `decode`."""
        return self.decode(frame).body

    def _explain(self, frame: bytes | memoryview, why: str) -> MalformedMessage:
        try:
            header = self._header.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return MalformedMessage(f"a frame of {memoryview(frame).nbytes} bytes is no message: {why}")
        request_id = header.request_id if len(header.request_id) <= 64 else ""
        if header.version != PROTOCOL_VERSION:
            return MalformedMessage(
                f"the sender speaks protocol version {header.version}, the receiver {PROTOCOL_VERSION}",
                request_id=request_id,
                hint="Run the same release of elasticmoe-sglang on both sides.",
            )
        return MalformedMessage(f"not a valid message: {why}", request_id=request_id)


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


Detail = str | int | float | bool | None


class ErrorReply(Message, frozen=True, kw_only=True):
    """The answer to a request that failed: an error of errors.py, taken apart.

    error: its class name; details: what it carries beyond the text, such as BudgetExceeded's numbers.
    """

    error: Name
    what: Text
    hint: Text | None = None
    rank: int | None = None
    epoch: int | None = None
    operation: Text | None = None
    details: dict[str, Detail] = {}


_PLACES = ("what", "hint", "rank", "epoch", "operation")


def error_reply(error: ElasticMoEError) -> ErrorReply:
    """Takes an error apart for the wire."""
    details = {
        name: value
        for name, value in vars(error).items()
        if name not in _PLACES and isinstance(value, str | int | float | bool | None)
    }
    return ErrorReply(
        error=type(error).__name__,
        what=_sendable(error.what),
        hint=None if error.hint is None else _sendable(error.hint),
        rank=error.rank,
        epoch=error.epoch,
        operation=None if error.operation is None else _sendable(error.operation),
        details=details,
    )


def _sendable(text: str) -> str:
    """Within the bound of `Text`, and without the lone surrogates that undecodable file names bring along."""
    return text[:4096].encode("utf-8", "replace").decode("utf-8")


def error_from(reply: ErrorReply) -> ElasticMoEError:
    """Puts the error together again; a class this release does not know becomes a plain ElasticMoEError."""
    cls = next((c for c in _error_classes(ElasticMoEError) if c.__name__ == reply.error), ElasticMoEError)
    error = cls.__new__(cls)
    vars(error).update(reply.details)
    for name in _PLACES:
        setattr(error, name, getattr(reply, name))
    error.args = (error._text(),)
    return error


def _error_classes(root: type[ElasticMoEError]) -> Iterator[type[ElasticMoEError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _error_classes(cls)
