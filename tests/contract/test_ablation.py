"""Ablations of the benchmarks change how bytes come to a joining rank, never which bytes come."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.scaling.ablation import ABLATIONS, environment
from benchmarks.scaling.ablation.copies import StagedCopies, StreamedCopies, chosen_copies
from benchmarks.scaling.ablation.wrapping import wrap_weights
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.wire.to_hmm import ModelSpec
from elasticmoe_sglang.worker.weights import Attached, WorkerWeights
from tests.helpers.leaks import no_leaks

COLUMNS = 6
# Larger than one socket's buffer, and no multiple of a page.
COLUMN = ColumnLayout.of([("0.w13_weight", (3, 41_007), torch.float32), ("0.w2_weight", (5,), torch.float32)])
DENSE = DenseLayout.of([("embed", (7, 1_003), torch.float32)])
SPEC = ModelSpec(fingerprint="f", num_columns=COLUMNS, column_bytes=COLUMN.column_bytes, dense_bytes=DENSE.dense_bytes)


@pytest.fixture
def hmm(tmp_path: Path) -> Iterator[HmmProcess]:
    with no_leaks(), spawn_hmm(f"ipc://{tmp_path}/hmm.sock", (64 << 20, 64 << 20)) as process:
        yield process


def attach(memory: WorkerWeights, owned: list[int], txn: str | None) -> Attached:
    return memory.attach(
        SPEC, COLUMN, DENSE, owned=owned, txn=txn, dense_source=0, fill_dense=txn is None,
        table_device=torch.device("cpu"),
    )  # fmt: skip


def close(memory: WorkerWeights) -> None:
    memory.columns.close()
    memory.dense.close()


@pytest.mark.parametrize(
    ("without", "backend"),
    [(set(), None), ({"standby"}, None), ({"zero-copy"}, StagedCopies), ({"handles", "standby"}, StreamedCopies)],
)
def test_a_joining_rank_gets_the_same_bytes(hmm: HmmProcess, without: set[str], backend: type | None) -> None:
    with (
        HmmClient(hmm.endpoint, name="first") as first,
        HmmClient(hmm.endpoint, name="joining rank", backend=chosen_copies(without)) as second,
    ):
        if backend is not None:
            assert type(second.backend) is backend
        owner = WorkerWeights(first, rank=0, device=0, bytes_per_second=None, deadline_s=10)
        assert attach(owner, list(range(COLUMNS)), None).load_columns == frozenset(range(COLUMNS))
        torch.manual_seed(0)
        for view in (*owner.columns.views(COLUMN).values(), *owner.dense.views().values()):
            view.copy_(torch.randn(view.shape))
        owner.filled()
        joining_rank = WorkerWeights(second, rank=1, device=1, bytes_per_second=None, deadline_s=10)
        attached = attach(joining_rank, [1, 4], first.begin("change"))
        assert attached == Attached(load_columns=frozenset(), load_dense=False)
        assert joining_rank.pulled_bytes == 2 * COLUMN.column_bytes + DENSE.dense_bytes
        for name, view in joining_rank.columns.views(COLUMN).items():
            assert torch.equal(view[[1, 4]], owner.columns.views(COLUMN)[name][[1, 4]])
        assert torch.equal(joining_rank.dense.views()["embed"], owner.dense.views()["embed"])
        close(joining_rank)
        close(owner)


def test_without_peers_a_joining_rank_asks_for_everything(hmm: HmmProcess) -> None:
    with (
        HmmClient(hmm.endpoint, name="first") as first,
        HmmClient(hmm.endpoint, name="joining rank") as second,
    ):
        owner = WorkerWeights(first, rank=0, device=0, bytes_per_second=None, deadline_s=10)
        attach(owner, list(range(COLUMNS)), None)
        owner.filled()
        alone: type[WorkerWeights] = type("Alone", (WorkerWeights,), {})
        wrap_weights(SimpleNamespace(WorkerWeights=alone))
        joining_rank = alone(second, rank=1, device=1, bytes_per_second=None, deadline_s=10)
        assert attach(joining_rank, [1, 4], first.begin("change")) == Attached(
            load_columns=frozenset({1, 4}), load_dense=True
        )
        assert joining_rank.pulled_bytes == 0
        joining_rank.filled()
        assert all(block.sealed for block in first.lookup(device=1))
        close(joining_rank)
        close(owner)


@pytest.mark.parametrize("wrong", ["cache", "standby,", "handles,zero-copy"])
def test_what_cannot_be_left_out(wrong: str) -> None:
    with pytest.raises(UserInputError):
        environment(wrong.split(","))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("standby", "imm.server.ImmServer.__init__"),
        ("peer-copy", "worker.weights.WorkerWeights.attach"),
        ("handles", "hmm.client.HmmClient.__init__"),
        ("zero-copy", "hmm.client.HmmClient.__init__"),
        (None, "hmm.client.HmmClient.__init__"),
    ],
)
def test_every_process_of_the_server_is_wrapped(name: str | None, place: str) -> None:
    module, cls, method = f"elasticmoe_sglang.{place}".rsplit(".", 2)
    program = f"from {module} import {cls}; print(hasattr({cls}.{method}, '__wrapped__'))"
    env = {**os.environ, **environment([name] if name else [])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(name is not None), done.stderr
    assert name is None or name in ABLATIONS
