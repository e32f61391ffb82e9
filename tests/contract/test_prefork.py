"""Processes that are forks of the main process behave as those that multiprocessing spawns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, multiprocessing, os, signal, socket, sys, threading, time
from elasticmoe_patches import prefork

def tell(writer, word):
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    stdin = os.readlink("/proc/self/fd/0")
    writer.send([os.getpid(), os.getppid(), word, os.environ.get("SET_LATER"), os.environ.get("GONE"), ignored, stdin])
    sys.exit(7)

def run_tell():
    reader, writer = multiprocessing.Pipe(duplex=False)
    with prefork.used():
        process = multiprocessing.Process(target=tell, args=(writer, "hello"))
        process.start()
    told = reader.recv()
    process.join(30)
    return process, told

def sleep():
    time.sleep(60)

def children():
    pids = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    return [pid for pid in pids if b"resource_tracker" not in open(f"/proc/{pid}/cmdline", "rb").read()]

def main():
    multiprocessing.set_start_method("spawn")
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.environ["GONE"] = "1"
    CODE

if __name__ == "__main__":
    main()
"""


def run(tmp_path: Path, code: str) -> Any:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("CODE", code.strip().replace("\n", "\n    ")))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_runs_in_a_child_that_waits(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
prefork.prepare(1, lambda: None)
waiting = prefork._waiting[0][0]
os.environ["SET_LATER"] = "yes"
del os.environ["GONE"]
process, told = run_tell()
print(json.dumps([waiting, os.getpid(), process.pid, process.exitcode, *told, children()]))
""",
    )
    waiting, main, pid, status, told_pid, parent, *rest, left = found
    assert waiting == pid == told_pid and parent == main
    assert status == 7
    assert rest == ["hello", "yes", None, True, os.devnull]
    assert left == []


def test_without_a_child_that_waits_it_is_spawned(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
prefork.prepare(1, lambda: None)
os.kill(prefork._waiting[0][0], signal.SIGKILL)
time.sleep(0.2)
process, told = run_tell()
print(json.dumps([told[2], process.exitcode]))
""",
    )
    assert found == ["hello", 7]


def test_its_end_is_seen_and_it_can_be_killed(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
from multiprocessing.connection import wait
prefork.prepare(2, lambda: None)
with prefork.used():
    process = multiprocessing.Process(target=sleep)
    process.start()
alive = process.is_alive()
process.kill()
seen = wait([process.sentinel], 10) == [process.sentinel]
process.join(10)
prefork.dismiss()
print(json.dumps([alive, seen, process.exitcode, children()]))
""",
    )
    assert found == [True, True, -9, []]


def test_a_child_that_waits_ends_with_the_main_process(tmp_path: Path) -> None:
    pid = run(
        tmp_path,
        """
prefork.prepare(1, lambda: None)
print(json.dumps(prefork._waiting[0][0]), flush=True)
os._exit(0)
""",
    )
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError("it is still there")


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", True),
        ("threading.Thread(target=time.sleep, args=(5,), daemon=True).start()", False),
        ("sock = socket.socket()", False),
        ("pipe = os.pipe()", False),
    ],
)
def test_forking_is_refused_where_it_is_not_sound(tmp_path: Path, before: str, expected: bool) -> None:
    assert run(tmp_path, f"{before}\nprint(json.dumps(prefork.possible()), flush=True)\nos._exit(0)") == expected


def test_a_fork_that_fails_says_why_and_exits_with_1(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
def fail():
    raise ValueError("what went wrong")
sys.stderr = sys.stdout
child = prefork.ForkedProcess(prefork.fork(fail))
child.wait()
print(json.dumps([child.poll(), child.returncode]))
""",
    )
    assert found == [1, 1]
