"""Run a module as a program after SGLang's plugins were loaded.

    python -m elasticmoe_patches.run dynamo.sglang --model-path DIR --elasticmoe-ep-size 2 --elasticmoe-max-ep-size 4

For programs that parse SGLang's arguments themselves: SGLang loads plugins in its own launchers and in its Engine,
which is too late for flags that a plugin adds.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Run the module that the first argument names; the others are its own."""
    if len(sys.argv) < 2:
        print("usage: python -m elasticmoe_patches.run MODULE [ARGUMENTS]", file=sys.stderr)
        raise SystemExit(2)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
