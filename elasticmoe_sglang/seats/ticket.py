"""What a standby is told when it is put into a seat."""

from __future__ import annotations

import msgspec


class SeatTicket(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the change that brings a seat in; the rest it reads from the runtime and the HMM.

    Attributes:
        seat: the seat to take.
        members, epoch: the membership with this seat in it.
        joiner: the seat boots alone and waits at the gate for that epoch. False for the seats a server starts with.
        placement: expert column -> seat in that membership. Empty at a server's start: the seats compute the initial
            placement once the model's number of experts is known.
        sources: the columns to pull: column -> device that holds it now. Empty at a server's start.
        dense_source: the device whose dense block a joiner copies.
        attempt: not 0 for a process that takes a dead seat's place: its try at the gate, to which it comes by itself.
        kv_chunks: KV memory to begin with; 0: the seat's share of what the weights leave.
        txn: the HMM transaction that its memory belongs to; empty when the seat opens its own.
        operation_id: the change, for messages; empty at the start of a server.
    """

    seat: int
    members: tuple[int, ...]
    epoch: int
    joiner: bool
    placement: tuple[int, ...] = ()
    sources: dict[int, int] = {}
    dense_source: int = 0
    attempt: int = 0
    kv_chunks: int = 0
    txn: str = ""
    operation_id: str = ""


def encode_ticket(ticket: SeatTicket) -> bytes:
    return msgspec.json.encode(ticket)


def decode_ticket(data: bytes) -> SeatTicket:
    """Raises msgspec.DecodeError / ValidationError on malformed input."""
    return msgspec.json.decode(data, type=SeatTicket)
