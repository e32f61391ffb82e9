"""Launch configurations: JSON files that say how one model is served on one kind of machine.

`load_launch_config(path).to_argv()` are the arguments of `elasticmoe serve`. Loading computes what each rank has to
hold and refuses a file whose numbers do not fit the devices. The schema is in configs/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from elasticmoe_sglang.config import ElasticConfig, flag
from elasticmoe_sglang.errors import BudgetExceeded, UserInputError
from elasticmoe_sglang.model_shape import BYTES_PER_PARAMETER, ModelShape, shape_of
from elasticmoe_sglang.units import parse_bytes

GIB = 1 << 30
GRANULARITY = 2 << 20
"""Of device memory, on H200 and on Ascend 910B and 910C alike."""
MIN_KV_TOKENS = 16384
"""What the fullest rank must be able to cache beside its weights; fewer would not hold one long request."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, as SGLang counts them.

    hbm_bytes: of one device. per_node: devices of one machine.
    """

    hbm_bytes: int
    per_node: int


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h200": Device(hbm_bytes=139 * GIB, per_node=8),
        "ascend-910b": Device(hbm_bytes=64 * GIB, per_node=8),
        # Two dies a package, each a device of its own with half the package's 128 GiB.
        "ascend-910c": Device(hbm_bytes=64 * GIB, per_node=16),
    }
)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    description: str
    device: str
    model_path: str
    shape: str
    elastic: dict[str, Any]
    expert_dtype: str = "bfloat16"
    min_ep_size: int | None = None
    sglang_flags: dict[str, str | int | float | bool] = {}
    environment: dict[str, str] = {}
    missing: list[str] = []


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """One loaded and checked file. Raises UserInputError, or BudgetExceeded with the numbers, when built from bad ones.

    Attributes:
        model_path: folder or hub name, as SGLang takes it.
        elastic: the elastic settings; its device budget is never None here.
        expert_dtype: a key of BYTES_PER_PARAMETER.
        min_ep_size: the fewest ranks the weights still fit on; the smallest size to scale to.
        sglang_flags: flag -> value for SGLang; True is a flag without value.
        environment: to be set for the server.
        missing: what this version lacks to run it, in words; empty when nothing is known to be in the way.
    """

    name: str
    description: str
    device: str
    model_path: str
    shape: ModelShape
    expert_dtype: str
    elastic: ElasticConfig
    min_ep_size: int
    sglang_flags: Mapping[str, str | int | float | bool]
    environment: Mapping[str, str]
    missing: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UserInputError(f"{self.name}: device {self.device!r} is unknown", hint=f"Use {', '.join(DEVICES)}.")
        if self.expert_dtype not in BYTES_PER_PARAMETER:
            raise UserInputError(
                f"{self.name}: expert_dtype {self.expert_dtype!r} is none of {list(BYTES_PER_PARAMETER)}"
            )
        if not 1 <= self.min_ep_size <= self.elastic.ep_size:
            raise UserInputError(f"{self.name}: min_ep_size {self.min_ep_size} is not in 1..{self.elastic.ep_size}")
        if self.elastic.max_ep_size > self.shape.experts:
            raise UserInputError(f"{self.name}: {self.elastic.max_ep_size} ranks for {self.shape.experts} experts")
        self._check_budget()
        if self.num_nodes > 1 and not self.missing:
            raise UserInputError(f"{self.name}: {self.num_nodes} machines are needed, and one is supported so far")

    def _check_budget(self) -> None:
        hbm, budget = DEVICES[self.device].hbm_bytes, self.device_budget
        if budget >= hbm:
            raise BudgetExceeded(
                f"{self.name}: a budget of {_gib(budget)} leaves nothing of {self.device}'s {_gib(hbm)}",
                hint="Activations, graphs and the runtime need room too.",
                budget=budget,
            )
        needed = self.rank_bytes(self.min_ep_size) * self.elastic.ranks_per_device
        if needed > budget:
            raise BudgetExceeded(
                f"{self.name}: on {self.min_ep_size} ranks a device must hold {_gib(needed)}, "
                f"its budget is {_gib(budget)}",
                needed=needed,
                free=budget,
                budget=budget,
                hint="Raise min_ep_size or the budget.",
            )

    @property
    def device_budget(self) -> int:
        """Bytes of each device that the HMM may hand out."""
        assert self.elastic.device_budget is not None
        return self.elastic.device_budget

    @property
    def num_nodes(self) -> int:
        """Machines that the ranks take."""
        return -(-self.elastic.num_devices // DEVICES[self.device].per_node)

    def weight_bytes(self, ep_size: int) -> int:
        """Weights of the fullest of `ep_size` ranks."""
        return self.shape.rank_weight_bytes(self.expert_dtype, ep_size, granularity=GRANULARITY)

    def rank_bytes(self, ep_size: int) -> int:
        """Weights and the least KV cache of the fullest of `ep_size` ranks."""
        return self.weight_bytes(ep_size) + MIN_KV_TOKENS * self.shape.kv_bytes_per_token()

    def kv_tokens(self, ep_size: int) -> int:
        """Tokens that fit beside the weights on the fullest of `ep_size` ranks."""
        share = self.device_budget // self.elastic.ranks_per_device
        return (share - self.weight_bytes(ep_size)) // self.shape.kv_bytes_per_token()

    def to_argv(self) -> list[str]:
        """Arguments of `elasticmoe serve`."""
        argv = ["--model-path", self.model_path]
        argv += ["--ep-size", str(self.elastic.ep_size), "--max-ep-size", str(self.elastic.max_ep_size)]
        for field in fields(ElasticConfig):
            value = getattr(self.elastic, field.name)
            if field.name not in ("ep_size", "max_ep_size") and value != field.default:
                argv += [flag(field.name), str(value)]
        for name, value in self.sglang_flags.items():
            argv += [name] if value is True else [name, str(value)]
        return argv


def load_launch_config(path: str | Path) -> LaunchConfig:
    """Reads and checks one file; `shape` in it names a model's config.json relative to the file.

    Raises UserInputError for a file that is not there, malformed or impossible, BudgetExceeded when it does not fit.
    """
    path = Path(path)
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=_File)
        shape = shape_of(json.loads((path.parent / raw.shape).read_text()))
    except OSError as error:
        raise UserInputError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise UserInputError(f"{path}: {error}", hint="See configs/README.md for the fields.") from error
    return LaunchConfig(
        name=f"{path.parent.name}/{path.stem}",
        description=raw.description,
        device=raw.device,
        model_path=raw.model_path,
        shape=shape,
        expert_dtype=raw.expert_dtype,
        elastic=_elastic(path, raw.elastic),
        min_ep_size=raw.min_ep_size if raw.min_ep_size is not None else int(raw.elastic.get("ep_size", 1)),
        sglang_flags=MappingProxyType(raw.sglang_flags),
        environment=MappingProxyType(raw.environment),
        missing=tuple(raw.missing),
    )


def _elastic(path: Path, values: Mapping[str, Any]) -> ElasticConfig:
    if "device_budget" not in values:
        raise UserInputError(f"{path}: elastic.device_budget is missing", hint='Write it like "120GiB".')
    sizes = ("device_budget", "pull_bandwidth", "window_bytes")
    parsed = {name: parse_bytes(str(value)) if name in sizes else value for name, value in values.items()}
    return ElasticConfig.from_dict(parsed)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
