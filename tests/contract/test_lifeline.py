"""The kernel ends what is tied to a lifeline: programs, stopped and busy processes, grandchildren."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe_sglang.lifeline import Lifeline
from tests.helpers.load import settled

TIE = "import os, sys; from elasticmoe_sglang.lifeline import tie; tie(sys.argv[1]); print('tied', flush=True); "
HOLDER = """
import subprocess, sys, time
from elasticmoe_sglang.lifeline import Lifeline
line = Lifeline.hold(sys.argv[1])
program = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
child = subprocess.Popen(program, stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Lifeline]:
    line = Lifeline.hold(str(tmp_path / "line"))
    yield line
    line.cut()


def tied(line: Lifeline, then: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", TIE + then, line.path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"tied\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize(
    "then",
    [
        "os.execv('/bin/sleep', ['sleep', '60'])",
        "os.kill(os.getpid(), 19)",
        "sum(range(10**12))",
        "os.fork() or tie(sys.argv[1]); import time; time.sleep(60)",
    ],
    ids=["another program", "stopped", "busy without letting go of the interpreter", "forked"],
)
def test_whoever_is_tied_ends_with_it(line: Lifeline, then: str) -> None:
    process = tied(line, then)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    other = tied(line, "import time; time.sleep(60)")
    other.kill()  # one that ends takes nobody along
    other.wait()
    assert process.poll() is None
    line.cut()
    assert process.wait(10) == -signal.SIGKILL


def test_it_is_cut_by_the_end_of_its_holder(tmp_path: Path) -> None:
    path = str(tmp_path / "line")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, TIE + "import time; time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    pidfd = os.pidfd_open(int(holder.stdout.readline()))
    holder.stdout.close()
    holder.kill()
    holder.wait()
    settled(lambda: has_ended(pidfd), 10, "its child has ended with it")
    os.close(pidfd)


def has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def test_only_this_user_may_open_it(line: Lifeline) -> None:
    assert Path(line.path).stat().st_mode & 0o777 == 0o600
