"""Where the parts of one server find each other: a run folder (0700) that holds every socket.

The launcher creates it, puts its path and the checked configuration into the environment, and every process of the
server reads them from there (plugins are loaded in spawned processes before SGLang hands them any argument).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UserInputError

ENV_CONFIG = "ELASTICMOE_CONFIG"
ENV_RUN_DIR = "ELASTICMOE_RUN_DIR"
# Linux limits a Unix socket's path to 107 bytes; the longest name below takes 21.
_MAX_RUN_DIR = 86


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Socket paths of one server."""

    run_dir: Path

    @property
    def hmm_endpoint(self) -> str:
        return f"ipc://{self.run_dir}/hmm.sock"

    @property
    def coordinator_endpoint(self) -> str:
        return f"ipc://{self.run_dir}/coord.sock"

    @property
    def imm_socket(self) -> str:
        return f"{self.run_dir}/imm.sock"

    @property
    def lifeline(self) -> str:
        """The pipe that ends the server's processes with its main process; see `lifeline.py`."""
        return f"{self.run_dir}/lifeline"

    def peer_endpoint(self, rank: int) -> str:
        """Where a rank takes over requests from a retiring rank."""
        return f"ipc://{self.run_dir}/peer-{rank}.sock"

    def sglang_endpoint(self, name: str) -> str:
        """Where one of SGLang's own processes receives."""
        return f"ipc://{self.run_dir}/sgl-{name}.sock"

    def rank_endpoint(self, rank: int) -> str:
        """Where a rank's scheduler gets requests from the data-parallel controller."""
        return self.sglang_endpoint(f"rank-{rank}")

    def create(self) -> None:
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.run_dir.stat().st_uid != os.getuid():
            raise UserInputError(f"the run folder {self.run_dir} belongs to another user", hint="Choose another one.")
        self.run_dir.chmod(0o700)


def only_this_user(endpoint: str) -> None:
    """Close the bound socket at `ipc://PATH` to other users (0600), as its folder is too (0700)."""
    os.chmod(endpoint.removeprefix("ipc://"), 0o600)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The configuration and paths of the server that this process belongs to."""

    config: ElasticConfig
    paths: RunPaths

    @property
    def hmm_endpoint(self) -> str:
        return self.config.hmm_endpoint or self.paths.hmm_endpoint

    @property
    def run_id(self) -> str:
        """Tells this server's shared region from that of an earlier one on the same HMM."""
        return hashlib.sha256(os.fsencode(self.paths.run_dir)).hexdigest()[:16]

    def export(self) -> None:
        """Make it visible to every process started from here on."""
        os.environ[ENV_CONFIG] = json.dumps(self.config.to_dict())
        os.environ[ENV_RUN_DIR] = str(self.paths.run_dir)


def new_runtime(config: ElasticConfig) -> Runtime:
    """Create the run folder for a server about to start.

    Raises:
        UserInputError: the folder's path is too long for a Unix socket, or it belongs to somebody else.
    """
    run_dir = Path(config.run_dir) if config.run_dir else Path(tempfile.mkdtemp(prefix="elasticmoe-"))
    if len(os.fsencode(run_dir.absolute())) > _MAX_RUN_DIR:
        raise UserInputError(
            f"the run folder's path is too long for a Unix socket ({run_dir})",
            hint=f"Use a path of at most {_MAX_RUN_DIR} bytes.",
        )
    paths = RunPaths(run_dir=run_dir.absolute())
    paths.create()
    return Runtime(config=config, paths=paths)


def current_runtime() -> Runtime | None:
    """The runtime this process was started under, or None when the server is not elastic."""
    text = os.environ.get(ENV_CONFIG)
    run_dir = os.environ.get(ENV_RUN_DIR)
    if not text or not run_dir:
        return None
    return Runtime(config=ElasticConfig.from_dict(json.loads(text)), paths=RunPaths(run_dir=Path(run_dir)))
