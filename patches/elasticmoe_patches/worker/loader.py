"""Loading into, or attaching to, the HMM's memory.

The model is built by SGLang; its dense parameters are then rebound to the device's dense block and its expert weights
to the rank's column space. What no device holds yet is read from the checkpoint, each byte by one rank only: columns by
the rank that owns them, the dense block by rank 0 (a part of it by each rank of the first replica, where attention is
tensor-parallel). A joining rank reads nothing.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.loader import (
    DefaultModelLoader,
    _get_quantization_config,
    _initialize_model,
    post_load_weights,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype

from elasticmoe_kernels.reference.route import turns_of_rows
from elasticmoe_patches.device import torch_device
from elasticmoe_patches.worker.dummy_weights import dummy_fingerprint, fill_dummy
from elasticmoe_patches.worker.own_rows import rows_of_each
from elasticmoe_patches.worker.stacked import check_filled, is_stacked, limit_columns
from elasticmoe_patches.worker.worker import LoadedModel, Worker, current_worker
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.planner import TURNS, Placement, initial_placement
from elasticmoe_sglang.wire.to_hmm import ModelSpec
from elasticmoe_sglang.worker.weights import Attached, WorkerWeights

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_EXPERT_WEIGHTS = (
    "w13_weight",
    "w2_weight",
    "w13_weight_scale_inv",
    "w2_weight_scale_inv",
    "w13_weight_bias",
    "w2_weight_bias",
)
_SAMPLE = 1 << 16


def fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """Content fingerprint of a checkpoint: its config, and of each weight file header, size, first and last 64 KiB.

    Reading all of it would cost what attaching saves; the header holds every tensor's name, dtype, shape and offset.
    """
    digest = hashlib.sha256(str(dtype).encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} {header}".encode())
            digest.update(file.read(header + _SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()


def moe_layers(model: torch.nn.Module) -> list[FusedMoE]:
    return sorted((m for m in model.modules() if isinstance(m, FusedMoE)), key=lambda layer: layer.layer_id)


def column_layout(layers: list[FusedMoE]) -> ColumnLayout:
    """One expert over all layers, scales of block-quantised weights and biases included; names are
    `<layer>.<weight>`."""
    entries = []
    for layer in layers:
        for name, param in layer.named_parameters(recurse=False):
            if name not in _EXPERT_WEIGHTS:
                raise UserInputError(f"the MoE layer has a per-expert weight {name} that is not supported")
            entries.append((f"{layer.layer_id}.{name}", tuple(param.shape[1:]), param.dtype))
    return ColumnLayout.of(entries)


def stacked_parameters(layers: list[FusedMoE]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights and biases of layers whose checkpoints have all experts in one tensor, named `<layer>.<weight>`."""
    for layer in layers:
        if layer.moe_runner_config.gemm1_alpha is not None:
            for name, param in layer.named_parameters(recurse=False):
                yield f"{layer.layer_id}.{name}", param


