"""What runs beside SGLang in the main process: the HMM and the IMM as child processes, the coordinator as a thread.

The coordinator has an event loop of its own, so that neither a busy HTTP server nor an Engine without one can hold up
a change; HTTP handlers reach it through `Handle`.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from elasticmoe_patches import device
from elasticmoe_patches.srt.managers.communicator import ATTRIBUTE, Answers
from elasticmoe_sglang import run_dir_reaper
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.comm.server_region import format_region, open_region, release_stale_regions
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.failover import FailoverController
from elasticmoe_sglang.coordinator.handle import CoordinatorHandle
from elasticmoe_sglang.coordinator.hmm_failover import HmmFailover
from elasticmoe_sglang.coordinator.kv_balancer import KvBalancer
from elasticmoe_sglang.coordinator.memory_port import HmmMemory, drop_kv, release_leftovers
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, WorkerError
from elasticmoe_sglang.hmm.client import AsyncHmmClient, HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.imm.client import ImmClient, start_imm
from elasticmoe_sglang.planner import initial_placement
from elasticmoe_sglang.runtime import Runtime, current_runtime
from elasticmoe_sglang.wire import to_worker as sm

logger = logging.getLogger(__name__)

_ResultT = TypeVar("_ResultT")
_HELLO_DEADLINE_S = 60.0
# What a dead rank had sent before its death is through the detokenizer by then.
_LAST_OUTPUT_S = 0.05
_services: Services | None = None


class Services:
    """Started before SGLang's first child process; ends with the main process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.coordinator: Coordinator | None = None
        self.hmm: HmmProcess | None = None
        if runtime.config.run_dir is None:
            run_dir_reaper.watch(str(runtime.paths.run_dir), os.getpid())
        if runtime.config.hmm_endpoint is None:
            self._start_hmm()
        self._client = HmmClient(runtime.hmm_endpoint, name="coordinator")
        release_stale_regions(self._client, runtime.run_id)
        drop_kv(self._client)
        # The handle stays open: another HMM gets the region from here.
        self._region = open_region(self._client, runtime.config, runtime.run_id)
        self.control: ControlPage = format_region(self._region, runtime.config)
        self._imm: subprocess.Popen[bytes] = start_imm("elasticmoe_patches.imm", [device.memory_backend()])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="elasticmoe-coordinator", daemon=True)
        self._thread.start()
        self._tokenizer: Any = None
        self._early: list[Incoming] = []
        self._workers: Workers | None = None
        self._closing: concurrent.futures.Future[None] | None = None
        self._ends = False
        self._channel = WorkerChannel(
            runtime.paths.coordinator_endpoint, runtime.paths.imm_socket, self._deliver, self._end_server
        )
        # The IMM takes its time to import SGLang; the launch goes on meanwhile.
        self._lines_open = self.call(self._open_lines())
        atexit.register(self.stop)

    def _start_hmm(self) -> None:
        """Our own HMM, if it is not running."""
        if self.hmm is None or not self.hmm.alive():
            self.hmm = spawn_hmm(
                self.runtime.paths.hmm_endpoint,
                device.budgets(self.runtime.config),
                backend=device.memory_backend(),
            )

    async def _open_lines(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._wait_for_imm)
        self._channel.open()

    def _wait_for_imm(self) -> None:
        ImmClient(self.runtime.paths.imm_socket, timeout_s=120.0).close()

    def call(self, coroutine: Coroutine[Any, Any, _ResultT]) -> Any:
        """Run in the coordinator's loop; a concurrent future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _deliver(self, message: Incoming) -> None:
        if self._workers is None:
            self._early.append(message)
        else:
            self._workers.message(message)

    # -- once the server stands ---------------------------------------------------------------------------------

    def start_coordinator(self, tokenizer_manager: Any) -> CoordinatorHandle:
        """Called by the HTTP server's start, when all first ranks serve."""
        self._tokenizer = tokenizer_manager
        self._lines_open.result(_HELLO_DEADLINE_S)
        self.coordinator = self.call(self._make_coordinator()).result(_HELLO_DEADLINE_S)
        return CoordinatorHandle(self.coordinator, self._loop)

    async def _make_coordinator(self) -> Coordinator:
        config = self.runtime.config
        membership = self.control.read_membership()
        hellos = await asyncio.gather(*(self._channel.wait_for(sm.Hello, rank=rank) for rank in membership.ranks))
        placement = initial_placement(hellos[0].columns, membership.ranks)
        hmm = AsyncHmmClient(self.runtime.hmm_endpoint, name="coordinator", client=self._client)
        await release_leftovers(hmm, placement, membership.ranks, config)
        self._workers = Workers(
            config=config,
            channel=self._channel,
            hmm=hmm,
            control=self.control,
            placement=placement,
            send_command=self._send_command,
            send_route=self._send_route,
            send_recover_route=self._send_recover_route,
            send_again=self._send_again,
            on_rank_lost=lambda rank, why: None if self._ending() else healer.rank_lost(rank, why),
        )
        for message in self._early:
            self._workers.message(message)
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
            await self._workers.grow_kv()
        except ElasticMoEError as error:
            logger.error("KV could not be given all memory that is free: %s", error)
        coordinator = Coordinator(
            config=config, membership=membership, placement=placement, memory=HmmMemory(hmm), ranks=self._workers
        )
        self._kv_keeper = KvBalancer(coordinator, self._workers)
        watch = HmmFailover(
            coordinator,
            self._workers,
            hmm,
            config,
            restart=None if self.hmm is None else self._start_hmm,
            ending=self._ending,
        )
        healer = FailoverController(
            coordinator,
            self._workers,
            deadline_s=config.commit_deadline_s,
            on_failure=self._end_server,
            memory_whole=watch.whole,
            tidy=watch.tidy,
        )
        return coordinator

    # -- SGLang's message way, owned by the main thread's event loop -----------------------------------------------

    async def _send_command(self, command: bytes) -> None:
        from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq

        await self._await_in_tokenizer_loop(self._answers().hold())
        await self._send(ElasticCommandReq(command=command))

    async def _send_route(self, ranks: Sequence[int]) -> None:
        from elasticmoe_patches.srt.managers.io_struct import ElasticRouteReq

        await self._send(ElasticRouteReq(ranks=list(ranks)))
        await self._in_tokenizer_loop(lambda: self._answers().resume(len(ranks)))

    async def _send(self, request: Any) -> None:
        await self._in_tokenizer_loop(lambda: self._tokenizer._dispatch_to_scheduler(request))

    async def _in_tokenizer_loop(self, function: Callable[[], _ResultT]) -> _ResultT:
        """SGLang's sockets and request states belong to the tokenizer's event loop."""

        async def call() -> _ResultT:
            return function()

        return await self._await_in_tokenizer_loop(call())

    async def _await_in_tokenizer_loop(self, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
        loop = self._tokenizer.event_loop
        if loop is None:
            coroutine.close()
            raise WorkerError("the tokenizer's event loop has not started", hint="Send the request over HTTP")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    def _answers(self) -> Answers:
        answers: Answers = getattr(self._tokenizer, ATTRIBUTE)
        return answers

    async def _send_recover_route(self, operation_id: str, ranks: Sequence[int]) -> set[str]:
        from elasticmoe_patches.journal import open_requests
        from elasticmoe_patches.srt.managers.io_struct import ElasticRecoverRouteReq

        def send() -> set[str]:
            # At one moment: what is sent later goes to living ranks and is not missing anywhere.
            opened = open_requests(self._tokenizer)
            request = ElasticRecoverRouteReq(operation_id=operation_id, ranks=list(ranks))
            self._tokenizer._dispatch_to_scheduler(request)
            self._answers().resume(len(ranks))
            self._answers().give_up_later()
            return opened

        return await self._in_tokenizer_loop(send)

    async def _send_again(self, rids: set[str]) -> int:
        from elasticmoe_patches.journal import send_again

        if not rids:
            return 0
        await asyncio.sleep(_LAST_OUTPUT_S)
        return await self._in_tokenizer_loop(lambda: send_again(self._tokenizer, rids))

    def output_passed(self, operation_id: str, rank: int) -> None:
        """In the tokenizer's loop: the fence behind what a rank had sent."""
        if self._workers is not None:
            self._loop.call_soon_threadsafe(self._workers.fences.passed, operation_id, rank)

    # -- the end --------------------------------------------------------------------------------------------------

    def _ending(self) -> bool:
        """All processes end, and none is to be replaced."""
        return self._ends

    def refuse_changes(self) -> None:
        """The server is to stop when its requests have ended. Until then a worker or an HMM that dies is replaced; a
        change that is still preparing is rolled back."""
        if self.coordinator is not None:
            self._closing = self.call(self.coordinator.close())

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

    def ends(self) -> None:
        """From here on nobody is missed."""
        self._ends = True

    def _end_server(self, sentence: str) -> None:
        """SGLang's own way of ending: its handler of this signal ends the process tree."""
        if self._ending():
            return
        logger.critical("%s; the server ends, because its requests cannot go on", sentence)
        os.kill(os.getpid(), signal.SIGQUIT)

    def stop(self) -> None:
        if self._imm.poll() is None:
            self._imm.kill()
        if self.hmm is not None:
            self.hmm.stop()


def start_services() -> Services:
    """Start them once; in the main process, before its first child."""
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
