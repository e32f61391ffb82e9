"""What a worker is told, and its replies: by the IMM as a standby, by the coordinator in its rank (ZMQ DEALER/ROUTER).

The commit itself comes by the coordinator's line only after a loss; else it goes through SGLang's control broadcast, so
that all ranks get it in the same iteration of their event loops. See `CommitCommand`.
"""

from __future__ import annotations

import msgspec

from elasticmoe_sglang.wire.envelope import Codec, Message

# Taking a rank ------------------------------------------------------------------------------------------------------


class JoinSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the change that brings a rank in; the rest it reads from the runtime and the
    HMM, such as where its columns lie now.

    Attributes:
        rank: the rank to take.
        members, epoch: the membership with this rank in it.
        joining_rank: the rank boots alone and waits at the commit barrier for that epoch. False for the ranks a server
            starts with.
        placement: expert column -> its owner in that membership. Empty at a server's start: the ranks compute the
            initial placement once the model's number of experts is known.
        copies: (column, rank) of each copy of a column in that membership, ascending.
        attempt: not 0 for a process that takes a lost rank's place: its proposal at the commit barrier, to which it
            comes by itself; `operation_id` names that proposal then.
        kv_chunks: KV memory to begin with; 0: the rank's share of what the weights leave.
        txn: the HMM transaction that its memory belongs to; empty when the rank opens its own.
        operation_id: the change, for messages; empty at the start of a server.
        incarnation: tells this worker from all others of the rank; 0 at the start of a server.
        hot: boot without columns and become a hot standby: a `Join` brings the change. The membership is that of now.
    """

    rank: int
    members: tuple[int, ...]
    epoch: int
    joining_rank: bool
    placement: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    attempt: int = 0
    kv_chunks: int = 0
    txn: str = ""
    operation_id: str = ""
    incarnation: int = 0
    hot: bool = False

    @property
    def held(self) -> list[int]:
        """The columns on this rank, owned or copies, ascending."""
        owned = [column for column, owner in enumerate(self.placement) if owner == self.rank]
        return sorted((*owned, *(column for column, rank in self.copies if rank == self.rank)))


class Enter(Message, frozen=True, kw_only=True):
    """IMM -> standby: take a rank. arguments: the launch arguments that were registered for it."""

    arguments: bytes
    join_spec: JoinSpec


# Preparing and finishing a change -----------------------------------------------------------------------------------


class PullColumns(Message, frozen=True, kw_only=True):
    """Allocate, map and copy columns while serving goes on. sources: column -> device that holds it now."""

    operation_id: str
    txn: str
    sources: dict[int, int]


class Pulled(Message, frozen=True, kw_only=True):
    """`PullColumns` is done; bytes over all layers, seconds of copying."""

    rank: int
    operation_id: str
    columns: int
    bytes: int
    seconds: float


class DropColumns(Message, frozen=True, kw_only=True):
    """Unmap these columns. The coordinator releases their memory afterwards, not the worker."""

    operation_id: str
    columns: tuple[int, ...]


class Dropped(Message, frozen=True, kw_only=True):
    """`DropColumns` is done."""

    rank: int
    operation_id: str


class ResizeKv(Message, frozen=True, kw_only=True):
    """Have so many chunks of KV. timeout_s: for the scheduler to let go of what goes."""

    operation_id: str
    chunks: int
    timeout_s: float


class KvResized(Message, frozen=True, kw_only=True):
    """`ResizeKv` is done; `chunks` are there now."""

    rank: int
    operation_id: str
    chunks: int


class MapMigrated(Message, frozen=True, kw_only=True):
    """Map the chunks of the retiring rank's HMM memory in which the KV of requests lies that this rank takes over."""

    operation_id: str
    retiring_rank: int
    kv_chunks: tuple[int, ...]


class ReleaseMigrated(Message, frozen=True, kw_only=True):
    """The retiring rank's last tokens have reached the clients' side; its requests may go on here.

    mapped: a `MapMigrated` came before.
    """

    operation_id: str
    retiring_rank: int
    mapped: bool


class Resumed(Message, frozen=True, kw_only=True):
    """That many of the retiring rank's requests run here now.

    with_kv: of them, those whose KV was kept. recomputed: those that had some which could not be placed.
    """

    rank: int
    operation_id: str
    retiring_rank: int
    requests: int
    with_kv: int
    recomputed: int


# After a rank joined ------------------------------------------------------------------------------------------------


