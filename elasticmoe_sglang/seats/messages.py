"""What seats and the coordinator say to each other (ZMQ DEALER/ROUTER, msgpack, one frame a message).

The commit itself does not travel here: it goes through SGLang's control broadcast, so that all seats get it in the
same iteration of their event loops. See `CommitCommand`.
"""

from __future__ import annotations

import msgspec


class ColumnPull(msgspec.Struct, frozen=True, kw_only=True):
    """One expert column to fetch: `source` is the device that holds it now."""

    column: int
    source: int


class PullColumns(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: allocate, map and copy these columns while serving goes on."""

    operation_id: str
    txn: str
    columns: tuple[ColumnPull, ...]


class DropColumns(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: unmap these columns. `release` also gives their memory back to the HMM."""

    operation_id: str
    columns: tuple[int, ...]
    release: bool


class ReleaseAdopted(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: the leaver's last tokens have reached the clients' side; its requests may go on here.

    kv_chunks: the chunks of the leaver's HMM memory in which their KV lies.
    """

    operation_id: str
    leaver: int
    kv_chunks: tuple[int, ...] = ()


class Recover(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> survivor of a seat's death: meet at the gate and go on in this membership.

    It cannot travel through SGLang's broadcast, whose collectives failed with the dead seat.
    """

    operation_id: str
    members: tuple[int, ...]
    epoch: int
    attempt: int
    placement: tuple[int, ...]
    expires: float


class CountRequests(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: when the fence of this operation has been read, say which requests are here (`Recovered`).

    forget: a leaver that died while handing over; what has arrived of it is not complete and will be sent again.
    """

    operation_id: str
    forget: int


class OfferMemory(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: the HMM has ended; offer what is mapped here to the one that answers now."""

    operation_id: str


class Offered(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: `OfferMemory` is done; `blocks` were new to the HMM."""

    seat: int
    operation_id: str
    blocks: int


class ResizeKv(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Coordinator -> seat: have so many chunks of KV. timeout_s: for the scheduler to let go of what goes."""

    operation_id: str
    chunks: int
    timeout_s: float


class KvResized(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: `ResizeKv` is done. Tokens evicted from the prefix cache, moved within the memory; requests
    that wait again."""

    seat: int
    operation_id: str
    chunks: int
    tokens: int
    evicted: int
    moved: int
    retracted: int


class KvState(msgspec.Struct, frozen=True, kw_only=True):
    """A seat's KV cache in HMM memory; see planner.KvShape."""

    token_bytes: int
    page_tokens: int
    chunk_bytes: int
    cap_tokens: int | None
    chunks: int


class Hello(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: this process sits in the seat. `stage`: serving (started with the server) or gate.

    kv: its KV cache, None where that is not in HMM memory.
    boot_s: from taking the seat on; load_s: of it, building the model and filling or attaching its weights.
    """

    seat: int
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
    """Seat -> coordinator: `PullColumns` is done; bytes over all layers, seconds of copying."""

    seat: int
    operation_id: str
    columns: int
    bytes: int
    seconds: float


class Dropped(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: `DropColumns` is done."""

    seat: int
    operation_id: str
    columns: int


class Failed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: a command could not be carried out; `reason` is a sentence."""

    seat: int
    operation_id: str
    reason: str


class Committed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: the gate's decision was taken over.

    Attributes:
        committed: False when the gate decided to abort; nothing has changed then.
        gate_ms: from arriving at the gate to going on.
        reason: why it was aborted.
    """

    seat: int
    operation_id: str
    epoch: int
    committed: bool
    gate_ms: float
    reason: str = ""


class Paused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator, with the first result after a commit.

    pause_ms: from the last result before the commit to the first after it, less the median of recent intervals.
    """

    seat: int
    operation_id: str
    pause_ms: float
    median_ms: float


class Broken(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Seat -> coordinator: a collective failed; this seat has set its requests aside and waits for `Recover`.

    culprit: the seat that was missing, -1 when unknown.
    """

    seat: int
    epoch: int
    culprit: int
    reason: str


class Recovered(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Survivor -> coordinator: it goes on. `rids`: every request that is here; the others went with the dead seat."""

    seat: int
    operation_id: str
    committed: bool
    rids: list[str]


class Left(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Leaver -> coordinator: all requests are handed over. `handed` maps survivor -> number of requests.

    kv_chunks: survivor -> chunks of this seat's HMM memory that hold their KV; kv_tokens: how many tokens' KV it is.
    """

    seat: int
    operation_id: str
    handed: dict[int, int]
    kv_chunks: dict[int, tuple[int, ...]] = {}
    kv_tokens: int = 0
    seconds: float


class Adopted(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Survivor -> coordinator: that many of the leaver's requests run here now."""

    seat: int
    operation_id: str
    leaver: int
    requests: int
    with_kv: int


Message = (
    PullColumns
    | DropColumns
    | ReleaseAdopted
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
    | Left
    | Adopted
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _decoder.decode(frame)


class CommitCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The commit, as all seats receive it in one iteration.

    Attributes:
        members, epoch: the membership after the change.
        before: the seats before it.
        attempt: counts tries to commit; decisions of the gate belong to one attempt.
        placement: expert column -> seat after the change.
        expires: CLOCK_MONOTONIC seconds after which the gate's leader refuses to commit: the coordinator has given up.
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
    def leaving(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.before) - set(self.members)))

    @property
    def participants(self) -> tuple[int, ...]:
        """Everybody who has to come to the gate."""
        return tuple(sorted({*self.before, *self.members}))


def encode_command(command: CommitCommand) -> bytes:
    return msgspec.msgpack.encode(command)


def decode_command(data: bytes) -> CommitCommand:
    return msgspec.msgpack.decode(data, type=CommitCommand)