def dense_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Everything but the experts; a tied parameter is named once."""
    return {name: param for name, param in model.named_parameters() if param.device.type != "meta"}


def dense_layout(parameters: dict[str, torch.nn.Parameter]) -> DenseLayout:
    return DenseLayout.of((name, tuple(param.shape), param.dtype) for name, param in parameters.items())


def bind(
    layers: list[FusedMoE],
    parameters: dict[str, torch.nn.Parameter],
    memory: WorkerWeights,
    columns: ColumnLayout,
    table: Any,
    found: Attached,
) -> None:
    """Point the model's parameters at the mapped memory.

    Args:
        table: what maps expert ids to slots.
        found: what is to be filled here. Scalars of a dense block that is keep what SGLang gave them: a checkpoint need
            not have them (the scales of a KV cache).
    """
    dense = memory.dense.views()
    for name, param in parameters.items():
        if found.load_dense and param.dim() == 0:
            dense[name].copy_(param.data)
        param.data = dense[name]
    views = memory.columns.views(columns)
    for layer in layers:
        for name, old in list(layer.named_parameters(recurse=False)):
            new = torch.nn.Parameter(views[f"{layer.layer_id}.{name}"], requires_grad=False)
            new.__dict__.update(old.__dict__)  # SGLang hangs the weight loader on the parameter
            limit_columns(new, found.load_columns)
            layer.register_parameter(name, new)
        layer.dispatcher.local_expert_mapping = table


class RowSlots:
    """What SGLang's dispatcher uses as its table of local experts on a GPU: `table[topk_ids]`, computed there.

    Args:
        table: int32 [turns, experts + 1], in each turn expert id -> slot, -1 for not here.
        control: address of the windows' control block, which names the active ranks.
        ranks: that exist.
        counts: see `slots_of_rows`.
    """

    def __init__(self, table: torch.Tensor, *, control: int, ranks: int, counts: torch.Tensor | None) -> None:
        self._table = table
        self._counts = counts
        self._control = control
        self._ranks = ranks

    def __getitem__(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """[T, K] expert ids -> int32 slots; -1 also in the rows of inactive ranks."""
        from elasticmoe_kernels.triton.slots import slots_of_rows

        each = rows_of_each(topk_ids.shape[0], self._ranks)
        return slots_of_rows(topk_ids, self._table, control=self._control, rows_per_rank=each, counts=self._counts)


class TurnSlots:
    """The same on the CPU, where rows are those of active ranks only, on a server whose columns may have copies.

    Args:
        table: int32 [turns, experts + 1], in each turn expert id -> slot, -1 for not here.
        parts: of a gathered batch, at most: attention replicas that exist.
    """

    def __init__(self, table: torch.Tensor, *, parts: int) -> None:
        self._table = table
        self._parts = parts
        self._shape: tuple[int, int | None] | None = None
        self._turns = table

    def __getitem__(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """[T, K] expert ids -> slots, of the table's dtype; -1 for not here."""
        rows = topk_ids.shape[0]
        shape = rows, rows_of_each(rows, self._parts)
        if shape != self._shape:  # all layers of a batch ask for the same
            self._shape, self._turns = shape, turns_of_rows(*shape, self._table.shape[0])[:, None]
        return self._table[self._turns, topk_ids]


