"""What a standby is told when it is put into a rank."""

from __future__ import annotations

import msgspec


class JoinSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the change that brings a rank in; the rest it reads from the runtime and the HMM.

    Attributes:
        rank: the rank to take.
        members, epoch: the membership with this rank in it.
        joining rank: the rank boots alone and waits at the commit barrier for that epoch. False for the ranks a server
        starts with.
        placement: expert column -> rank in that membership. Empty at a server's start: the ranks compute the initial
            placement once the model's number of experts is known.
        sources: the columns to pull: column -> device that holds it now. Empty at a server's start.
        dense_source: the device whose dense block a joining rank copies.
        attempt: not 0 for a process that takes a dead rank's place: its try at the commit barrier, to which it comes by
        itself.
        kv_chunks: KV memory to begin with; 0: the rank's share of what the weights leave.
        txn: the HMM transaction that its memory belongs to; empty when the rank opens its own.
        operation_id: the change, for messages; empty at the start of a server.
    """

    rank: int
    members: tuple[int, ...]
    epoch: int
    joining_rank: bool
    placement: tuple[int, ...] = ()
    sources: dict[int, int] = {}
    dense_source: int = 0
    attempt: int = 0
    kv_chunks: int = 0
    txn: str = ""
    operation_id: str = ""


def encode_join_spec(join_spec: JoinSpec) -> bytes:
    return msgspec.json.encode(join_spec)


def decode_join_spec(data: bytes) -> JoinSpec:
    """Raises msgspec.DecodeError / ValidationError on malformed input."""
    return msgspec.json.decode(data, type=JoinSpec)