class GiveUpWaiting(Message, frozen=True, kw_only=True):
    """Give up requests that wait here and have not begun, so that this share of all work here goes to other ranks.

    epoch: in which it is asked; not done in a later one. share: more than 0 and less than 1.
    """

    operation_id: str
    epoch: int
    share: float


class GaveUp(Message, frozen=True, kw_only=True):
    """To `GiveUpWaiting`: these requests are on no rank now."""

    rank: int
    operation_id: str
    rids: list[str]


# Routing ------------------------------------------------------------------------------------------------------------


class CountRouted(Message, frozen=True, kw_only=True):
    """Say how many tokens were routed to the expert columns here."""

    operation_id: str


class Routed(Message, frozen=True, kw_only=True):
    """To `CountRouted`: by expert column, over all layers, since this worker has booted; 0 for columns that were never
    here."""

    rank: int
    operation_id: str
    tokens: list[int]


# After a death ------------------------------------------------------------------------------------------------------


class CountRequests(Message, frozen=True, kw_only=True):
    """When the fence of this operation has been read, say which requests are here.

    forget: retiring ranks that ended while migrating; what has arrived of them is not complete and is sent again.
    """

    operation_id: str
    forget: tuple[int, ...]


class Counted(Message, frozen=True, kw_only=True):
    """To `CountRequests`, and after the commit of a recovery: `rids` are all requests that are here; the others went
    with the lost rank."""

    rank: int
    operation_id: str
    rids: list[str]


class OfferMemory(Message, frozen=True, kw_only=True):
    """The HMM has ended; offer what is mapped here to the one that answers now."""

    operation_id: str


class Offered(Message, frozen=True, kw_only=True):
    """`OfferMemory` is done; `blocks` were new to the HMM."""

    rank: int
    operation_id: str
    blocks: int


# Hot standbys -------------------------------------------------------------------------------------------------------


class Join(Message, frozen=True, kw_only=True):
    """To a hot standby: take columns and KV of `join_spec` and come to the commit barrier. Its `Hello` answers."""

    operation_id: str
    join_spec: JoinSpec


class Park(Message, frozen=True, kw_only=True):
    """To a rank that has retired and is one of `CommitCommand.parking`: survivors have copied what they need. Give
    columns and KV up and become a hot standby."""

    operation_id: str


class Parked(Message, frozen=True, kw_only=True):
    """`Park` is done. kv_chunks: kept. columns: that were unmapped."""

    rank: int
    operation_id: str
    columns: int
    kv_chunks: int


# --------------------------------------------------------------------------------------------------------------------


class Failed(Message, frozen=True, kw_only=True):
    """To any request: it could not be carried out; `reason` is a sentence."""

    rank: int
    operation_id: str
    reason: str


class CommitCommand(Message, frozen=True, kw_only=True):
    """The commit: through SGLang's control broadcast, so that all ranks receive it in one iteration; or, when ranks
    were lost and with them that broadcast's collectives, by the agents of the survivors, which wait for it.

    Attributes:
        members, epoch: the membership after the change.
        before: the ranks before it. lost: those of them whose workers have died.
        attempt: counts tries to commit; decisions of the commit barrier belong to one attempt.
        placement: expert column -> its owner after the change. copies: (column, rank) of each copy then, ascending.
        expires: CLOCK_MONOTONIC seconds after which the commit barrier's leader refuses to commit: the coordinator has
            given up.
        parking: retiring ranks whose workers become hot standbys; the others' end.
    """

    operation_id: str
    before: tuple[int, ...]
    members: tuple[int, ...]
    lost: tuple[int, ...]
    epoch: int
    attempt: int
    placement: tuple[int, ...]
    expires: float
    parking: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def joining(self) -> tuple[int, ...]:
        """Ranks with a new worker."""
        return tuple(sorted(set(self.members) - (set(self.before) - set(self.lost))))

    @property
    def retiring(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.before) - set(self.members) - set(self.lost)))

    @property
    def participants(self) -> tuple[int, ...]:
        """Everybody who has to come to the commit barrier."""
        return tuple(sorted({*self.retiring, *self.members}))


Request = (
    PullColumns
    | DropColumns
    | ResizeKv
    | MapMigrated
    | ReleaseMigrated
    | CommitCommand
    | GiveUpWaiting
    | CountRouted
    | CountRequests
    | OfferMemory
    | Join
    | Park
)
Reply = Pulled | Dropped | KvResized | Resumed | GaveUp | Routed | Counted | Offered | Parked | Failed

REQUESTS: Codec[Request] = Codec(Request)
ENTER: Codec[Enter] = Codec(Enter)