class CountingSlots:
    """A lookup on the CPU that counts what it finds here.

    Of lookups of few rows one in eight is counted, eightfold: counting takes 30 us, a layer's share of a decode step
    of one request can be 1 ms.
    """

    SURE_ROWS = 256
    _ONE_IN_BITS = 3

    def __init__(self, table: torch.Tensor | TurnSlots, counts: torch.Tensor) -> None:
        self._table = table
        self._counts = counts
        self._bits = random.Random(0).getrandbits

    def __getitem__(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """[T, K] expert ids -> slots, of the table's dtype; -1 for not here."""
        slots = self._table[topk_ids]
        if topk_ids.shape[0] >= self.SURE_ROWS:
            self._count(slots, 1)
        elif not self._bits(self._ONE_IN_BITS):
            self._count(slots, 1 << self._ONE_IN_BITS)
        return slots

    def _count(self, slots: torch.Tensor, times: int) -> None:
        found = torch.bincount(slots.flatten() + 1, minlength=self._counts.numel() + 1)[1:]
        self._counts.add_(found, alpha=times)


class CheckpointReader:
    """Yields the tensors that are wanted, and counts the bytes that are read of them.

    A tensor of all experts of a layer is one of those that are wanted if any of its columns is; it is mapped, and what
    is not copied from it is not read.
    """

    def __init__(self, files: list[str], found: Attached) -> None:
        self._files = files
        self._found = found
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in filter(self._wanted, file.keys()):
                    tensor = file.get_tensor(name)
                    stacked = is_stacked(name)
                    self.bytes += tensor[0].nbytes * len(self._found.load_columns) if stacked else tensor.nbytes
                    yield name, tensor

    def _wanted(self, name: str) -> bool:
        if is_stacked(name):
            return bool(self._found.load_columns)
        match = _EXPERT.search(name)
        return self._found.load_dense if match is None else int(match.group(1)) in self._found.load_columns


class ElasticModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """SGLang's loader over HMM memory, for the worker of this process."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        worker = current_worker()
        started = time.monotonic()
        target = torch_device(torch.device(device_config.device).type, worker.device)
        quant_config = _get_quantization_config(model_config, self.load_config)
        with set_default_torch_dtype(model_config.dtype):
            with target:
                model = _initialize_model(model_config, self.load_config, quant_config)
            self._attach(worker, model, model_config, target)
        worker.model.seconds = time.monotonic() - started
        loaded: torch.nn.Module = model.eval()
        return loaded

    def _attach(self, worker: Worker, model: torch.nn.Module, model_config: Any, target: torch.device) -> None:
        dummy = self.load_config.load_format == LoadFormat.DUMMY
        files: list[str] = []
        if dummy:
            content = dummy_fingerprint(model_config.hf_config.to_json_string(), model_config.dtype)
        else:
            folder, files, use_safetensors = self._prepare_weights(
                model_config.model_path, model_config.revision, fall_back_to_pt=False
            )
            if not use_safetensors:
                raise UserInputError(f"{folder} has no safetensors files", hint="Convert the checkpoint to safetensors")
            content = fingerprint(Path(folder), model_config.dtype)
        config = worker.runtime.config
        if config.attention_tp > 1:  # dense weights in the HMM are parts of that many
            content = hashlib.sha256(f"{content} attention_tp {config.attention_tp}".encode()).hexdigest()
        layers, parameters = moe_layers(model), dense_parameters(model)
        columns, dense = column_layout(layers), dense_layout(parameters)
        num_columns = layers[0].num_experts
        spec = ModelSpec(
            fingerprint=content,
            num_columns=num_columns,
            column_bytes=columns.column_bytes,
            dense_bytes=dense.dense_bytes,
            detail={"architecture": model_config.hf_config.architectures[0], "dtype": str(model_config.dtype)},
        )
        change = worker.join_spec
        placement = initial_placement(num_columns, change.members)
        if change.placement:
            placement = Placement(owners=change.placement, copies=change.copies)
        found = worker.memory.attach(
            spec,
            columns,
            dense,
            owned=placement.columns_of(worker.rank),
            shared=placement.shared_by(worker.rank),
            turns=TURNS if config.redundant_experts else 1,
            txn=change.txn or None,
            dense_source=config.device_of(config.shard_of(worker.rank)),
            fill_dense=config.replica_of(worker.rank) == 0,
            table_device=target,
        )
        worker.model = LoadedModel(spec=spec, placement=placement)
        worker.fault_point("boot.attached")
        slots = self._slots(worker, num_columns, target)
        bind(layers, parameters, worker.memory, columns, slots, found)
        if target.type != "cpu":
            torch.get_device_module(target).empty_cache()  # the parameters that the model was built with
        if dummy:
            fill_dummy(parameters, worker.memory.columns.views(columns), found)
            torch.get_device_module(target).synchronize()
        self._load(worker, model, files, found)
        self.postprocess_weights(model, target)

    def _slots(
        self, worker: Worker, columns: int, target: torch.device
    ) -> RowSlots | TurnSlots | CountingSlots | torch.Tensor:
        """Expert ids to slots; counting how often, if this server counts."""
        table, ranks = worker.memory.slot_table, worker.region.capacity
        config = worker.runtime.config
        auto = config.count_routing == "auto" and (target.type == "cpu" or config.redundant_experts > 0)
        if config.count_routing == "on" or auto:
            worker.routed = torch.zeros(columns, dtype=torch.int64, device=target)
        if worker.cuda is not None:
            return RowSlots(table, control=worker.cuda.windows.control, ranks=ranks, counts=worker.routed)
        slots = table[0] if table.shape[0] == 1 else TurnSlots(table, parts=config.num_replicas)
        return slots if worker.routed is None else CountingSlots(slots, worker.routed)

    def _load(self, worker: Worker, model: Any, files: list[str], found: Attached) -> None:
        if files and (found.load_dense or found.load_columns):
            reader = CheckpointReader(files, found)
            model.load_weights(iter(reader))
            worker.model.checkpoint_bytes = reader.bytes
            check_filled(stacked_parameters(moe_layers(model)))
        worker.memory.filled()
        # Tensors that a model derives from its weights (MLA's absorbed projections) belong to the process.
        post_load_weights(model)
