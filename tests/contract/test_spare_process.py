"""A process that waits to become the IMM: taken, died, never needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from elasticmoe_sglang.imm.spare import SpareImm
from tests.helpers.load import settled

WAITS = """
import sys
from elasticmoe_sglang.imm.spare import told_to_serve
sys.exit(42 if told_to_serve(int(sys.argv[1])) else 7)
"""
pytestmark = pytest.mark.usefixtures("gives_all_back")


@pytest.fixture
def started() -> list[subprocess.Popen[bytes]]:
    return []


@pytest.fixture
def spare(started: list[subprocess.Popen[bytes]]) -> Iterator[SpareImm]:
    def start(fd: int) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", WAITS, str(fd)], pass_fds=[fd]))
        return started[-1]

    made = SpareImm(start)
    yield made
    made.dismiss()


def test_one_waits_until_it_is_taken(spare: SpareImm, started: list[subprocess.Popen[bytes]]) -> None:
    assert spare.take() is None
    spare.prepare()
    spare.prepare()
    assert len(started) == 1 and spare.pid == started[0].pid
    taken = spare.take()
    assert taken is started[0] and spare.pid is None
    assert taken.wait(20) == 42
    spare.prepare()
    assert spare.pid == started[1].pid


def test_one_that_has_died_is_not_taken(spare: SpareImm, started: list[subprocess.Popen[bytes]]) -> None:
    spare.prepare()
    started[0].kill()
    settled(lambda: spare.pid is None, 20, "its death is seen")
    assert spare.take() is None
    spare.prepare()
    started[1].kill()
    settled(lambda: spare.pid is None, 20, "its death is seen")
    spare.prepare()
    assert spare.pid == started[2].pid


def test_one_that_is_not_needed_ends(spare: SpareImm, started: list[subprocess.Popen[bytes]]) -> None:
    spare.prepare()
    spare.dismiss()
    assert started[0].returncode is not None and spare.take() is None


def test_one_ends_with_who_started_it() -> None:
    program = f"""
import os, subprocess, sys
from elasticmoe_sglang.imm.spare import SpareImm
spare = SpareImm(lambda fd: subprocess.Popen([sys.executable, "-c", {WAITS!r}, str(fd)], pass_fds=[fd]))
spare.prepare()
print(spare.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)

    def gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    settled(gone, 20, "it has read the end of the pipe")


def test_what_cannot_be_started_leaves_nothing() -> None:
    def start(_fd: int) -> subprocess.Popen[bytes]:
        raise OSError("no room")

    spare = SpareImm(start)
    with pytest.raises(OSError, match="no room"):
        spare.prepare()
    assert spare.pid is None and spare.take() is None
