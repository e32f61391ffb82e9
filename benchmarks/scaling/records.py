"""The log of a run: every request, the arrival of every token, every change, memory over time.

Compressed JSON (`.json.xz`). Times are seconds since the run's start on one monotonic clock, rounded to 0.1 ms when
they are written: figures are always computed from a log that was read back, so anybody recomputes the same ones.
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import msgspec

_DIGITS = 4


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request, however it ended.

    Attributes:
        due_at: when the workload wanted it sent; sent_at: when the client did.
        wanted: output tokens asked for; the server has to produce exactly these.
        generation: number of the server that it was sent to, counted by the method; -1: there was none to send it to.
        arrivals, token_ids: of each output token as the client got it. Tokens of one event share a time.
        ended_at: when the answer ended, or the error came.
        error: why it failed; None: the answer ended as it should.
    """

    request_id: int
    due_at: float
    sent_at: float
    wanted: int
    generation: int = 0
    arrivals: list[float] = []
    token_ids: list[int] = []
    ended_at: float
    error: str | None = None


class ChangeRecord(msgspec.Struct, kw_only=True):
    """One change of size; with `old_size` equal to `new_size` a moment at which nothing was changed, for comparison.

    Attributes:
        generation: the server of this number, or a later one, has the new size.
        effective_at: from here on that server computes at the new size; None: the change failed.
        ended_at: when nothing was left to do (memory freed, old server stopped).
        detail: what else the method knows, such as the operation's timings.
    """

    requested_at: float
    old_size: int
    new_size: int
    generation: int = 0
    effective_at: float | None
    ended_at: float
    error: str | None = None
    detail: dict[str, Any] = {}


class MemorySample(msgspec.Struct, frozen=True, array_like=True):
    """Bytes that all processes of the method hold, a shared page once."""

    at: float
    host_bytes: int


class DevicePeak(msgspec.Struct, frozen=True, kw_only=True):
    """One device in the HMM's ledger, bytes: before the first change, at most, and at the end."""

    device: int
    before: int
    peak: int
    after: int


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent: an open loop at `rate` requests a second, which is `share` of the capacity of the first size; or a
    closed loop of `lanes` clients, each of which waits for its answer."""

    rate: float | None = None
    share: float | None = None
    lanes: int | None = None


class RunLog(msgspec.Struct, kw_only=True):
    """One method under one workload.

    Attributes:
        arm, run, repetition: which of the experiment's runs it is.
        capacity: requests a second that a closed loop got from the same servers before, by size.
        ended_at: when the last request had ended.
        load_ended_at: when the workload sent its last request; figures over the run end here.
        device_memory: from the HMM's ledger; empty for methods without one.
        busy_cores: CPU time a second of the servers, of the client, and of everything else on the machine.
        about: machine, model, command: for the report, not for the figures.
    """

    arm: str
    run: str
    repetition: int
    method: str
    load: Load
    capacity: dict[int, float] = {}
    load_ended_at: float
    ended_at: float
    requests: list[RequestRecord]
    changes: list[ChangeRecord] = []
    memory: list[MemorySample] = []
    device_memory: list[DevicePeak] = []
    busy_cores: dict[str, float] = {}
    about: dict[str, Any] = {}


def write_log(path: Path, log: RunLog) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(msgspec.json.encode(_rounded(msgspec.to_builtins(log))), preset=9))


def read_log(path: Path) -> RunLog:
    """Raises msgspec.DecodeError or lzma.LZMAError for a file that is no log."""
    return msgspec.json.decode(lzma.decompress(path.read_bytes()), type=RunLog)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
