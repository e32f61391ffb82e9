"""What the IMM is told, and its replies: by the coordinator and SGLang's data-parallel controller on its SEQPACKET
socket, by each standby on a channel of its own."""

from __future__ import annotations

from elasticmoe_sglang.wire.envelope import Codec, Message
from elasticmoe_sglang.wire.to_worker import JoinSpec


class Register(Message, frozen=True, kw_only=True):
    """Keep the launch arguments of a rank; opaque here (the rank's own code decodes them). Everybody else who is
    connected gets a `Registered`."""

    rank: int
    arguments: bytes


class Registered(Message, frozen=True, kw_only=True):
    """What was registered for a rank, for whoever will have to tell another IMM."""

    rank: int
    arguments: bytes


class Assign(Message, frozen=True, kw_only=True):
    """Put a standby into the rank of `join_spec`."""

    join_spec: JoinSpec


class Assigned(Message, frozen=True, kw_only=True):
    """A standby was put into the rank. Sent to everybody who is connected. The packet carries a pidfd of the process,
    which the receiver owns."""

    rank: int
    pid: int
    incarnation: int = 0
    """See `JoinSpec.incarnation`. 0, too, where an IMM reports a worker that an earlier one started."""


class KillWorker(Message, frozen=True, kw_only=True):
    """End the process in `rank` (SIGKILL), such as a joining rank whose change was rolled back. Its `WorkerExited`
    follows."""

    rank: int


class AdoptWorkers(Message, frozen=True, kw_only=True):
    """Watch workers of an IMM that has ended (rank -> pid). The packet carries a pidfd of each, in this order. Not
    answered. The status of their exits is None: only a parent learns it."""

    ranks: dict[int, int]


class Query(Message, frozen=True, kw_only=True):
    """Ask for all there is: a `Registered` for each registered rank, an `Assigned` for each rank with a process, and
    last a `Population`."""


class Population(Message, frozen=True, kw_only=True):
    """Who is there: pids. Also sent, to everybody who is connected, after every change.

    ranks: rank -> its process. standbys: ready to take a rank. starting: standbys that still import what a rank needs.
    """

    ranks: dict[int, int]
    standbys: list[int]
    starting: list[int]


class Refused(Message, frozen=True, kw_only=True):
    """A request could not be carried out; `reason` is a sentence."""

    rank: int
    reason: str


class StandbyReady(Message, frozen=True, kw_only=True):
    """Standby, unasked: what a rank needs is imported, `Enter` is waited for."""


Request = Register | Assign | KillWorker | AdoptWorkers | Query
Reply = Registered | Assigned | Population | Refused

REQUESTS: Codec[Request] = Codec(Request)
