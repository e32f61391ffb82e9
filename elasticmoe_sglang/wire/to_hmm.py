"""What the HMM is told by its clients, and its replies.

Commands go over ZMQ (`Command` in, `Answer` out), descriptors over the SEQPACKET socket beside it (`LinkRequest` in,
`LinkReply` out). Every block is named by an integer that no HMM ever reuses: it survives the HMM with the block.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from elasticmoe_sglang.wire.envelope import (
    MAX_MESSAGE_BYTES,
    ByteCount,
    Codec,
    ErrorReply,
    Index,
    Message,
    Name,
    Seconds,
    Text,
)
from elasticmoe_sglang.wire.seqpacket import MAX_FDS, MAX_PACKET_BYTES

Kind = Literal["dense", "column", "window", "kv", "other"]
KINDS: tuple[Kind, ...] = ("dense", "column", "window", "kv", "other")

HOST = -1
"""The device number of host memory that belongs to no device: shared regions. No budget covers it."""

MAX_IDS = 65536
BlockId = Annotated[int, Meta(ge=0, lt=1 << 53)]
BlockIds = Annotated[list[BlockId], Meta(max_length=MAX_IDS)]
Columns = Annotated[list[Index], Meta(max_length=MAX_IDS)]


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One physical allocation that the HMM owns.

    block_id: never used again once the block is gone.
    device: which device (CPU: arena) it lies on; HOST for a shared region.
    column: the expert column it holds, for kind "column".
    name: the shared region's name, for a region.
    rank, chunk: whose KV cache it is a part of and which part, for kind "kv".
    shard: which part of the dense weights it holds, for kind "dense": 0 unless attention is tensor-parallel.
    nbytes: physical size, a multiple of the granularity.
    sealed: somebody declared its content complete.
    txn: the open transaction it was allocated in; None once committed.
    """

    block_id: int
    device: int
    kind: Kind
    column: int | None = None
    name: str | None = None
    rank: int | None = None
    chunk: int | None = None
    shard: int = 0
    nbytes: int
    sealed: bool = False
    txn: str | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the HMM's memory holds.

    fingerprint: of checkpoint content, dtype and layout; equal means interchangeable bytes.
    num_columns: expert columns in all; column_bytes, dense_bytes: bytes of one, before rounding up.
    detail: for people: architecture, dtype, path.
    """

    fingerprint: Name
    num_columns: Index
    column_bytes: ByteCount
    dense_bytes: ByteCount
    detail: dict[Name, Text] = {}


class DeviceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part of the ledger, in bytes. `used` is the sum of `by_kind`; `peak` is the most it ever was."""

    device: int
    budget: int
    used: int
    by_kind: dict[str, int]
    peak: int

    @property
    def free(self) -> int:
        return self.budget - self.used


class RegionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A named host-shared region."""

    name: str
    block_id: int
    nbytes: int


class TxnStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An open transaction. expires_in_s: seconds until it is rolled back by itself."""

    txn: str
    operation_id: str
    owner: str
    allocated_blocks: int
    expires_in_s: float


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An attached process. leases: handles it was given and has not returned."""

    name: str
    pid: int
    leases: int


class Counters(msgspec.Struct, kw_only=True):
    """Events since the HMM started."""

    requests: int = 0
    replayed: int = 0
    malformed: int = 0
    refused_peers: int = 0
    internal_errors: int = 0
    undo_failures: int = 0


# Commands --------------------------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True, kw_only=True):
    pass


class RegisterModel(Message, frozen=True, kw_only=True):
    model: ModelSpec


class OpenRegion(Message, frozen=True, kw_only=True):
    name: Name
    nbytes: Annotated[int, Meta(gt=0, lt=1 << 53)]


class Begin(Message, frozen=True, kw_only=True):
    """timeout_s: the transaction is rolled back by itself after so long."""

    operation_id: Name
    timeout_s: Seconds


class Commit(Message, frozen=True, kw_only=True):
    txn: Text


class Rollback(Message, frozen=True, kw_only=True):
    txn: Text


class Allocate(Message, frozen=True, kw_only=True):
    """columns: one block each, kind "column". rank and chunks: one block a chunk of the rank's KV cache, kind "kv".
    shard: of the dense weights, kind "dense"."""

    device: Index
    kind: Kind
    columns: Columns | None = None
    rank: Index | None = None
    chunks: Columns | None = None
    shard: Index = 0
    nbytes: Annotated[int, Meta(gt=0, lt=1 << 53)] | None = None
    txn: Text | None = None


class Seal(Message, frozen=True, kw_only=True):
    block_ids: BlockIds


class Lookup(Message, frozen=True, kw_only=True):
    kind: Kind | None = None
    device: Index | None = None
    columns: Columns | None = None
    rank: Index | None = None


class WaitSealed(Message, frozen=True, kw_only=True):
    """Answered when all are sealed, or with SealTimeout at the envelope's deadline."""

    block_ids: BlockIds


