"""Wraps classes of the product when their modules are imported, if this process does without something.

Importing them here would cost every process, the HMM's too, what only workers need.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from benchmarks.scaling.ablation import without

Wrap = Callable[[ModuleType], None]


class _WrapOnImport:
    """An entry of `sys.meta_path`: leaves finding to the others, and runs the module's wrap once it is executed."""

    def __init__(self, wraps: dict[str, Wrap]) -> None:
        self._wraps = wraps

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        wrap = self._wraps.pop(name, None)  # so that the search below does not come here again
        if wrap is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def install() -> None:
    """To be called before the product is imported."""
    chosen = without()
    wraps: dict[str, Wrap] = {}
    if "standby" in chosen:
        wraps["elasticmoe_sglang.imm.server"] = wrap_imm
    if "peer-copy" in chosen:
        wraps["elasticmoe_sglang.worker.weights"] = wrap_weights
    if chosen & {"handles", "zero-copy"}:
        wraps["elasticmoe_sglang.hmm.client"] = wrap_client
    if wraps:
        sys.meta_path.insert(0, _WrapOnImport(wraps))


def wrap_imm(module: Any) -> None:
    """Without standbys: a joining rank starts as a program that has imported nothing."""
    make = module.ImmServer.__init__

    @functools.wraps(make)
    def init(self: Any, path: str, worker_main: Any, *, standbys: int, become: Any = None, **options: Any) -> None:
        if become is None:
            from benchmarks.scaling.ablation.standby import fresh

            worker_main = fresh(worker_main)
        else:
            standbys = 0  # its workers are programs of their own as it is
        make(self, path, worker_main, standbys=standbys, become=become, **options)

    module.ImmServer.__init__ = init


def wrap_weights(module: Any) -> None:
    """Without peers: a joining rank finds nothing on other devices, and so reads the checkpoint."""
    attach = module.WorkerWeights.attach

    @functools.wraps(attach)
    def attach_alone(self: Any, *arguments: Any, txn: str | None, fill_dense: bool, **options: Any) -> Any:
        if txn is None:  # a server's start
            return attach(self, *arguments, txn=txn, fill_dense=fill_dense, **options)
        client, self._client = self._client, _OwnDevice(self._client, self._device)
        try:
            return attach(self, *arguments, txn=txn, fill_dense=True, **options)
        finally:
            self._client = client

    module.WorkerWeights.attach = attach_alone


class _OwnDevice:
    """An HMM client that sees the blocks of one device only."""

    def __init__(self, client: Any, device: int) -> None:
        self._client = client
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def lookup(self, **query: Any) -> list[Any]:
        return [block for block in self._client.lookup(**query) if block.device == self._device]


def wrap_client(module: Any) -> None:
    """Without zero-copy or memory handles: a rank's copies are made in a dearer way."""
    make = module.HmmClient.__init__

    @functools.wraps(make)
    def init(self: Any, endpoint: str, *, name: str, **options: Any) -> None:
        if name.startswith("rank-"):
            from benchmarks.scaling.ablation.copies import chosen_copies

            options["backend"] = chosen_copies(without())
        make(self, endpoint, name=name, **options)
        if name.startswith("rank-"):
            from benchmarks.scaling.ablation.copies import require_cpu

            require_cpu(self)

    module.HmmClient.__init__ = init
