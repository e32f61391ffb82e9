"""What another program of this project answers: JSON in its last line of output."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TypeVar

import msgspec

_Answer = TypeVar("_Answer")


def ask_program(
    module: str, *words: str, answer: type[_Answer], timeout_s: float, silent: str = "no output"
) -> _Answer | str:
    """Run `python -m module words…`; its answer, or a sentence that says why there is none.

    Args:
        silent: the sentence where it left nothing on stderr either; `{status}` is its exit status.
    """
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer from `{' '.join(command)}` within {timeout_s:.0f} s"
    try:
        # Libraries may print while they are imported; the answer is the last line.
        return msgspec.convert(json.loads(done.stdout.strip().rpartition("\n")[2]), answer)
    except (ValueError, msgspec.ValidationError):
        return (done.stderr.strip().splitlines() or [silent.format(status=done.returncode)])[-1]
