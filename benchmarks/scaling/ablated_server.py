"""`python -m benchmarks.scaling.ablated_server --without NAME[,NAME] ...`: `elasticmoe serve ...` without these.

For measurements only; docs/benchmarks.md says what a joining rank does instead.
"""

from __future__ import annotations

import os
import sys

from benchmarks.scaling.ablation import environment
from elasticmoe_sglang.errors import UserInputError


def main(argv: list[str]) -> int:
    """Becomes `elasticmoe serve`; returns only by an error."""
    if len(argv) < 2 or argv[0] != "--without":
        print(__doc__, file=sys.stderr)
        return 2
    try:
        os.environ.update(environment(argv[1].split(",")))
    except UserInputError as error:
        print(f"ablated_server: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "serve", *argv[2:]]
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
