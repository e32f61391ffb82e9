"""The settings of one elastic server, and the `--elasticmoe-*` flags they come from."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from elasticmoe_sglang import cpu_bind
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.policy.settings import PolicySettings, changed, check_sizes
from elasticmoe_sglang.units import parse_bytes

FLAG_PREFIX = "--elasticmoe-"
AUTO = "auto"
_LEAST_HEADROOM = "0.01"
_ENDPOINT_SCHEMES = ("ipc://", "tcp://")


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Settings of one elastic server. Plain values only, so it can be pickled and written as JSON.

    Raises:
        UserInputError: a value is impossible; the text names the flag and says what is allowed.
    """

    ep_size: int
    """Active ranks when the server starts: the initial expert-parallel size."""

    max_ep_size: int
    """All ranks, active or not: SGLang runs with tp = dp = ep = max_ep_size, the upper limit of every change."""

    attention_tp: int = 1
    """Ranks of one attention replica, which share its attention, embeddings and KV: SGLang's attention tensor
    parallel size. Rank i is in replica i // attention_tp; all sizes are multiples of it."""

    ranks_per_device: int = 1
    """Ranks that share one device: rank i uses device i // ranks_per_device."""

    multiprocessor_share: str = "equal"
    """Of a GPU that ranks share, what each may compute on: equal (one part of ranks_per_device), all (the whole GPU for
    everybody), or a percentage such as 40. Given to NVIDIA's MPS; more ranks then mean more compute on one GPU."""

    cpu_bind: str = cpu_bind.OFF
    """Cores of each device where ranks compute on the CPU: off, auto, or sets like 0-3;4-7. A worker runs on those of
    its device only, with as many threads; other processes run on the rest, where there is one."""

    standbys: int = 1
    """Standby workers (SGLang imported, waiting), so that a joining rank does not wait for the start of a process."""

    restore: bool = True
    """Bring a lost rank back as soon as a standby worker is ready."""

    hmm_endpoint: str | None = None
    """Endpoint of a running HMM, ipc://PATH. None: the server starts one and stops it at its end."""

    device_budget: int | None = None
    """Bytes of each device that the HMM may allocate. None: all its memory."""

    headroom: str = AUTO
    """Memory of each device that KV caches leave unused: a fraction of its budget like 0.02, or a size like 2GiB.
    auto: on GPUs what SGLang leaves free beside its own pool for activations and graphs, for each rank of the device;
    elsewhere 0.01."""

    redundant_experts: int = 0
    """The most copies of expert columns on further ranks, over all ranks. `elasticmoe rebalance` makes them of the
    columns that most tokens are routed to. 0: every column is on one rank. SGLang's --ep-num-redundant-experts."""

    count_routing: str = AUTO
    """Whether ranks count the tokens that are routed to each of their expert columns, for `elasticmoe rebalance`: on,
    off, or auto: where they compute on the CPU, and with redundant_experts (on GPUs it costs an atomic addition for
    each, not measured yet)."""

    spare_imm: str = AUTO
    """Whether another IMM waits with its imports done, for when the IMM dies: on, off, or auto: on GPUs."""

    hot_standbys: int = 0
    """Inactive ranks for which a worker is kept booted, so that joining takes no boot. A retiring rank's worker becomes
    one instead of ending while there are fewer; others are booted in the background."""

    kv_tokens: int | None = None
    """Upper limit of one rank's KV tokens. None: SGLang's --max-total-tokens, or else the device's memory."""

    run_dir: str | None = None
    """Folder for the sockets, created with mode 0700. None: a new one for each launch."""

    prepare_deadline_s: float = 120.0
    """Seconds for boot, attach and column pulls of a change before it is rolled back. Serving continues meanwhile."""

    commit_deadline_s: float = 10.0
    """Seconds for all ranks to meet at the commit barrier, including the batch that is running."""

    finish_deadline_s: float = 30.0
    """Seconds for releasing columns that moved away and for retiring ranks' workers to exit; also for each undo step
    of a rollback."""

    pull_bandwidth: int | None = None
    """Bytes per second that one rank may pull during a change, to protect serving. None: no limit."""

    collective_deadline_s: float = 60.0
    """Seconds that a collective waits for a rank before it raises `PeerTimeout`, which names the rank."""

    window_bytes: int = 4 << 20
    """Bytes of one rank's window in the shared region of a process group; larger messages are split."""

    slo: str | None = None
    """What requests shall get, like ttft=1s,itl=50ms,attainment=0.9; the policy decides by it. None: no objective."""

    autoscale: str = "off"
    """Whether the policy changes the size: off, shadow (it decides and does not act) or on."""

    min_ep_size: int = 1
    """The policy never goes below this size; requests may."""

    autoscale_hold_s: float = 600.0
    """Seconds for which the policy does nothing after a change that somebody requested."""

    def __post_init__(self) -> None:
        _at_least(self, "ep_size", 1)
        _at_least(self, "max_ep_size", 1)
        _at_least(self, "attention_tp", 1)
        _at_least(self, "ranks_per_device", 1)
        _at_least(self, "standbys", 0)
        _at_least(self, "hot_standbys", 0)
        _at_least(self, "redundant_experts", 0)
        _at_least(self, "window_bytes", 4096)
        for name in ("device_budget", "pull_bandwidth", "kv_tokens"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        for name in ("prepare_deadline_s", "commit_deadline_s", "finish_deadline_s", "collective_deadline_s"):
            _is_duration(self, name)
        self.headroom_bytes(1 << 40)
        self.mps_percentage()
        if self.cpu_bind not in (cpu_bind.OFF, cpu_bind.AUTO):
            cpu_bind.check(self.cpu_bind, self.num_devices)
        for name in ("count_routing", "spare_imm"):
            if (value := getattr(self, name)) not in (AUTO, "on", "off"):
                raise UserInputError(f"{flag(name)} must be auto, on or off, not {value!r}")
        if self.redundant_experts and self.count_routing == "off":
            raise UserInputError(
                f"{flag('redundant_experts')} {self.redundant_experts} needs counts of the routed tokens, by which "
                f"copies are made, and {flag('count_routing')} is off",
                hint="Leave out one of the two",
            )
        check_sizes(self.policy_settings(), self.max_ep_size)
        if self.ep_size > self.max_ep_size:
            raise UserInputError(
                f"{flag('ep_size')} {self.ep_size} is larger than {flag('max_ep_size')} {self.max_ep_size}",
                hint="Raise the maximum, which cannot change while the server runs",
            )
        for name in ("ep_size", "max_ep_size", "hot_standbys"):
            if (value := getattr(self, name)) % self.attention_tp:
                raise UserInputError(
                    f"{flag(name)} {value} is not a multiple of {flag('attention_tp')} {self.attention_tp}",
                    hint=f"Give a multiple of {self.attention_tp}: ranks join and retire by whole replicas",
                )
        if self.hmm_endpoint is not None and not self.hmm_endpoint.startswith(_ENDPOINT_SCHEMES):
            raise UserInputError(
                f"{flag('hmm_endpoint')} {self.hmm_endpoint!r} is not an endpoint",
                hint="Write it like ipc:///run/user/1000/elasticmoe/hmm.sock",
            )

    def mps_percentage(self) -> int | None:
        """Percentage of a GPU's multiprocessors that a rank may use; None: no limit."""
        if self.ranks_per_device == 1 or self.multiprocessor_share == "all":
            return None
        if self.multiprocessor_share == "equal":
            return max(1, 100 // self.ranks_per_device)
        if self.multiprocessor_share.isdecimal() and 1 <= int(self.multiprocessor_share) <= 100:
            return int(self.multiprocessor_share)
        raise UserInputError(
            f"{flag('multiprocessor_share')} {self.multiprocessor_share!r} is not a share",
            hint="Give equal, all, or a whole percentage from 1 to 100",
        )

    def policy_settings(self) -> PolicySettings:
        """Those that the policy starts with. Raises UserInputError."""
        values = {
            "slo": self.slo,
            "autoscale": self.autoscale,
            "min_ep_size": self.min_ep_size,
            "hold_s": self.autoscale_hold_s,
        }
        return changed(PolicySettings(), values)

    def headroom_bytes(self, budget: int) -> int:
        """Bytes of a device of `budget` bytes that KV caches leave unused."""
        text = _LEAST_HEADROOM if self.headroom == AUTO else self.headroom
        return sum(self._headroom_part(part, budget) for part in text.split("+"))

    def _headroom_part(self, text: str, budget: int) -> int:
        try:
            share = float(text)
        except ValueError:
            return parse_bytes(text)
        if 0 <= share < 1:
            return int(budget * share)
        if share.is_integer() and share > 0:
            return int(share)
        raise UserInputError(
            f"{flag('headroom')} {self.headroom} is neither a fraction below 1 nor a size",
            hint="Write it like 0.02, 2GiB, or 0.02+2GiB for both together",
        )

    @property
    def num_replicas(self) -> int:
        """Attention replicas, active or not."""
        return self.max_ep_size // self.attention_tp

    def replica_of(self, rank: int) -> int:
        """The attention replica of `rank`: SGLang's data-parallel rank."""
        return rank // self.attention_tp

    def mates_of(self, rank: int) -> tuple[int, ...]:
        """The ranks of its replica, itself among them, ascending; the first leads it."""
        first = self.replica_of(rank) * self.attention_tp
        return tuple(range(first, first + self.attention_tp))

    def shard_of(self, rank: int) -> int:
        """Its place in its replica, which says which part of attention and dense layers it has."""
        return rank % self.attention_tp

    def leaders_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Those of the ranks that lead their replica, in their order."""
        return tuple(rank for rank in ranks if rank % self.attention_tp == 0)

    def replicas_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The replicas of these ranks, ascending."""
        return tuple(sorted({self.replica_of(rank) for rank in ranks}))

    def device_of(self, rank: int) -> int:
        """The device of `rank`."""
        return rank // self.ranks_per_device

    def cores_of(self, rank: int) -> tuple[int, ...] | None:
        """Cores that the rank's worker is bound to, ascending; None: any. `auto` must have been resolved."""
        assert self.cpu_bind != cpu_bind.AUTO
        if self.cpu_bind == cpu_bind.OFF:
            return None
        return cpu_bind.parse_core_sets(self.cpu_bind)[self.device_of(rank)]

    @property
    def num_devices(self) -> int:
        """Number of devices that the ranks use."""
        return self.device_of(self.max_ep_size - 1) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ElasticConfig:
        """Raises UserInputError for a setting that does not exist or is impossible."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserInputError(f"no such setting: {', '.join(unknown)}", hint=f"Known: {', '.join(sorted(known))}")
        missing = sorted({"ep_size", "max_ep_size"} - set(values))
        if missing:
            raise UserInputError(f"missing setting: {', '.join(missing)}")
        return cls(**values)

    def to_flags(self) -> list[str]:
        """As `--elasticmoe-*` flags, which `from_namespace` reads back; settings at their default are left out."""
        parts: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts += [flag(field.name), str(value)]
        return parts

    @classmethod
    def from_namespace(cls, args: argparse.Namespace, base: ElasticConfig | None = None) -> ElasticConfig | None:
        """From parsed `--elasticmoe-*` flags; None if none was given, which leaves SGLang unchanged.

        One of the two sizes is enough: the other one has the same value then.

        Args:
            base: settings from a file; flags override them.

        Raises:
            UserInputError: other flags were given without a size, or a value is impossible.
        """
        given = {
            field.name: value
            for field in fields(cls)
            if (value := getattr(args, _destination(field.name), None)) is not None
        }
        if base is not None:
            return cls(**(base.to_dict() | given))
        if not given:
            return None
        sizes = given.get("ep_size", given.get("max_ep_size"))
        if sizes is None:
            names = ", ".join(flag(name) for name in given)
            raise UserInputError(
                f"{names} was given without a size", hint=f"Add {flag('ep_size')} and {flag('max_ep_size')}"
            )
        return cls(**{"ep_size": sizes, "max_ep_size": sizes, **given})


def flag(field: str) -> str:
    """The flag of a setting: "max_ep_size" -> "--elasticmoe-max-ep-size"."""
    unit_free = field.removesuffix("_s") if field.endswith(("_deadline_s", "_hold_s")) else field
    return FLAG_PREFIX + unit_free.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, *, short: bool = False) -> None:
    """Add the `--elasticmoe-*` flags; all default to None, so that `from_namespace` can tell what was given.

    Args:
        short: also without the prefix (`--max-ep-size`), for a parser without SGLang's flags.
    """
    group = parser.add_argument_group(
        "ElasticMoE", "Change the expert-parallel size of the running server. Active when one of these is given."
    )

    def add(field: str, kind: Any, metavar: str, text: str) -> None:
        names = [flag(field).replace(FLAG_PREFIX, "--"), flag(field)] if short else [flag(field)]
        group.add_argument(*names, dest=_destination(field), type=kind, metavar=metavar, default=None, help=text)

    defaults = {field.name: field.default for field in fields(ElasticConfig)}
    add("ep_size", int, "N", "Active ranks at the start: the initial expert-parallel size.")
    add("max_ep_size", int, "N", "All ranks: the largest size the server can be scaled to. Fixed at launch.")
    add(
        "attention_tp",
        int,
        "T",
        f"Ranks of an attention replica, which share its attention and KV. Default: {defaults['attention_tp']}.",
    )
    add("ranks_per_device", int, "N", f"Ranks that share one device. Default: {defaults['ranks_per_device']}.")
    add(
        "multiprocessor_share",
        str,
        "SHARE",
        "What each rank may use of a GPU that ranks share: equal, all, or a percentage. Default: equal.",
    )
    add(
        "cpu_bind",
        str,
        "CORES",
        "Bind workers to the cores of their device, on the CPU: off, auto, or sets like 0-3;4-7. Default: off.",
    )
    add("standbys", int, "N", f"Standby workers kept ready for joining ranks. Default: {defaults['standbys']}.")
    add(
        "hot_standbys",
        int,
        "N",
        f"Inactive ranks whose worker is kept booted; it joins without a boot. Default: {defaults['hot_standbys']}.",
    )
    add(
        "redundant_experts",
        int,
        "N",
        f"Copies of busy experts' columns that `rebalance` may make. Default: {defaults['redundant_experts']}.",
    )
    add("count_routing", str, "on|off", "Count the tokens of each expert, for `rebalance`. Default: on CPUs only.")
    add("spare_imm", str, "on|off", "Keep another IMM imported, for when the IMM dies. Default: on GPUs only.")
    add("restore", _on_off, "on|off", "Bring lost ranks back as soon as a standby worker is ready. Default: on.")
    add("hmm_endpoint", str, "ENDPOINT", "Use the HMM at this endpoint (ipc://PATH) instead of starting one.")
    add(
        "device_budget",
        _size,
        "SIZE",
        "Memory of each device that the HMM may allocate, like 2GiB. Default: all of it.",
    )
    add("headroom", str, "SIZE", "Memory of a device that KV caches leave unused: 0.02, 2GiB, or both. Default: auto.")
    add("kv_tokens", int, "N", "Upper limit of one rank's KV tokens. Default: none.")
    add("run_dir", str, "DIR", "Folder for the sockets (mode 0700). Keep the path short. Default: a new one.")
    add(
        "pull_bandwidth",
        _size,
        "SIZE",
        "Bytes per second that one rank may pull during a change, like 1GiB. Default: no limit.",
    )
    add("window_bytes", _size, "SIZE", "Shared window of one rank for collectives. Default: 4MiB.")
    for field, what in (
        ("prepare_deadline_s", "boot and column pulls of a change before it is rolled back"),
        ("commit_deadline_s", "all ranks to meet at the commit barrier"),
        ("finish_deadline_s", "releasing memory after a change, and each undo step of a rollback"),
        ("collective_deadline_s", "a rank to take part in a collective"),
    ):
        add(field, float, "SECONDS", f"Time allowed for {what}. Default: {defaults[field]:g}.")

    add("slo", str, "SLO", "What requests shall get: ttft=1s,itl=50ms,attainment=0.9. Default: none.")
    add("autoscale", str, "MODE", "Whether the size follows the load: off, shadow (decides only), on. Default: off.")
    add("min_ep_size", int, "N", f"Autoscaling never goes below it. Default: {defaults['min_ep_size']}.")
    hold = f"Autoscaling does nothing for so long after a requested change. Default: {defaults['autoscale_hold_s']:g}."
    add("autoscale_hold_s", float, "SECONDS", hold)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except UserInputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, not {text!r}")
    return text == "on"


def _destination(field: str) -> str:
    return f"elasticmoe_{field}"


def _at_least(config: ElasticConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserInputError(f"{flag(name)} must be a whole number of at least {least}, not {value!r}")


def _is_duration(config: ElasticConfig, name: str) -> None:
    value = getattr(config, name)
    # NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserInputError(f"{flag(name)} must be a number of seconds larger than zero, not {value!r}")
