"""What is said on the IMM's Unix SEQPACKET socket and on its channel to each standby (msgpack, one frame a message)."""

from __future__ import annotations

import msgspec

# A seat's launch arguments (SGLang's ServerArgs) are the largest thing sent; about 20 KiB were seen.
MAX_FRAME = 1 << 20


class Register(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Keep the launch arguments of a seat; `blob` is opaque here (the seat's own code decodes it)."""

    seat: int
    blob: bytes


class Assign(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Put a standby into `seat`. `ticket` tells it how to come in (see seats/ticket.py)."""

    seat: int
    ticket: bytes


class KillSeat(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """End the process in `seat` (SIGKILL): a joiner whose change was rolled back."""

    seat: int


class Query(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Ask for a `Population`."""


class Enter(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """IMM -> standby: take the seat."""

    seat: int
    blob: bytes
    ticket: bytes


class SeatNote(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> IMM -> every controller: e.g. SGLang's "ready" message of a freshly booted scheduler (JSON)."""

    seat: int
    pid: int
    note: bytes


class SeatExited(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A seat's process is gone. `status` is os.waitstatus_to_exitcode's: negative for a signal."""

    seat: int
    pid: int
    status: int


class Assigned(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A standby was put into the seat."""

    seat: int
    pid: int


class Refused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A request could not be carried out; `reason` is a sentence."""

    seat: int
    reason: str


class Population(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Who is there, sent after every change. `seats` maps seat -> pid."""

    seats: dict[int, int]
    standbys: list[int]


Message = Register | Assign | KillSeat | Query | Enter | SeatNote | SeatExited | Assigned | Refused | Population

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _decoder.decode(frame)
