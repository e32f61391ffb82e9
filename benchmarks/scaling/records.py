"""The log of a run: every request, the arrival of every token, every change, memory over time. Plain JSON.

Times are seconds since the run's start, on one monotonic clock.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One output token as the client got it.

    position: its index in the output, 0 for the first. id: the token. Several tokens of one event share `at`.
    """

    at: float
    position: int
    id: int


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request, however it ended.

    Attributes:
        due_at: when the workload wanted it sent; sent_at: when the client did.
        wanted: output tokens asked for; the server has to produce exactly these.
        generation: number of the server that it was sent to, counted by the method; -1: there was none to send it to.
        ended_at: when the answer ended, or the error came.
        error: why it failed; None: the answer ended as it should.
    """

    request_id: int
    due_at: float
    sent_at: float
    prompt_tokens: int
    wanted: int
    generation: int = 0
    tokens: list[Token] = []
    ended_at: float
    error: str | None = None


class ChangeRecord(msgspec.Struct, kw_only=True):
    """One change of size.

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
    """Bytes of all processes of the method: proportional set size, so that a shared page counts once."""

    at: float
    host_bytes: int


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """From `at` on the method holds this many devices."""

    at: float
    devices: int


class DevicePeak(msgspec.Struct, frozen=True, kw_only=True):
    """One device in the HMM's ledger, bytes: before the run's first change, at most, and at the end."""

    device: int
    before: int
    peak: int
    after: int


class RunLog(msgspec.Struct, kw_only=True):
    """One method under one workload.

    Attributes:
        ended_at: when the last request had ended.
        load_ended_at: when the workload sent its last request; figures over the run end here.
        device_memory: from the HMM's ledger; empty for methods without one.
        about: model, machine, command, versions: for the report, not for the figures.
    """

    method: str
    load_ended_at: float
    ended_at: float
    requests: list[RequestRecord]
    changes: list[ChangeRecord] = []
    memory: list[MemorySample] = []
    holdings: list[Holding] = []
    device_memory: list[DevicePeak] = []
    about: dict[str, Any] = {}


def write_log(path: Path, log: RunLog) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(log))


def read_log(path: Path) -> RunLog:
    """Raises msgspec.DecodeError on a file that is no log."""
    return msgspec.json.decode(path.read_bytes(), type=RunLog)
