"""`python -m elasticmoe_patches.run MODULE`: a program that parses SGLang's flags itself finds ours among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import make_tiny_model

pytestmark = pytest.mark.process

# As NVIDIA Dynamo does it: a parser of SGLang's flags, without loading plugins.
PROGRAM = """
import argparse, json, os, sys
from sglang.srt.server_args import ServerArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    server_args = ServerArgs.from_cli_args(parser.parse_args(sys.argv[1:]))
    print(json.dumps([server_args.tp_size, json.loads(os.environ["ELASTICMOE_CONFIG"])["ep_size"]]))
"""


def test_a_program_finds_our_flags_among_sglangs(tmp_path: Path) -> None:
    (tmp_path / "dynamo_like.py").write_text(PROGRAM)
    model = make_tiny_model(tmp_path / "model")
    flags = ["--model-path", str(model), "--device", "cpu", "--elastic-ep-backend", "elasticmoe"]
    flags += ["--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]
    flags += ["--elasticmoe-run-dir", str(tmp_path / "r")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "elasticmoe_patches.run", "dynamo_like", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[4, 2]"


def test_without_a_module() -> None:
    command = [sys.executable, "-m", "elasticmoe_patches.run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "usage" in done.stderr
