"""How every other process talks to the HMM. One `HmmClient` a process; its methods may be called from any thread."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

from elasticmoe_sglang.errors import HmmError, HmmTaken, HmmUnavailable, ProtocolError, VmmError
from elasticmoe_sglang.hmm.client_link import HmmLink
from elasticmoe_sglang.hmm.config import Endpoint
from elasticmoe_sglang.hmm.leases import LeaseBook
from elasticmoe_sglang.hmm.vmm import VmmBackend, VmmHandle, get_backend
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import ErrorReply, error_from
from elasticmoe_sglang.wire.seqpacket import MAX_FDS, close_all

_AnswerT = TypeVar("_AnswerT", bound=to_hmm.Answer)


@dataclass(frozen=True, kw_only=True)
class RegionHandle:
    """A named host-shared region. `fd` stays open until `close`; mappings of it outlive that.

    nbytes: as asked for when it was created; the memory behind it is rounded up to whole pages.
    """

    name: str
    block_id: int
    fd: int
    nbytes: int
    handle: VmmHandle
    backend: VmmBackend

    def map(self) -> mmap.mmap:
        """The region as a writable buffer of `nbytes` bytes, for Python code."""
        return mmap.mmap(self.fd, self.nbytes)

    def close(self) -> None:
        """Closes the descriptor and returns the lease."""
        self.backend.close(self.handle)


class HmmClient:
    """A synchronous client. Connects on the first call, and again after the HMM was replaced.

    Every method raises HmmUnavailable when nobody answers within its deadline, and the HMM's own typed errors.
    A forked child makes its own client. Coroutines call it through `asyncio.to_thread`; a cancelled call still runs to
    its end or deadline in its thread.

    Args:
        endpoint: ipc://FOLDER/NAME.
        name: who this is, for the HMM's status and log.
        timeout_s: the deadline of each call, connecting included.
        server: this is the main process of a server. An HMM has one at a time; another gets HmmTaken from every method.
        backend: whose handles `handles` returns; None takes the process's instance of the HMM's backend.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        timeout_s: float = 10.0,
        server: bool = False,
        backend: VmmBackend | None = None,
    ) -> None:
        self.name = name
        self.server = server
        self.timeout_s = timeout_s
        self.epoch: int | None = None
        """The membership epoch sent along, for the HMM's messages."""
        self._endpoint = Endpoint.parse(endpoint)
        self._backend = backend
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._link: HmmLink | None = None
        self._leases = LeaseBook()
        self._model: to_hmm.ModelSpec | None = None

    @property
    def endpoint(self) -> str:
        return self._endpoint.url

    @property
    def backend(self) -> VmmBackend:
        """The memory backend that matches the HMM's."""
        if self._backend is None:
            self._backend = get_backend(self._attached(self._deadline()).welcome.backend)
        return self._backend

    def connect(self, wait_s: float = 0.0) -> to_hmm.Welcome:
        """Attaches now. For `wait_s` seconds it tries again while no HMM answers, or it serves another server."""
        until = time.monotonic() + wait_s
        while True:
            try:
                return self._attached(self._deadline()).welcome
            except (HmmUnavailable, HmmTaken):
                if time.monotonic() >= until:
                    raise
            time.sleep(0.02)

    def close(self) -> None:
        """Detaches. Open transactions are rolled back and leases dropped; what is mapped stays mapped."""
        with self._lock:
            link, self._link = self._link, None
        if self._pid == os.getpid():
            if link is not None:
                link.close()
            self._leases.close()

    def __enter__(self) -> HmmClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Another HMM ---------------------------------------------------------------------------------------------------

    def attached_to(self) -> str | None:
        """The instance of the HMM this client is attached to; None when it has none or that is gone. Does not wait."""
        link = self._link
        return None if link is None or link.hung_up() else link.welcome.instance

    def held(self) -> int:
        """Leases of this process, and so the descriptors it keeps for them."""
        return len(self._leases)

    def offer(self) -> int:
        """Gives an HMM that was started in the place of an earlier one what this process still has of its memory.

        Returns how many blocks it did not have yet, from others. Blocks keep their ids, and the leases are its to
        count from now on. Raises ModelMismatch when it holds another model. Calling it again offers nothing twice.
        """
        deadline = self._deadline()
        self.attached_to()  # notices that the HMM has gone
        link = self._attached(deadline)
        try:
            return self._leases.offer(link, self._model, deadline)
        except BaseException:
            # What it has counted so far is uncertain: it forgets this link's leases, and the next offer names all.
            with self._lock:
                self._link = None
            link.close()
            raise

    # State -------------------------------------------------------------------------------------------------------

    def status(self) -> to_hmm.HmmStatus:
        return self._call(to_hmm.StatusRequest(), to_hmm.HmmStatus)

    def register_model(self, model: to_hmm.ModelSpec) -> to_hmm.ModelSpec:
        """Tells what the memory holds. Idempotent; raises ModelMismatch when it holds something else."""
        self._model = self._call(to_hmm.RegisterModel(model=model), to_hmm.ModelReply).model
        return self._model

    def region(self, name: str, nbytes: int) -> RegionHandle:
        """A zeroed host-shared region, made on the first call of any client. It takes memory as pages are written.

        Raises RegionMismatch for another size.
        """
        [block] = self._call(to_hmm.OpenRegion(name=name, nbytes=nbytes), to_hmm.BlocksReply).blocks
        [handle] = self.handles([block.block_id])
        self._leases.regions(block.block_id, nbytes)
        return RegionHandle(
            name=name,
            block_id=block.block_id,
            fd=handle.native,
            nbytes=nbytes,
            handle=handle,
            backend=self.backend,
        )

    # Transactions ------------------------------------------------------------------------------------------------

    def begin(self, operation_id: str, *, timeout_s: float = 600.0) -> str:
        """Opens a transaction, or returns the open one of this operation. Rolled back by itself after `timeout_s`."""
        return self._call(to_hmm.Begin(operation_id=operation_id, timeout_s=timeout_s), to_hmm.TxnOpened).txn

    def commit(self, txn: str) -> to_hmm.TxnReport:
        """Keeps what was allocated in it and releases what was promised. Raises TransactionError when it is over."""
        return self._call(to_hmm.Commit(txn=txn), to_hmm.TxnReport)

    def rollback(self, txn: str) -> to_hmm.TxnReport:
        """Frees what was allocated in it. Raises UndoFailed when something is left over."""
        return self._call(to_hmm.Rollback(txn=txn), to_hmm.TxnReport)

    # Blocks ------------------------------------------------------------------------------------------------------

    def allocate(
        self,
        device: int,
        kind: to_hmm.Kind,
        *,
        columns: Sequence[int] | None = None,
        rank: int | None = None,
        chunks: Sequence[int] | None = None,
        shard: int = 0,
        nbytes: int | None = None,
        txn: str | None = None,
    ) -> list[to_hmm.Block]:
        """One zeroed block a column or a chunk of a rank's KV cache, or a single block; all or none.

        shard: which part of the dense weights, for kind "dense".

        nbytes: of each block, rounded up to the granularity; None takes the registered model's size. The
        transaction may be another client's. Raises BudgetExceeded with the numbers.
        """
        wanted = list(columns) if columns is not None else None
        parts = list(chunks) if chunks is not None else None
        command = to_hmm.Allocate(
            device=device, kind=kind, columns=wanted, rank=rank, chunks=parts, shard=shard, nbytes=nbytes, txn=txn
        )
        return self._call(command, to_hmm.BlocksReply).blocks

    def seal(self, block_ids: Sequence[int]) -> None:
        """Declares that the blocks' contents are complete. Idempotent."""
        self._call(to_hmm.Seal(block_ids=list(block_ids)), to_hmm.Done)
        self._leases.sealed(block_ids)

    def lookup(
        self,
        *,
        kind: to_hmm.Kind | None = None,
        device: int | None = None,
        columns: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> list[to_hmm.Block]:
        """Live blocks that match all that is given, by id; those of open transactions carry their `txn`."""
        wanted = list(columns) if columns is not None else None
        return self._call(to_hmm.Lookup(kind=kind, device=device, columns=wanted, rank=rank), to_hmm.BlocksReply).blocks

    def wait_sealed(self, block_ids: Sequence[int], timeout_s: float) -> None:
        """Returns when all are sealed. Raises SealTimeout, or BlockNotFound as soon as one is released."""
        self._call(to_hmm.WaitSealed(block_ids=list(block_ids)), to_hmm.Done, wait_s=timeout_s)
        self._leases.sealed(block_ids)

    def handles(self, block_ids: Sequence[int]) -> list[VmmHandle]:
        """Handles of the blocks' memory, to map and then close. Raises BlockNotFound.

        Each is a lease: the HMM counts the memory as taken until the handle is closed and unmapped, also when the
        block was released meanwhile. That happens by itself, through the backend.
        """
        deadline = self._deadline()
        link = self._attached(deadline)
        handles: list[VmmHandle] = []
        try:
            for start in range(0, len(block_ids), MAX_FDS):
                handles += self._import(link, link.fetch(block_ids[start : start + MAX_FDS], deadline))
        except BaseException:
            for handle in handles:
                self.backend.close(handle)
            raise
        return handles

    def release(self, block_ids: Sequence[int], *, txn: str | None = None) -> None:
        """Gives blocks up, now or when `txn` commits. Their memory goes when the last client has unmapped it."""
        self._call(to_hmm.Release(block_ids=list(block_ids), txn=txn), to_hmm.Done)

    # -------------------------------------------------------------------------------------------------------------

    def _import(self, link: HmmLink, fetched: list[tuple[to_hmm.Block, int]]) -> list[VmmHandle]:
        handles: list[VmmHandle] = []
        backend = self.backend
        for index, (block, fd) in enumerate(fetched):
            lease = self._leases.take(block, link, fd)
            try:
                handle = backend.import_(fd, block.nbytes, block.device)
            except VmmError:
                self._leases.release_blocks(lease)
                rest = fetched[index + 1 :]
                close_all([fd for _, fd in rest])
                link.return_leases([block.block_id for block, _ in rest])
                for done in handles:
                    backend.close(done)
                raise
            handle.on_free = partial(self._leases.release_blocks, lease)
            handles.append(handle)
        return handles

    def _call(self, command: to_hmm.Command, answer_type: type[_AnswerT], *, wait_s: float = 0.0) -> _AnswerT:
        deadline = self._deadline() + wait_s
        link = self._attached(deadline)
        answer = link.command(command, deadline, epoch=self.epoch, wait_s=wait_s or self.timeout_s)
        if isinstance(answer, ErrorReply):
            raise error_from(answer)
        if not isinstance(answer, answer_type):
            raise ProtocolError(f"the HMM answered {type(command).__name__} with {type(answer).__name__}")
        return answer

    def _attached(self, deadline: float) -> HmmLink:
        if self._pid != os.getpid():
            raise HmmError(
                f"the HMM client of process {self._pid} was used in process {os.getpid()}",
                hint="A forked child makes its own HmmClient.",
            )
        with self._lock:
            if self._link is not None and self._link.dead:
                self._link.close()
                self._link = None
            if self._link is None:
                self._link = HmmLink(self._endpoint, self.name, deadline, server=self.server)
            return self._link

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s
