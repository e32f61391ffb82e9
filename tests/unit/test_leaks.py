"""The leak check sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.leaks import no_leaks


@pytest.mark.process
def test_nothing_left_behind_passes() -> None:
    with no_leaks(settle_s=0.2):
        os.close(os.memfd_create("short-lived"))
        subprocess.run([sys.executable, "-c", ""], check=True)


def test_an_open_descriptor_is_seen() -> None:
    descriptor = -1
    try:
        with pytest.raises(AssertionError, match="memfd:kept"), no_leaks(settle_s=0.1):
            descriptor = os.memfd_create("kept")
    finally:
        os.close(descriptor)


def test_a_second_socket_like_an_earlier_one_is_seen() -> None:
    first = os.pipe()
    second: tuple[int, int] | tuple[()] = ()
    try:
        with pytest.raises(AssertionError, match=r"pipe \(x2\)"), no_leaks(settle_s=0.1):
            second = os.pipe()
    finally:
        for descriptor in (*first, *second):
            os.close(descriptor)


def test_a_shared_memory_file_is_seen() -> None:
    path = Path("/dev/shm") / f"elasticmoe-leak-test-{os.getpid()}"
    try:
        with pytest.raises(AssertionError, match=path.name), no_leaks(settle_s=0.1):
            path.write_bytes(b"x")
    finally:
        path.unlink()


@pytest.mark.process
def test_a_child_that_runs_or_was_not_waited_for_is_seen() -> None:
    child = None
    try:
        with pytest.raises(AssertionError, match=r"process \d+"), no_leaks(settle_s=0.1):
            child = subprocess.Popen([sys.executable, "-c", "pass"])
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    finally:
        assert child is not None
        child.wait(timeout=10)
