"""An HMM process and a client of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from tests.helpers.hmm_clients import BUDGETS, eventually
from tests.helpers.leaks import holdings


@pytest.fixture
def gives_all_back() -> Iterator[None]:
    """Every test gives back its descriptors and waits for its processes."""
    before = replace(holdings(), shm_files=frozenset())
    yield
    gc.collect()
    eventually(lambda: not replace(holdings(), shm_files=frozenset()).beyond(before))


@pytest.fixture
def budgets() -> Sequence[int]:
    """Of the HMM's devices; a module may have its own."""
    return BUDGETS


@pytest.fixture
def hmm(tmp_path: Path, budgets: Sequence[int]) -> Iterator[HmmProcess]:
    with spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", budgets, log_path=tmp_path / "hmm.log") as process:
        yield process
        assert process.alive(), (tmp_path / "hmm.log").read_text()
        with HmmClient(process.endpoint, name="check") as check:
            assert check.status().counters.internal_errors == 0, (tmp_path / "hmm.log").read_text()
    assert process.process.returncode == 0
    assert list((tmp_path / "run").iterdir()) == []


@pytest.fixture
def client(hmm: HmmProcess) -> Iterator[HmmClient]:
    backend = CpuBackend()
    with HmmClient(hmm.endpoint, name="rank-0", backend=backend) as client:
        yield client
