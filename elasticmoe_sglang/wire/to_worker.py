"""What ranks and the coordinator say to each other (ZMQ DEALER/ROUTER, msgpack, one frame a message).

The commit itself does not travel here: it goes through SGLang's control broadcast, so that all ranks get it in the
same iteration of their event loops. See `CommitCommand`.
"""

from __future__ import annotations

import msgspec


class ColumnPull(msgspec.Struct, frozen=True, kw_only=True):
    """One expert column to fetch: `source` is the device that holds it now."""

    column: int
    source: int


class PullColumns(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: allocate, map and copy these columns while serving goes on."""

    operation_id: str
    txn: str
    columns: tuple[ColumnPull, ...]


class DropColumns(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: unmap these columns. The coordinator releases their memory afterwards, not the rank."""

    operation_id: str
    columns: tuple[int, ...]
    release: bool


class ReleaseMigrated(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: the retiring rank's last tokens have reached the clients' side; its requests may go on here.

    kv_chunks: the chunks of the retiring rank's HMM memory in which their KV lies.
    """

    operation_id: str
    retiring_rank: int
    kv_chunks: tuple[int, ...] = ()


class Recover(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> survivor of a rank's death: meet at the commit barrier and go on in this membership.

    It cannot travel through SGLang's broadcast, whose collectives failed with the dead rank.
    """

    operation_id: str
    members: tuple[int, ...]
    epoch: int
    attempt: int
    placement: tuple[int, ...]
    expires: float


class CountRequests(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: when the fence of this operation has been read, say which requests are here (`Recovered`).

    forget: a retiring rank that died while handing over; what has arrived of it is not complete and will be sent again.
    """

    operation_id: str
    forget: int


class OfferMemory(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: the HMM has ended; offer what is mapped here to the one that answers now."""

    operation_id: str


class Offered(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: `OfferMemory` is done; `blocks` were new to the HMM."""

    rank: int
    operation_id: str
    blocks: int


class ResizeKv(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> rank: have so many chunks of KV. timeout_s: for the scheduler to let go of what goes."""

    operation_id: str
    chunks: int
    timeout_s: float


class KvResized(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: `ResizeKv` is done. Tokens evicted from the prefix cache, moved within the memory; requests
    that wait again."""

    rank: int
    operation_id: str
    chunks: int
    tokens: int
    evicted: int
    moved: int
    retracted: int


class KvState(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's KV cache in HMM memory; see planner.KvShape."""

    token_bytes: int
    page_tokens: int
    chunk_bytes: int
    cap_tokens: int | None
    chunks: int


class Hello(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: this process sits in the rank. `stage`: serving (started with the server) or barrier.

    kv: its KV cache, None where that is not in HMM memory.
    boot_s: from taking the rank on; load_s: of it, building the model and filling or attaching its weights.
    """

    rank: int
    pid: int
    stage: str
    columns: int
    column_bytes: int
    dense_bytes: int
    checkpoint_bytes: int
    pulled_bytes: int
    boot_s: float
    load_s: float
    kv: KvState | None = None


class Pulled(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: `PullColumns` is done; bytes over all layers, seconds of copying."""

    rank: int
    operation_id: str
    columns: int
    bytes: int
    seconds: float


class Dropped(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: `DropColumns` is done."""

    rank: int
    operation_id: str
    columns: int


class Failed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: a command could not be carried out; `reason` is a sentence."""

    rank: int
    operation_id: str
    reason: str


class Committed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: the commit barrier's decision was taken over.

    Attributes:
        committed: False when the commit barrier decided to abort; nothing has changed then.
        gate_ms: from arriving at the commit barrier to going on.
        reason: why it was aborted.
    """

    rank: int
    operation_id: str
    epoch: int
    committed: bool
    barrier_ms: float
    reason: str = ""


class Paused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator, with the first result after a commit.

    pause_ms: from the last result before the commit to the first after it, less the median of recent intervals.
    """

    rank: int
    operation_id: str
    pause_ms: float
    median_ms: float


class Broken(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Rank -> coordinator: a collective failed; this rank has set its requests aside and waits for `Recover`.

    culprit: the rank that was missing, -1 when unknown.
    """

    rank: int
    epoch: int
    culprit: int
    reason: str


class Recovered(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Survivor -> coordinator: it goes on. `rids`: every request that is here; the others went with the dead rank."""

    rank: int
    operation_id: str
    committed: bool
    rids: list[str]


class Retired(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Retiring rank -> coordinator: all requests are migrated. `handed` maps survivor -> number of requests.

    kv_chunks: survivor -> chunks of this rank's HMM memory that hold their KV; kv_tokens: how many tokens' KV it is.
    """

    rank: int
    operation_id: str
    migrated: dict[int, int]
    kv_chunks: dict[int, tuple[int, ...]] = {}
    kv_tokens: int = 0
    seconds: float


class Resumed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Survivor -> coordinator: that many of the retiring rank's requests run here now."""

    rank: int
    operation_id: str
    retiring_rank: int
    requests: int
    with_kv: int


Message = (
    PullColumns
    | DropColumns
    | ReleaseMigrated
    | Recover
    | CountRequests
    | OfferMemory
    | Offered
    | ResizeKv
    | KvResized
    | Hello
    | Pulled
    | Dropped
    | Failed
    | Committed
    | Paused
    | Broken
    | Recovered
    | Retired
    | Resumed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _decoder.decode(frame)


class CommitCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The commit, as all ranks receive it in one iteration.

    Attributes:
        members, epoch: the membership after the change.
        before: the ranks before it.
        attempt: counts tries to commit; decisions of the commit barrier belong to one attempt.
        placement: expert column -> rank after the change.
        expires: CLOCK_MONOTONIC seconds after which the commit barrier's leader refuses to commit: the coordinator has
        given up.
    """

    operation_id: str
    before: tuple[int, ...]
    members: tuple[int, ...]
    epoch: int
    attempt: int
    placement: tuple[int, ...]
    expires: float

    @property
    def joining(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.members) - set(self.before)))

    @property
    def retiring(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.before) - set(self.members)))

    @property
    def participants(self) -> tuple[int, ...]:
        """Everybody who has to come to the commit barrier."""
        return tuple(sorted({*self.before, *self.members}))


def encode_command(command: CommitCommand) -> bytes:
    return msgspec.msgpack.encode(command)


def decode_command(data: bytes) -> CommitCommand:
    return msgspec.msgpack.decode(data, type=CommitCommand)
