"""The run folder goes when its server has ended, and nothing of the reaper stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elasticmoe_sglang import run_dir_reaper

pytestmark = pytest.mark.process


def reapers(folder: Path) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in (process.info["cmdline"] or [])
        and "elasticmoe_sglang.run_dir_reaper" in process.info["cmdline"]
    ]


def gone(what, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not what()


def test_the_folder_goes_with_a_killed_server(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "hmm.sock").touch()
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run_dir_reaper.watch(str(folder), server.pid)
        # Its forks that led there may take a moment to end.
        assert gone(lambda: len(reapers(folder)) != 1)
        [pid] = reapers(folder)
        assert server.pid not in [parent.pid for parent in psutil.Process(pid).parents()]
        assert psutil.Process(pid).ppid() != psutil.Process().pid, "it would be ended with the server's children"
        assert folder.exists()
    finally:
        server.kill()
        server.wait()
    assert gone(folder.exists)
    assert gone(lambda: reapers(folder))


def test_a_server_that_is_gone_already(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    server = subprocess.Popen([sys.executable, "-c", ""])
    server.wait()
    run_dir_reaper.watch(str(folder), server.pid)
    assert not folder.exists()