class Release(Message, frozen=True, kw_only=True):
    block_ids: BlockIds
    txn: Text | None = None


Command = (
    StatusRequest
    | RegisterModel
    | OpenRegion
    | Begin
    | Commit
    | Rollback
    | Allocate
    | Seal
    | Lookup
    | WaitSealed
    | Release
)

# Answers ---------------------------------------------------------------------------------------------------------


class HmmStatus(Message, frozen=True, kw_only=True):
    """The whole state of an HMM.

    instance: changes with every start; of another instance's blocks it knows those that were offered to it.
    granularity: bytes; sizes are rounded up to multiples of it.
    adopted_blocks: taken over from clients since it started.
    blocks: live ones; retired_blocks: released but still mapped by a client, so still charged.
    host_bytes: memory in use by shared regions, outside every budget.
    """

    pid: int
    endpoint: str
    instance: str
    backend: str
    granularity: int
    uptime_s: float
    devices: list[DeviceUsage]
    host_bytes: int
    regions: list[RegionStatus]
    blocks: int
    retired_blocks: int
    adopted_blocks: int
    model: ModelSpec | None
    txns: list[TxnStatus]
    clients: list[ClientStatus]
    counters: Counters


class ModelReply(Message, frozen=True, kw_only=True):
    model: ModelSpec


class BlocksReply(Message, frozen=True, kw_only=True):
    blocks: list[Block]


class TxnOpened(Message, frozen=True, kw_only=True):
    txn: str


class TxnReport(Message, frozen=True, kw_only=True):
    """How a transaction ended.

    peak_bytes: for each device, the most that was in use on it while the transaction was open.
    """

    txn: str
    operation_id: str
    outcome: Literal["committed", "rolled_back"]
    allocated_blocks: int
    allocated_bytes: int
    released_blocks: int
    peak_bytes: list[int]


class Done(Message, frozen=True, kw_only=True):
    pass


Answer = HmmStatus | ModelReply | BlocksReply | TxnOpened | TxnReport | Done | ErrorReply

# Link (SEQPACKET) ------------------------------------------------------------------------------------------------


class Attach(Message, frozen=True, kw_only=True):
    """First packet of a client; the kernel vouches for its uid and pid. server: it is the main process of a server, of
    which an HMM has one at a time."""

    name: Name
    server: bool = False


class FetchHandles(Message, frozen=True, kw_only=True):
    block_ids: Annotated[list[BlockId], Meta(min_length=1, max_length=MAX_FDS)]


class ReturnLeases(Message, frozen=True, kw_only=True):
    """One for each handle that the client has closed and unmapped. Not answered."""

    block_ids: BlockIds


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A block of an HMM that is gone, whose memory the client still has. region_bytes: of a region, as asked for."""

    block: Block
    region_bytes: Annotated[int, Meta(gt=0, lt=1 << 53)] | None = None


class Adopt(Message, frozen=True, kw_only=True):
    """Take these blocks over, under their old ids; the packet carries one descriptor an offer, in this order.

    Several clients may offer the same block. A lease is counted for each offer.
    """

    model: ModelSpec | None
    offers: Annotated[list[Offer], Meta(min_length=1, max_length=MAX_FDS)]


LinkRequest = Attach | FetchHandles | ReturnLeases | Adopt


class Welcome(Message, frozen=True, kw_only=True):
    """client_id: unguessable; the client's ZMQ sockets carry it as the start of their routing id."""

    client_id: str
    instance: str
    backend: str
    granularity: int
    devices: int


class Handles(Message, frozen=True, kw_only=True):
    """The packet carries one descriptor a block, in this order."""

    blocks: list[Block]


class Adopted(Message, frozen=True, kw_only=True):
    """blocks: how many of the offered ones the HMM did not have yet."""

    blocks: int


LinkReply = Welcome | Handles | Adopted | ErrorReply

COMMANDS: Codec[Command] = Codec(Command)
ANSWERS: Codec[Answer] = Codec(Answer, max_bytes=16 * MAX_MESSAGE_BYTES)
"""Larger than what is asked: a lookup may list 65536 blocks."""
LINK_REQUESTS: Codec[LinkRequest] = Codec(LinkRequest, max_bytes=MAX_PACKET_BYTES)
LINK_REPLIES: Codec[LinkReply] = Codec(LinkReply, max_bytes=MAX_PACKET_BYTES)
