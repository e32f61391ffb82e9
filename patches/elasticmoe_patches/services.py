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
import uuid
from collections.abc import Collection, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from elasticmoe_patches import device, measure, prefork
from elasticmoe_patches.observability import Observability, observability
from elasticmoe_patches.runtime_state import replay
from elasticmoe_patches.senders import Sender, Senders
from elasticmoe_patches.srt.managers.communicator import ATTRIBUTE, Answers
from elasticmoe_sglang import run_dir_reaper
from elasticmoe_sglang.api.elastic_ep import ElasticEp
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.comm.region import format_region, open_region, release_stale_regions
from elasticmoe_sglang.config import AUTO, ElasticConfig
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.hmm_failover import HmmFailover
from elasticmoe_sglang.coordinator.memory import HmmMemory, drop_kv, release_leftovers
from elasticmoe_sglang.coordinator.observer import feed_status
from elasticmoe_sglang.coordinator.steps import Event
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, UserInputError, WorkerError
from elasticmoe_sglang.event_loop import run_in
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.imm.client import ImmClient, start_imm
from elasticmoe_sglang.imm.spare import SpareImm
from elasticmoe_sglang.lifeline import Lifeline
from elasticmoe_sglang.planner import View, initial_placement
from elasticmoe_sglang.policy.controller import PolicyController
from elasticmoe_sglang.policy.view import PolicyView
from elasticmoe_sglang.runtime import Runtime, current_runtime
from elasticmoe_sglang.wire.to_coordinator import Hello
from elasticmoe_sglang.wire.to_worker import CommitCommand
from elasticmoe_sglang.worker.idle import ENV_DOORBELLS, create_doorbells

logger = logging.getLogger(__name__)

_ResultT = TypeVar("_ResultT")
_HELLO_DEADLINE_S = 60.0
# For an HMM that takes the place of one that has ended, while survivors of a loss wait for it.
_MEMORY_S = 20.0
_LOOK_AT_IMM_S = 0.5
_services: Services | None = None


