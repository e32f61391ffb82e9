"""What runs beside SGLang in the main process: HMM and IMM as child processes, the coordinator in a thread.

The coordinator has an event loop of its own, so that a change is delayed neither by a busy HTTP server nor by an
Engine without an event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from elasticmoe_patches import device, measure
from elasticmoe_patches.srt.managers.communicator import ATTRIBUTE, Answers
from elasticmoe_sglang import run_dir_reaper
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.comm.region import format_region, open_region, release_stale_regions
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.failover import FailoverController
from elasticmoe_sglang.coordinator.hmm_failover import HmmFailover
from elasticmoe_sglang.coordinator.memory import HmmMemory, drop_kv, release_leftovers
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, WorkerError
from elasticmoe_sglang.event_loop import run_in
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.imm.client import ImmClient, start_imm
from elasticmoe_sglang.planner import initial_placement
from elasticmoe_sglang.policy.controller import PolicyController
from elasticmoe_sglang.runtime import Runtime, current_runtime
from elasticmoe_sglang.wire.to_coordinator import Hello
from elasticmoe_sglang.wire.to_worker import CommitCommand

logger = logging.getLogger(__name__)

_ResultT = TypeVar("_ResultT")
_HELLO_DEADLINE_S = 60.0
# The output that a worker sent before its death has passed the detokenizer after this time.
_LAST_OUTPUT_S = 0.05
_services: Services | None = None


class SglangRouter:
    """The coordinator's `SglangPort`: sends on SGLang's sockets, in the tokenizer's event loop, which owns them.

    Args:
        on_rank_lost: called with the rank and a sentence.
    """

    def __init__(self, tokenizer_manager: Any, on_rank_lost: Callable[[int, str], None]) -> None:
        self._tokenizer = tokenizer_manager
        self._answers: Answers = getattr(tokenizer_manager, ATTRIBUTE)
        self.rank_lost = on_rank_lost

    async def send_command(self, command: CommitCommand) -> None:
        from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq

        async def send() -> None:
            await self._answers.hold()
            self._tokenizer._dispatch_to_scheduler(ElasticCommandReq(command=command))

        await self._run(send())

    async def send_route(self, ranks: Sequence[int]) -> None:
        from elasticmoe_patches.srt.managers.io_struct import ElasticRouteReq

        async def send() -> None:
            self._tokenizer._dispatch_to_scheduler(ElasticRouteReq(ranks=list(ranks)))
            self._answers.resume(len(ranks))

        await self._run(send())

    async def send_recover_route(self, operation_id: str, ranks: Sequence[int]) -> set[str]:
        from elasticmoe_patches.journal import open_requests
        from elasticmoe_patches.srt.managers.io_struct import ElasticRecoverRouteReq

        async def send() -> set[str]:
            # Without an await between: what is sent later goes to active ranks and is not missing anywhere.
            opened = open_requests(self._tokenizer)
            request = ElasticRecoverRouteReq(operation_id=operation_id, ranks=list(ranks))
            self._tokenizer._dispatch_to_scheduler(request)
            self._answers.resume(len(ranks))
            self._answers.give_up_later()
            return opened

        return await self._run(send())

    async def send_again(self, rids: set[str]) -> int:
        from elasticmoe_patches.journal import send_again

        async def send() -> int:
            return send_again(self._tokenizer, rids)

        if not rids:
            return 0
        await asyncio.sleep(_LAST_OUTPUT_S)
        return await self._run(send())

    async def _run(self, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
        loop = self._tokenizer.event_loop
        if loop is None:
            coroutine.close()
            raise WorkerError("the tokenizer's event loop has not started", hint="Send the request over HTTP")
        return await run_in(loop, coroutine)


class Services:
    """Started before SGLang's first child process; end with the main process.

    Attributes:
        loop: the coordinator's event loop, which runs in a thread.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.hmm: HmmProcess | None = None
        if runtime.config.run_dir is None:
            run_dir_reaper.watch(str(runtime.paths.run_dir), os.getpid())
        if runtime.config.hmm_endpoint is None:
            self._start_hmm()
        self._client = HmmClient(runtime.hmm_endpoint, name="coordinator")
        release_stale_regions(self._client, runtime.run_id)
        drop_kv(self._client)
        # Stays open: a new HMM adopts the region from this lease.
        self._region = open_region(self._client, runtime.config, runtime.run_id)
        self.control: ControlPage = format_region(self._region, runtime.config)
        self._imm: subprocess.Popen[bytes] = start_imm("elasticmoe_patches.imm", [device.memory_backend()])
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="elasticmoe-coordinator", daemon=True)
        self._thread.start()
        self._tokenizer: Any = None
        self._early: list[Incoming] = []
        self._workers: Workers | None = None
        self._coordinator: Coordinator | None = None
        self._failover: FailoverController | None = None
        self.policy: PolicyController | None = None
        self._closing: concurrent.futures.Future[None] | None = None
        self._ends = False
        self._stopped = False
        self._channel = WorkerChannel(
            runtime.paths.coordinator_endpoint, runtime.paths.imm_socket, self._deliver, self._end_server
        )
        # The IMM needs seconds to import SGLang; the launch continues meanwhile.
        self._channel_open = self._call(self._open_channel())
        atexit.register(self.stop)

    def _start_hmm(self) -> None:
        """Start this server's own HMM if it is not running."""
        if self.hmm is None or not self.hmm.alive():
            self.hmm = spawn_hmm(
                self.runtime.paths.hmm_endpoint,
                device.budgets(self.runtime.config),
                backend=device.memory_backend(),
            )

    async def _open_channel(self) -> None:
        await asyncio.to_thread(self._wait_for_imm)
        self._channel.open()

    def _wait_for_imm(self) -> None:
        ImmClient(self.runtime.paths.imm_socket, timeout_s=120.0).close()

    def _call(self, coroutine: Coroutine[Any, Any, _ResultT]) -> Future[_ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def _deliver(self, message: Incoming) -> None:
        if self._workers is None:
            self._early.append(message)
        else:
            self._workers.message(message)

    # -- once the first ranks serve -----------------------------------------------------------------------------

    def start_coordinator(self, tokenizer_manager: Any) -> Coordinator:
        """Called before the HTTP server starts, when all first ranks serve. The coordinator runs in `loop`."""
        self._tokenizer = tokenizer_manager
        self._channel_open.result(_HELLO_DEADLINE_S)
        self._coordinator = self._call(self._make_coordinator()).result(_HELLO_DEADLINE_S)
        return self._coordinator

    async def _make_coordinator(self) -> Coordinator:
        config = self.runtime.config
        membership = self.control.read_membership()
        hellos = await asyncio.gather(*(self._channel.wait_for(Hello, rank=rank) for rank in membership.ranks))
        placement = initial_placement(hellos[0].columns, membership.ranks)
        hmm = self._client
        await asyncio.to_thread(release_leftovers, hmm, placement, membership.ranks, config)
        self._workers = workers = Workers(
            config=config,
            channel=self._channel,
            hmm=hmm,
            control=self.control,
            sglang=SglangRouter(self._tokenizer, self._rank_lost),
            placement=placement,
        )
        for message in self._early:
            workers.message(message)
        self._early.clear()
        for hello in hellos:
            logger.info(
                "rank %d: booted in %.1f s, %.1f MiB from the checkpoint, %.1f MiB from other devices",
                hello.rank,
                hello.boot_s,
                hello.checkpoint_bytes / 2**20,
                hello.pulled_bytes / 2**20,
            )
        try:
            await workers.grow_kv()
        except ElasticMoEError as error:
            logger.error("KV could not grow into all free memory: %s", error)
        coordinator = Coordinator(
            config=config, membership=membership, placement=placement, memory=HmmMemory(hmm), workers=workers
        )
        self.policy = PolicyController(
            coordinator,
            config.policy_settings(),
            max_ep_size=config.max_ep_size,
            sample=measure.sample_of(self._tokenizer, lambda: workers.membership().ranks),
            meter=measure.METER,
            wait_s=config.prepare_deadline_s,
        )
        self._policy_task = self.loop.create_task(self.policy.run())
        self._kv_task = self.loop.create_task(workers.balance_kv(lambda: coordinator.idle))
        hmm_failover = HmmFailover(
            coordinator,
            workers,
            hmm,
            config,
            restart=None if self.hmm is None else self._start_hmm,
            ending=self._ending,
        )
        self._failover = FailoverController(
            coordinator,
            workers,
            deadline_s=config.commit_deadline_s,
            attempt_s=config.prepare_deadline_s,
            give_up_s=config.prepare_deadline_s,
            on_failure=self._end_server,
            memory_whole=hmm_failover.whole,
            tidy=hmm_failover.tidy,
        )
        return coordinator

    def _rank_lost(self, rank: int, reason: str) -> None:
        if self._failover is None:
            self._end_server(reason)
        elif not self._ending():
            self._failover.rank_lost(rank, reason)

    def output_passed(self, operation_id: str, rank: int) -> None:
        """Called in the tokenizer's event loop for the fence behind a rank's last output."""
        if self._workers is not None:
            self.loop.call_soon_threadsafe(self._workers.fences.passed, operation_id, rank)

    # -- the end --------------------------------------------------------------------------------------------------

    def _ending(self) -> bool:
        """All processes end, and none is to be replaced."""
        return self._ends

    def refuse_changes(self) -> None:
        """The server is to stop when its requests have ended. Until then a worker or an HMM that dies is replaced; a
        change that is still preparing is rolled back."""
        if self._coordinator is not None:
            self._closing = self._call(self._coordinator.close())

    async def begin_to_end(self) -> None:
        """The last request has ended. Returns when no change runs, so that all workers can be told to end."""
        if self._closing is not None:
            deadline_s = self.runtime.config.commit_deadline_s
            try:
                await asyncio.wait_for(asyncio.wrap_future(self._closing), deadline_s)
            except asyncio.TimeoutError:
                logger.warning("the change that runs did not end within %g s and is given up", deadline_s)
                self.ends()
                self._imm.kill()
        self.ends()
        self._stopped = True

    def leave(self) -> None:
        """To be called when the HTTP server has ended. If it was stopped, this process exits with status 0.

        What is registered with `atexit` runs; the interpreter's own end is left out, because it would spend up to two
        seconds on the modules that SGLang has imported.
        """
        if self._stopped:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def ends(self) -> None:
        """From here on nobody is missed."""
        self._ends = True

    def _end_server(self, sentence: str) -> None:
        """End the server through SGLang's handler of SIGQUIT, which kills the process tree."""
        if self._ending():
            return
        logger.critical("%s; the server ends, because it cannot serve its requests any more", sentence)
        os.kill(os.getpid(), signal.SIGQUIT)

    def stop(self) -> None:
        if self._imm.poll() is None:
            self._imm.kill()
        if self.hmm is not None:
            self.hmm.stop()


def start_services() -> Services:
    """Start the services, once, in the main process, before SGLang's first child process."""
    global _services
    runtime = current_runtime()
    assert runtime is not None
    assert _services is None, "one elastic server a process"
    _services = Services(runtime)
    return _services


def server_ends() -> None:
    """SGLang ends this server's processes, whatever the reason."""
    if _services is not None:
        _services.ends()


def services() -> Services:
    assert _services is not None, "the services were not started"
    return _services
