"""What is said on the IMM's Unix SEQPACKET socket and on its channel to each standby (msgpack, one frame a message)."""

from __future__ import annotations

import msgspec

# A rank's launch arguments (SGLang's ServerArgs) are the largest thing sent; about 20 KiB were seen.
MAX_FRAME = 1 << 20


class Register(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Keep the launch arguments of a rank; `blob` is opaque here (the rank's own code decodes it)."""

    rank: int
    blob: bytes


class Assign(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Put a standby into `rank`. `join_spec` tells it how to come in (see ranks/join_spec.py)."""

    rank: int
    join_spec: bytes


class KillWorker(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """End the process in `rank` (SIGKILL): a joining rank whose change was rolled back."""

    rank: int


class Query(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Ask for a `Population`."""


class Enter(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """IMM -> standby: take the rank."""

    rank: int
    blob: bytes
    join_spec: bytes


class WorkerNote(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> IMM -> every controller: e.g. SGLang's "ready" message of a freshly booted scheduler (JSON)."""

    rank: int
    pid: int
    note: bytes


class WorkerExited(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A worker is gone. `status` is os.waitstatus_to_exitcode's: negative for a signal."""

    rank: int
    pid: int
    status: int


class Assigned(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A standby was put into the rank."""

    rank: int
    pid: int


class Refused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A request could not be carried out; `reason` is a sentence."""

    rank: int
    reason: str


class Population(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Who is there, sent after every change. `ranks` maps rank -> pid."""

    ranks: dict[int, int]
    standbys: list[int]


Message = Register | Assign | KillWorker | Query | Enter | WorkerNote | WorkerExited | Assigned | Refused | Population

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _decoder.decode(frame)
