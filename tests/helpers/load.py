"""Many streaming clients of one server: what each received and when, and whether every token came exactly once.

All of them live in one asyncio loop in a thread of its own, so that on two cores the clients take little from the
server and arrival times mean something.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import aiohttp

Cut = Literal["abort", "disconnect"]


@dataclass
class Output:
    """One of a request's answers (there are several with n > 1)."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    top_logprobs: list[Any] = field(default_factory=list)
    token_logprobs: list[Any] = field(default_factory=list)
    input_logprobs: list[Any] = field(default_factory=list)
    reasoning_tokens: int = 0
    finish: dict[str, Any] | None = None


class Stream:
    """One streamed request. Times are `time.time()` seconds, which the server's operations use too.

    Attributes:
        arrivals: (time, ids received until then), one entry an event, of all outputs together.
        ranks: ranks that reported tokens of it, in order.
        moves: tokens that had come, of its first output, when another rank than before reported for the first time.
        problems: what an event showed that must not be: a token that changed, text that was taken back.
        cut: how this client ended it early.
    """

    def __init__(self, prompt: Sequence[int] | str, wanted: int, body: dict[str, Any]) -> None:
        self.prompt = prompt
        self.wanted = wanted
        self.body = body
        self.rid = str(body["rid"])
        self.sent_at = 0.0
        self.ended_at = 0.0
        self.outputs: dict[int, Output] = {}
        self.arrivals: list[tuple[float, int]] = []
        self.ranks: list[int] = []
        self.moves: list[int] = []
        self.problems: list[str] = []
        self.cut: Cut | None = None
        self.error: str | None = None
        self.done: Future[None] = Future()
        self._task: asyncio.Task[None] | None = None

    @property
    def output(self) -> Output:
        return self.outputs.setdefault(0, Output())

    @property
    def ids(self) -> list[int]:
        return self.output.ids

    @property
    def first_at(self) -> float:
        """When the first token came; infinite when none did."""
        return self.arrivals[0][0] if self.arrivals else float("inf")

    @property
    def lost(self) -> bool:
        """It has ended, its client had not ended it, and it did not get all of its tokens."""
        complete = self.outputs and all(len(output.ids) == self.wanted for output in self.outputs.values())
        return self.done.done() and self.cut is None and not complete

    def gaps(self) -> list[float]:
        """Seconds between two arrivals."""
        times = [at for at, _ in self.arrivals]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def wait(self, timeout_s: float) -> Stream:
        """Until it has ended, however. Raises TimeoutError."""
        try:
            self.done.result(timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{self} has not ended after {timeout_s:g} s") from error
        return self

    def wait_for_tokens(self, count: int, timeout_s: float) -> Stream:
        """Until so many tokens have come, or it has ended. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while len(self.ids) < count and not self.done.done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self}: {len(self.ids)} of {count} tokens after {timeout_s:g} s")
            time.sleep(0.005)
        return self

    def take(self, event: Mapping[str, Any], *, incremental: bool) -> None:
        """One event of the stream."""
        if "error" in event:
            self.error = str(event["error"])
            return
        output = self.outputs.setdefault(int(event.get("index") or 0), Output())
        before = len(output.ids)
        meta = event["meta_info"]
        ids, text = list(event["output_ids"]), str(event["text"])
        logprobs, tops = meta.get("output_token_logprobs") or [], meta.get("output_top_logprobs") or []
        chosen = meta.get("output_token_ids_logprobs") or []
        if incremental:
            chosen = output.token_logprobs + chosen
            ids, text = output.ids + ids, output.text + text
            logprobs, tops = output.logprobs + logprobs, output.top_logprobs + tops
        elif ids[: len(output.ids)] != output.ids:
            self.problems.append(f"tokens that had been sent changed: {output.ids[-5:]}, then {ids[-6:]}")
        elif not text.startswith(output.text):
            self.problems.append(f"text was taken back: {output.text[-20:]!r}, then {text[-20:]!r}")
        if output.finish is not None:
            self.problems.append(f"an event came after the last one: {event}")
        output.ids, output.text, output.logprobs, output.top_logprobs = ids, text, logprobs, tops
        output.token_logprobs, output.reasoning_tokens = chosen, meta.get("reasoning_tokens") or 0
        output.input_logprobs = meta.get("input_token_logprobs") or output.input_logprobs
        output.finish = meta.get("finish_reason")
        # SGLang writes an event out after the next tokens may have come, so between events its count may be behind.
        counted = meta["completion_tokens"]
        if counted > len(ids) or (output.finish is not None and counted != len(ids)):
            self.problems.append(f"the server counts {counted} tokens and has sent {len(ids)}")
        rank = meta.get("dp_rank")
        if rank is not None and (not self.ranks or self.ranks[-1] != rank):
            if self.ranks:
                self.moves.append(before)
            self.ranks.append(rank)
        self.arrivals.append((time.time(), sum(len(each.ids) for each in self.outputs.values())))

    def check(self, expected: Sequence[int] | None = None) -> None:
        """Complete, and with exactly these ids; of a request that was cut short, the first of them."""
        assert self.done.done(), f"{self} goes on"
        assert not self.problems, f"{self}: {self.problems}"
        if self.cut is None:
            assert self.error is None, f"{self}: {self.error}"
            for output in self.outputs.values():
                assert output.finish is not None, f"{self} ended without a reason"
                assert output.finish["type"] != "abort", f"{self}: {output.finish}"
            assert self.outputs, f"{self} got no answer"
        if expected is None:
            return
        for output in self.outputs.values():
            wanted = list(expected[: self.wanted] if self.cut is None else expected[: len(output.ids)])
            assert output.ids == wanted, f"{self}: {first_difference(output.ids, wanted)}"

    def __str__(self) -> str:
        size = len(self.prompt)
        got = len(self.ids)
        how = f", cut by {self.cut}" if self.cut else ""
        return f"request {self.rid} ({size} tokens in, {got} of {self.wanted} out, on ranks {self.ranks}{how})"


def first_difference(got: Sequence[int], wanted: Sequence[int]) -> str:
    for index, (one, other) in enumerate(zip(got, wanted, strict=False)):
        if one != other:
            differ = sum(a != b for a, b in zip(got, wanted, strict=False))
            return f"token {index} is {one}, not {other} (got {len(got)}, wanted {len(wanted)}, {differ} differ)"
    return f"{len(got)} tokens where {len(wanted)} were wanted"


class Load:
    """Args:
    url: the server.
    headers: sent with every request (an API key).
    incremental: the server was started with --incremental-streaming-output: events carry only what is new.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, incremental: bool = False) -> None:
        self.url = url
        self.streams: list[Stream] = []
        self._headers = dict(headers or {})
        self._incremental = incremental
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        self._session = self._run(self._open())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _open(self) -> aiohttp.ClientSession:
        # A connection a stream, however many; a line holds all ids so far.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers, read_bufsize=1 << 20)

    async def _close(self) -> None:
        tasks = [stream._task for stream in self.streams if stream._task is not None and not stream._task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def start(self, prompt: Sequence[int] | str, wanted: int, **fields: Any) -> Stream:
        """Send one greedy request of exactly `wanted` tokens; `sampling` in `fields` adds sampling parameters."""
        sampling = {"max_new_tokens": wanted, "temperature": 0, "ignore_eos": True, **fields.pop("sampling", {})}
        name = "text" if isinstance(prompt, str) else "input_ids"
        body = {
            name: prompt if isinstance(prompt, str) else list(prompt),
            "sampling_params": sampling,
            "stream": True,
            "rid": uuid.uuid4().hex,
            **fields,
        }
        stream = Stream(prompt, wanted, body)
        self.streams.append(stream)
        stream.sent_at = time.time()
        self._loop.call_soon_threadsafe(self._begin, stream)
        return stream

    def _begin(self, stream: Stream) -> None:
        stream._task = self._loop.create_task(self._receive(stream))
        # A task that is cancelled before its first step runs no `finally` of its own.
        stream._task.add_done_callback(lambda _: self._end(stream))

    @staticmethod
    def _end(stream: Stream) -> None:
        stream.ended_at = time.time()
        if not stream.done.done():
            stream.done.set_result(None)

    async def _receive(self, stream: Stream) -> None:
        try:
            async with self._session.post(f"{self.url}/generate", json=stream.body) as response:
                if response.status != 200:
                    stream.error = f"status {response.status}: {(await response.text())[:500]}"
                    return
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        stream.take(json.loads(line[len(b"data: ") :]), incremental=self._incremental)
        except asyncio.CancelledError:
            stream.cut = stream.cut or "disconnect"
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            stream.error = f"{type(error).__name__}: {error}"

    def disconnect(self, stream: Stream) -> None:
        """Close the client's connection in the middle of its stream."""

        def close() -> None:
            if stream._task is not None and not stream._task.done():
                stream.cut = "disconnect"
                stream._task.cancel()

        self._loop.call_soon_threadsafe(close)

    def abort(self, stream: Stream) -> None:
        """Ask the server to abort it; the stream then ends by itself."""
        if not stream.done.done():
            stream.cut = "abort"
        self._run(self._post("/abort_request", {"rid": stream.rid}))

    async def _post(self, path: str, body: object) -> None:
        async with self._session.post(self.url + path, json=body) as response:
            await response.read()

    def wait(self, streams: Iterable[Stream] | None = None, timeout_s: float = 240.0) -> None:
        """Until all of them (all ever sent where None) have ended. Raises TimeoutError naming one that has not."""
        deadline = time.monotonic() + timeout_s
        for stream in list(self.streams if streams is None else streams):
            stream.wait(max(0.0, deadline - time.monotonic()))

    def summary(self) -> dict[str, Any]:
        """How many requests ended how, how many tokens came, how many streams went on at another rank."""
        ended = Counter(stream.cut or "complete" for stream in self.streams)
        return {
            "requests": len(self.streams),
            "ended": dict(sorted(ended.items())),
            "lost": sum(stream.lost for stream in self.streams),
            "tokens": sum(len(stream.ids) for stream in self.streams),
            "streams_on_several_ranks": sum(len(stream.ranks) > 1 for stream in self.streams),
        }


class Pump:
    """Keeps `concurrency` requests running, each made by `make`, until it is stopped."""

    def __init__(self, load: Load, make: Callable[[Load], Stream], concurrency: int) -> None:
        self._load = load
        self._make = make
        self._concurrency = concurrency
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pump", daemon=True)
        self.failure: BaseException | None = None
        self.streams: list[Stream] = []

    def __enter__(self) -> Pump:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10)
        if kind is None and self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        running: list[Stream] = []
        try:
            while not self._stop.wait(0.005):
                running = [stream for stream in running if not stream.done.done()]
                while len(running) < self._concurrency and not self._stop.is_set():
                    running.append(self._make(self._load))
                    self.streams.append(running[-1])
        except BaseException as error:
            self.failure = error


def longest_gap(streams: Iterable[Stream], since: float, until: float) -> tuple[float, float]:
    """Longest gap, in seconds, of any stream that overlaps [since, until], and the median gap of all of them."""
    longest, gaps = 0.0, []
    for stream in streams:
        times = [at for at, _ in stream.arrivals]
        for earlier, later in itertools.pairwise(times):
            gaps.append(later - earlier)
            if earlier <= until and later >= since:
                longest = max(longest, later - earlier)
    return longest, statistics.median(gaps) if gaps else 0.0


def silences(streams: Iterable[Stream]) -> Iterator[tuple[float, float]]:
    """Every time (from, until) in which none of the streams received a token."""
    return itertools.pairwise(sorted(at for stream in streams for at, _ in stream.arrivals))


def longest_silence(streams: Iterable[Stream], since: float, until: float) -> float:
    """The longest of them, in seconds, that overlaps [since, until]."""
    spans = (pair for pair in silences(streams) if pair[0] <= until and pair[1] >= since)
    return max((later - earlier for earlier, later in spans), default=0.0)


def settled(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `condition` holds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout_s:g} s")
        time.sleep(0.02)
