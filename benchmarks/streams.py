"""Clients that stream from a running server and record the arrival of every token.

For the demo and for benchmarks. Nothing is dropped: a failure of a stream stays in its record as a sentence, and a
record is in the list from the moment its request is sent. All times are `time.monotonic()` in seconds.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

Tokens = Callable[["StreamRecord", int], None]
"""Called with the record and the number of tokens that have just arrived for it."""

GAP_MEDIANS = 5
GAP_FLOOR_S = 0.15
_STALL_S = 60.0
_AFTER_FAILURE_S = 0.5
# An event repeats everything generated so far, text and ids, so a line grows with the output.
_LINE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One greedy request of known length. `key` tells which prompt it is: outputs of equal keys must be equal.
    prompt: text, or token ids for a server without a tokenizer."""

    key: str
    prompt: str | tuple[int, ...]
    tokens: int


@dataclass(kw_only=True)
class StreamRecord:
    """The result of one request, filled while it runs.

    Attributes:
        lane: which of the clients sent it.
        arrivals: of every token; tokens of one event share a time.
        failure: what went wrong, None while nothing did. A stream that ended with a failure or without exactly the
            tokens asked for is lost.
    """

    lane: int
    ask: Ask
    sent_at: float
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    ended_at: float | None = None
    failure: str | None = None

    @property
    def complete(self) -> bool:
        """It ended without an error, with exactly the tokens asked for."""
        return self.ended_at is not None and self.failure is None and len(self.token_ids) == self.ask.tokens

    @property
    def lost(self) -> bool:
        return self.ended_at is not None and not self.complete

    def gaps(self) -> list[tuple[float, float]]:
        """(when, seconds) between each token and the one before it, at the arrival of the later one."""
        return [(late, late - early) for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class WorstGap:
    """Of one stream around a change, seconds: its longest gap, and what that may be at most."""

    longest: float
    median: float

    @property
    def limit(self) -> float:
        """A gap that somebody who reads along notices: five usual ones, and not below 150 ms."""
        return max(GAP_MEDIANS * self.median, GAP_FLOOR_S)

    @property
    def over_limit(self) -> float:
        return self.longest / self.limit


def worst_gap(gaps: Sequence[tuple[float, float]], since: float, until: float) -> WorstGap | None:
    """The longest of a stream's gaps that lie in [since, until], even in part; None without one.

    Args:
        gaps: (when, seconds) as `StreamRecord.gaps` gives them, of the stream's whole life.
    """
    inside = [gap for at, gap in gaps if at > since and at - gap < until]
    if not inside:
        return None
    return WorstGap(longest=max(inside), median=statistics.median(gap for _, gap in gaps))


class _MetaInfo(msgspec.Struct):
    finish_reason: dict[str, object] | None = None


class _Event(msgspec.Struct):
    """The fields of one streamed event that matter here; the rest is not decoded."""

    output_ids: list[int] = []
    meta_info: _MetaInfo | None = None
    error: object = None


class StreamFailed(Exception):
    """The stream cannot continue; the text says why."""


class StreamClient:
    """Streams from SGLang's /generate; use as an async context manager.

    Args:
        url: scheme, host and port.
        on_tokens: told about every arrival, for live figures.
        stall_s: a stream without any token for so long has failed.
    """

    def __init__(self, url: str, on_tokens: Tokens | None = None, stall_s: float = _STALL_S) -> None:
        self._url = url.rstrip("/") + "/generate"
        self._on_tokens = on_tokens
        self._timeout = aiohttp.ClientTimeout(total=None, sock_read=stall_s)
        self._stall_s = stall_s
        self._decode = msgspec.json.Decoder(_Event).decode

    async def __aenter__(self) -> StreamClient:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, read_bufsize=_LINE_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def run(self, record: StreamRecord) -> None:
        """Send the request and fill `record` until the stream ends. Raises nothing but a cancellation."""
        try:
            await self._receive(record)
            if len(record.token_ids) != record.ask.tokens:
                record.failure = f"ended with {len(record.token_ids)} of {record.ask.tokens} tokens"
        except StreamFailed as error:
            record.failure = str(error)
        except asyncio.TimeoutError:
            record.failure = f"no token for {self._stall_s:g} s after {len(record.token_ids)} tokens"
        except (aiohttp.ClientError, ValueError) as error:
            record.failure = f"{type(error).__name__} after {len(record.token_ids)} tokens: {error}"
        except asyncio.CancelledError:
            record.failure = f"cancelled by the client after {len(record.token_ids)} tokens"
            raise
        finally:
            record.ended_at = time.monotonic()

    async def _receive(self, record: StreamRecord) -> None:
        sampling = {"max_new_tokens": record.ask.tokens, "temperature": 0, "ignore_eos": True}
        name = "text" if isinstance(record.ask.prompt, str) else "input_ids"
        body = {name: record.ask.prompt, "sampling_params": sampling, "stream": True}
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise StreamFailed(f"status {response.status}: {(await response.text())[:300]}")
            finished = False
            async for line in response.content:
                if line.startswith(b"data: {"):
                    finished = self._take(record, self._decode(line[len(b"data: ") :])) or finished
            if not finished:
                raise StreamFailed(f"the connection closed after {len(record.token_ids)} tokens")

    def _take(self, record: StreamRecord, event: _Event) -> bool:
        """Add an event's tokens to the record; True when it is the last event."""
        now = time.monotonic()
        if event.error is not None:
            raise StreamFailed(f"error after {len(record.token_ids)} tokens: {event.error}")
        known = len(record.token_ids)
        # Every event repeats the ids from the first on: a token that changed, came twice or went missing shows here.
        if event.output_ids[:known] != record.token_ids:
            raise StreamFailed(f"the first {known} tokens are not those that were streamed before")
        new = event.output_ids[known:]
        record.token_ids += new
        record.arrivals += [now] * len(new)
        if new and self._on_tokens is not None:
            self._on_tokens(record, len(new))
        reason = event.meta_info.finish_reason if event.meta_info is not None else None
        if reason is not None and reason.get("type") != "length":
            raise StreamFailed(f"ended after {len(record.token_ids)} tokens: {reason}")
        return reason is not None


class Load:
    """Lanes of streams: each lane sends its next request when the last one has ended, until `stop`.

    Args:
        client: entered by the caller.
        choose: (lane, round) -> what to ask for.
    """

    def __init__(self, client: StreamClient, choose: Callable[[int, int], Ask]) -> None:
        self.records: list[StreamRecord] = []
        self._client = client
        self._choose = choose
        self._stopping = False

    @property
    def running(self) -> int:
        return sum(record.ended_at is None for record in self.records)

    @property
    def lost(self) -> list[StreamRecord]:
        return [record for record in self.records if record.lost]

    def stop(self) -> None:
        """No new requests; running ones continue to their end."""
        self._stopping = True

    async def run(self, lanes: int) -> None:
        """Keep `lanes` streams going until `stop`, then until the last one has ended."""
        await asyncio.gather(*(self._lane(lane) for lane in range(lanes)))

    async def run_once(self, asks: Sequence[Ask]) -> None:
        """All of these at the same time, each once."""
        await asyncio.gather(*(self._one(lane, ask) for lane, ask in enumerate(asks)))

    async def _lane(self, lane: int) -> None:
        number = 0
        while not self._stopping:
            record = await self._one(lane, self._choose(lane, number))
            number += 1
            if record.failure is not None:
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _one(self, lane: int, ask: Ask) -> StreamRecord:
        record = StreamRecord(lane=lane, ask=ask, sent_at=time.monotonic())
        self.records.append(record)
        await self._client.run(record)
        return record


def unequal(records: Sequence[StreamRecord], reference: Sequence[StreamRecord]) -> list[str]:
    """One sentence for each record whose tokens differ from those of the reference with the same key.

    A shorter output must be the beginning of the longer one. A key without a reference is a difference too.
    """
    expected = {record.ask.key: record.token_ids for record in reference}
    found = []
    for record in records:
        tokens = expected.get(record.ask.key, [])
        length = min(len(tokens), len(record.token_ids))
        if length == 0:
            found.append(f"{record.ask.key}: nothing to compare with")
        elif tokens[:length] != record.token_ids[:length]:
            first = next(i for i in range(length) if tokens[i] != record.token_ids[i])
            found.append(f"{record.ask.key}: token {first} is {record.token_ids[first]}, expected {tokens[first]}")
    return found
