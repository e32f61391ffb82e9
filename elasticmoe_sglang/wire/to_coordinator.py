"""What the coordinator hears unasked, from workers and from the IMM, and the codecs of all that it hears."""

from __future__ import annotations

import msgspec

from elasticmoe_sglang.wire import to_imm, to_worker
from elasticmoe_sglang.wire.envelope import Codec, Message

# From workers -------------------------------------------------------------------------------------------------------


class KvState(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's KV cache in HMM memory; see planner.KvShape. boot_chunks: what a hot standby needs while it boots."""

    token_bytes: int
    page_tokens: int
    chunk_bytes: int
    cap_tokens: int | None
    chunks: int
    boot_chunks: int = 0


class Hello(Message, frozen=True, kw_only=True):
    """The worker of the rank has booted: it serves, waits at the commit barrier, or is a hot standby.

    columns: the model's expert columns in all. checkpoint_bytes: read of the checkpoint; pulled_bytes: copied from
        other devices.
    kv: its KV cache, None where that is not in HMM memory.
    boot_s: from taking the rank on; load_s: of it, building the model and filling or attaching its weights.
    """

    rank: int
    columns: int
    checkpoint_bytes: int
    pulled_bytes: int
    boot_s: float
    load_s: float
    kv: KvState | None = None


class Committed(Message, frozen=True, kw_only=True):
    """The commit barrier's decision was taken over.

    Attributes:
        committed: False when the commit barrier decided to abort; nothing has changed then.
        barrier_ms: from arriving at the commit barrier to going on.
        reason: why it was aborted.
    """

    rank: int
    operation_id: str
    committed: bool
    barrier_ms: float
    reason: str = ""


class Paused(Message, frozen=True, kw_only=True):
    """With the first result after a commit.

    pause_ms: from the last result before the commit to the first after it, less the median of recent intervals.
    """

    rank: int
    operation_id: str
    pause_ms: float


class KernelLoaded(Message, frozen=True, kw_only=True):
    """A serving rank used a kernel for the first time: its module was loaded, and perhaps compiled, meanwhile."""

    rank: int
    kernel: str


class Broken(Message, frozen=True, kw_only=True):
    """A collective of this epoch failed; this rank has set its requests aside and waits for the commit of the next.

    culprit: the rank that was missing, -1 when none is known to be.
    """

    rank: int
    epoch: int
    culprit: int


class Retired(Message, frozen=True, kw_only=True):
    """Retiring rank: all requests are migrated. `migrated` maps survivor -> number of requests.

    kv_chunks: survivor -> chunks of this rank's HMM memory that hold their KV; kv_tokens: how many tokens' KV it is.
    """

    rank: int
    operation_id: str
    migrated: dict[int, int]
    kv_chunks: dict[int, tuple[int, ...]]
    kv_tokens: int


# From the IMM, to everybody who is connected to it ------------------------------------------------------------------


REPLICA_LOST = 75
"""Exit status of a worker that lives and ends because another rank of its attention replica has ended."""


class WorkerNote(Message, frozen=True, kw_only=True):
    """Worker -> IMM -> here: SGLang's "ready" message of a freshly booted scheduler (JSON)."""

    rank: int
    note: bytes


class WorkerExited(Message, frozen=True, kw_only=True):
    """A worker is gone. `status` is os.waitstatus_to_exitcode's: negative for a signal, None where the IMM that was its
    parent had ended before."""

    rank: int
    pid: int
    status: int | None

    @property
    def how(self) -> str:
        """For a sentence about the worker."""
        if self.status == REPLICA_LOST:
            return "ended with another rank of its attention replica"
        return "exited" if self.status is None else f"exited with status {self.status}"


FromWorker = Hello | Committed | Paused | KernelLoaded | Broken | Retired | to_worker.Reply
FromImm = WorkerNote | WorkerExited | to_imm.Reply

FROM_WORKER: Codec[FromWorker] = Codec(FromWorker)
FROM_IMM: Codec[FromImm] = Codec(FromImm)