class SglangRouter:
    """The coordinator's `SglangPort`: sends on SGLang's sockets, in the tokenizer's event loop, which owns them."""

    def __init__(self, tokenizer_manager: Any, senders: Senders, config: ElasticConfig) -> None:
        self._config = config
        self._tokenizer = tokenizer_manager
        self._senders = senders
        self._answers: Answers = getattr(tokenizer_manager, ATTRIBUTE)

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
            self._answers.resume(len(self._config.replicas_of(ranks)))
            replay(self._tokenizer)

        await self._run(send())

    async def send_recover_route(self, operation_id: str, ranks: Sequence[int]) -> set[str]:
        from elasticmoe_patches.journal import open_requests
        from elasticmoe_patches.srt.managers.io_struct import ElasticRecoverRouteReq

        async def send() -> set[str]:
            # Without an await between: what is sent later goes to active ranks and is not missing anywhere.
            opened = open_requests(self._tokenizer)
            request = ElasticRecoverRouteReq(operation_id=operation_id, ranks=list(ranks))
            self._tokenizer._dispatch_to_scheduler(request)
            self._answers.resume(len(self._config.replicas_of(ranks)))
            self._answers.give_up_later()
            replay(self._tokenizer)
            return opened

        return await self._run(send())

    async def send_again(
        self, rids: set[str], *, gone: Collection[Sender], suspect: bool, ranks: Sequence[int] = ()
    ) -> int:
        from elasticmoe_patches.journal import send_again

        async def send() -> int:
            # Without an await between: what comes later of a dead worker is not in what is sent again.
            self._senders.bar(self._outputs_of(gone))
            return send_again(self._tokenizer, rids, suspect=suspect, ranks=ranks)

        if not rids:
            return 0
        return await self._run(send())

    def _outputs_of(self, gone: Collection[Sender]) -> Collection[Sender]:
        """SGLang names a replica in its outputs, and the rank that leads it sends them."""
        leading = self._config.leaders_of(rank for rank, _ in gone)
        return {(self._config.replica_of(rank), number) for rank, number in gone if rank in leading}

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
        observed: metrics and traces; None until the coordinator starts.
        instance_id: names this start of the server. senders: whose outputs count.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.instance_id = uuid.uuid4().hex
        self.senders = Senders()
        self.hmm: HmmProcess | None = None
        self._ends = False
        self._stopped = False
        may_fork = device.memory_backend() == "cpu" and prefork.possible()
        self._lifeline = Lifeline.hold(runtime.paths.lifeline)
        self._doorbells = create_doorbells(runtime.config.max_ep_size)
        self._imm: subprocess.Popen[bytes] | prefork.ForkedProcess | None = None
        self._spare_imm = SpareImm(lambda fd: self._new_imm(str(fd), fds=(fd,)))
        self._start_first(may_fork)
        if runtime.config.run_dir is None:
            run_dir_reaper.watch(str(runtime.paths.run_dir), os.getpid())
        if runtime.config.hmm_endpoint is None:
            self._start_hmm()
        self._client = HmmClient(runtime.hmm_endpoint, name="coordinator", server=True)
        self._client.connect(wait_s=device.SERVER_ENDS_S)
        release_stale_regions(self._client, runtime.run_id)
        drop_kv(self._client)
        # Stays open: a new HMM adopts the region from this lease.
        self._region = open_region(self._client, runtime.config, runtime.run_id)
        self.control: ControlPage = format_region(self._region, runtime.config)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="elasticmoe-coordinator", daemon=True)
        self._thread.start()
        self.observed: Observability | None = None
        self._tokenizer: Any = None
        self._early: list[Incoming] = []
        self._workers: Workers | None = None
        self._coordinator: Coordinator | None = None
        self.policy: PolicyController | None = None
        self._closing: concurrent.futures.Future[None] | None = None
        self._channel = WorkerChannel(
            runtime.paths.coordinator_endpoint, runtime.paths.imm_socket, self._deliver, self._start_imm
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

    def _start_first(self, may_fork: bool) -> None:
        """The IMM, and children for SGLang's controller and detokenizer: forks of this process where that is sound. On
        GPUs the IMM does without SGLang, and this process may have initialised CUDA."""
        if not may_fork:
            self._imm = self._new_imm()
            return
        self._imm = prefork.ForkedProcess(prefork.fork(self._run_imm))
        prefork.prepare(2, close=self._lifeline.let_go)

    def _run_imm(self) -> int:
        import setproctitle

        from elasticmoe_patches import imm

        setproctitle.setproctitle(imm.TITLE)
        self._lifeline.let_go()
        os.environ[ENV_DOORBELLS] = self._doorbell_numbers()
        imm.serve(device.memory_backend())
        return 0

    def _doorbell_numbers(self) -> str:
        return ",".join(map(str, self._doorbells))

    def _start_imm(self) -> subprocess.Popen[bytes] | None:
        """Start an IMM in the place of the one that has ended; None when the server is ending. It ends by the lifeline,
        like the workers."""
        if self.ending():
            return None
        if self._imm is not None:
            self._imm.kill()
            self._imm.wait()
        self._imm = started = self._spare_imm.take() or self._new_imm()
        self._keep_spare_imm()
        return started

    def _new_imm(self, *arguments: str, fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        return start_imm(
            "elasticmoe_patches.imm",
            [device.memory_backend(), *arguments],
            environment={ENV_DOORBELLS: self._doorbell_numbers()},
            fds=(*self._doorbells, *fds),
        )

    def _keep_spare_imm(self) -> None:
        """On GPUs another IMM imports for half a minute, in which a rank 0 that dies could not be replaced."""
        wanted = self.runtime.config.spare_imm
        if wanted == "on" or (wanted == AUTO and device.memory_backend() == "cuda"):
            try:
                self._spare_imm.prepare()
            except OSError as error:
                logger.error("no spare IMM could be started: %s", error)

    async def _open_channel(self) -> None:
        await asyncio.to_thread(self._wait_for_imm)
        self._channel.open()

    def _wait_for_imm(self) -> None:
        """Until it listens, however long its imports take, or has ended, and the launch with it."""
        assert self._imm is not None
        while True:
            try:
                ImmClient(self.runtime.paths.imm_socket, timeout_s=_LOOK_AT_IMM_S).close()
                return
            except WorkerError:
                if self._imm.poll() is not None:
                    self._end_server(f"the IMM ended with status {self._imm.returncode} while it started")
                    raise

    def _call(self, coroutine: Coroutine[Any, Any, _ResultT]) -> Future[_ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def _deliver(self, message: Incoming) -> None:
        if self.ending():
            return  # workers that are ended with the server are no losses
        if self._workers is None:
            self._early.append(message)
        else:
            self._workers.message(message)

    # -- once the first ranks serve -----------------------------------------------------------------------------

    def start_coordinator(self, tokenizer_manager: Any) -> None:
        """Called when all first ranks serve, before anybody can send a request. The coordinator runs in `loop`."""
        self._tokenizer = tokenizer_manager
        self._channel_open.result(_HELLO_DEADLINE_S)
        self._call(self._make_coordinator()).result(_HELLO_DEADLINE_S)

    @property
    def coordinator(self) -> Coordinator:
        assert self._coordinator is not None, "the first ranks do not serve yet"
        return self._coordinator

    @property
    def elastic(self) -> ElasticEp:
        """What callers in this process may do."""
        return ElasticEp(self.coordinator, instance_id=self.instance_id, loop=self.loop, policy=self.policy)

    async def _make_coordinator(self) -> Coordinator:
        config = self.runtime.config
        membership = self.control.read_membership()
        hellos = await asyncio.gather(*(self._channel.wait_for(Hello, rank=rank) for rank in membership.ranks))
        view = View(membership=membership, placement=initial_placement(hellos[0].columns, membership.ranks))
        self.control.publish(view)
        hmm = self._client
        await asyncio.to_thread(release_leftovers, hmm, view, config)
        self._workers = workers = Workers(
            config=config,
            channel=self._channel,
            hmm=hmm,
            control=self.control,
            sglang=SglangRouter(self._tokenizer, self.senders, config),
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
        self.observed = observability(self._tokenizer, config)
        observer = self.observed.observer
        self._coordinator = coordinator = Coordinator(
            config=config,
            view=view,
            pids=workers.pids,
            memory=HmmMemory(hmm),
            workers=workers,
            on_end=self._end_server,
            observer=observer,
        )
        workers.on_event = self._on_event
        if self.observed.metrics is not None:
            self._status_task = self.loop.create_task(feed_status(coordinator.status, observer))
        self.policy = PolicyController(
            coordinator,
            config.policy_settings(),
            max_ep_size=config.max_ep_size,
            replica_size=config.attention_tp,
            sample=measure.sample_of(
                self._tokenizer, lambda: config.replicas_of(workers.view().ranks), ranks_each=config.attention_tp
            ),
            meter=measure.METER,
            wait_s=config.prepare_deadline_s,
            on_step=self._policy_stepped,
        )
        self._policy_task = self.loop.create_task(self.policy.run())
        self._kv_task = self.loop.create_task(workers.balance_kv(lambda: coordinator.idle))
        if config.hot_standbys:
            self._hot_task = self.loop.create_task(workers.hot.run(lambda: coordinator.at_rest))
        hmm_failover = HmmFailover(
            coordinator,
            workers,
            hmm,
            config,
            restart=None if self.hmm is None else self._start_hmm,
            ending=self.ending,
        )
        coordinator.await_memory = lambda: hmm_failover.whole(_MEMORY_S)
        coordinator.tidy = hmm_failover.tidy
        workers.announce()
        self._keep_spare_imm()
        return coordinator

    def _policy_stepped(self, view: PolicyView) -> None:
        if self.observed is not None and self.observed.metrics is not None:
            self.observed.metrics.policy(
                attainment=view.attainment,
                goodput_tokens=view.goodput_tokens_per_s,
                desired_ranks=view.desired_ranks if view.desired_ranks is not None else view.ranks,
                decisions_total=view.decisions_total,
            )

    def _on_event(self, event: Event) -> None:
        if self._coordinator is not None and not self.ending():
            self._coordinator.post(event)

    def watch(self, watchdog: Any) -> None:
        """End the server as soon as one of the processes ends that SGLang's watchdog looks at once a second."""
        for process, title in zip(watchdog._processes, watchdog._names, strict=True):
            name = "data-parallel controller" if title.startswith("scheduler") else title
            try:
                pidfd = os.pidfd_open(process.pid)
            except ProcessLookupError:
                self._end_server(f"SGLang's {name} (pid {process.pid}) has ended")
                return
            self.loop.call_soon_threadsafe(self.loop.add_reader, pidfd, self._process_ended, pidfd, name, process.pid)

    def _process_ended(self, pidfd: int, name: str, pid: int) -> None:
        self.loop.remove_reader(pidfd)
        os.close(pidfd)
        self._end_server(f"SGLang's {name} (pid {pid}) has ended")

    def output_passed(self, operation_id: str, rank: int) -> None:
        """Called in the tokenizer's event loop for the fence behind a rank's last output."""
        if self._workers is not None:
            self.loop.call_soon_threadsafe(self._workers.fences.passed, operation_id, rank)

    # -- the end --------------------------------------------------------------------------------------------------

    def ending(self) -> bool:
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
                self._lifeline.cut()
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
        """Kill the process tree; through SGLang's handler of SIGQUIT where that has to dump requests first, which takes
        more than a minute."""
        from sglang.srt.utils import kill_process_tree

        if self.ending():
            return
        logger.critical("%s; the server ends, because it cannot serve its requests any more", sentence)
        if self._tokenizer is not None and self._tokenizer.crash_dump_folder:
            os.kill(os.getpid(), signal.SIGQUIT)
        else:
            kill_process_tree(os.getpid())

    def stop(self) -> None:
        self.ends()
        self._lifeline.cut()
        if self.hmm is not None:
            self.hmm.stop()


def start_services() -> Services:
    """Start the services, once, in the main process, before SGLang's first child process."""
    global _services
    runtime = current_runtime()
    assert runtime is not None
    refuse_another()
    _services = Services(runtime)
    return _services


def refuse_another() -> None:
    """Raises UserInputError if this process has, or had, an elastic server: its hooks and sockets are for that one."""
    if _services is not None:
        raise UserInputError(
            "this process has started an elastic server already", hint="Start another one in a process of its own"
        )


def server_ends() -> None:
    """SGLang ends this server's processes, whatever the reason."""
    if _services is not None:
        _services.ends()


def services() -> Services:
    assert _services is not None, "the services were not started"
    return _services
