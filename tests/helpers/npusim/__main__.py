"""`python -m tests.helpers.npusim ARGUMENTS...` is `python ARGUMENTS...` on a machine with four simulated NPUs."""

from __future__ import annotations

import os
import sys

import pytest

from tests.helpers import npusim

_DEVICES = 4


def main() -> None:
    try:
        python = npusim.python_or_skip()
    except pytest.skip.Exception as error:
        sys.exit(str(error))
    sys.stdout.flush()
    os.execve(python, [python, *sys.argv[1:]], npusim.environment(devices=_DEVICES))


if __name__ == "__main__":
    main()
