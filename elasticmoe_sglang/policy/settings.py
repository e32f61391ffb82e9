"""The policy's settings: service-level objective, mode, limits and times. Parsed and checked where they come in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

import msgspec

from elasticmoe_sglang.errors import UserInputError

DECISIONS_KEPT = 1000
SLO_USAGE = "Write it like ttft=1s,itl=50ms,attainment=0.9; ttft or itl may be left out, and attainment is 0.9 then"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
_DEFAULT_ATTAINMENT = 0.9


class Autoscale(str, Enum):
    """off: nothing is decided. shadow: decisions are made and shown, and not carried out. on: carried out."""

    OFF = "off"
    SHADOW = "shadow"
    ON = "on"


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request shall get, and which share of requests.

    Attributes:
        ttft_s: seconds until the first token; None: no limit.
        itl_s: mean seconds between two tokens of one request; None: no limit.
        attainment: share of requests that meet both, between 0 and 1.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    attainment: float = _DEFAULT_ATTAINMENT

    def __str__(self) -> str:
        parts = [f"{name}={value * 1e3:g}ms" for name, value in (("ttft", self.ttft_s), ("itl", self.itl_s)) if value]
        return ",".join([*parts, f"attainment={self.attainment:g}"])


@lru_cache(maxsize=64)
def parse_slo(text: str) -> Slo:
    """ "ttft=1s,itl=50ms,attainment=0.9" -> Slo.

    Raises:
        UserInputError: an unknown or repeated part, a value that is impossible, or no limit at all.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if name not in ("ttft", "itl", "attainment") or not separator:
            raise UserInputError(f"{part.strip()!r} in the SLO {text!r} is not understood", hint=SLO_USAGE)
        if name in found:
            raise UserInputError(f"{name} is given twice in the SLO {text!r}", hint=SLO_USAGE)
        found[name] = _share(value, text) if name == "attainment" else _seconds(name, value, text)
    if "ttft" not in found and "itl" not in found:
        raise UserInputError(f"the SLO {text!r} limits neither ttft nor itl", hint=SLO_USAGE)
    return Slo(
        ttft_s=found.get("ttft"), itl_s=found.get("itl"), attainment=found.get("attainment", _DEFAULT_ATTAINMENT)
    )


def _seconds(name: str, value: str, text: str) -> float:
    match = _DURATION.fullmatch(value)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds <= 0:
        raise UserInputError(f"{name}={value} in the SLO {text!r} is no time larger than zero", hint=SLO_USAGE)
    return seconds


def _share(value: str, text: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserInputError(
            f"attainment={value} in the SLO {text!r} is no share between 0 and 1", hint="Write it like 0.9"
        )
    return share


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set; the JSON of `settings` in `GET /elastic_ep/policy`, and partly of the POST.

    Attributes:
        slo: the objective as text (`parse_slo`); None: there is none, and nothing can be decided.
        autoscale: see `Autoscale`.
        min_ep_size: the policy never goes below it.
        hold_s: seconds without actions after a manual request has ended.
        forecast: whether expected load sets a floor.
        grow_cool_down_s, shrink_cool_down_s: seconds after the end of a change until the policy grows or shrinks again.
        fast_window_s: what growing looks at. slow_window_s: what shrinking looks at.
        drain_s: seconds in which a queue is to be worked off after growing.
        unpaid_hold_s: seconds without growing after growing did not pay.

    Raises:
        UserInputError: a value is impossible; the text names the setting.
    """

    slo: str | None = None
    autoscale: Autoscale = Autoscale.OFF
    min_ep_size: int = 1
    hold_s: float = 600.0
    forecast: bool = True
    grow_cool_down_s: float = 2.0
    shrink_cool_down_s: float = 15.0
    fast_window_s: float = 10.0
    slow_window_s: float = 30.0
    drain_s: float = 10.0
    unpaid_hold_s: float = 600.0

    def __post_init__(self) -> None:
        if self.slo is not None:
            parse_slo(self.slo)
        elif self.autoscale is not Autoscale.OFF:
            raise UserInputError(
                f"autoscale is {self.autoscale.value}, and there is no SLO to decide by", hint=f"Give one. {SLO_USAGE}"
            )
        if self.min_ep_size < 1:
            raise UserInputError(f"min_ep_size must be a whole number of at least 1, not {self.min_ep_size}")
        for name in ("hold_s", "grow_cool_down_s", "shrink_cool_down_s", "unpaid_hold_s"):
            _check_seconds(name, getattr(self, name), 0.0, 86400.0)
        _check_seconds("drain_s", self.drain_s, 0.1, 3600.0)
        _check_seconds("fast_window_s", self.fast_window_s, 2.0, LONGEST_WINDOW_S)
        _check_seconds("slow_window_s", self.slow_window_s, self.fast_window_s, LONGEST_WINDOW_S)

    @property
    def objective(self) -> Slo | None:
        """The parsed SLO."""
        return None if self.slo is None else parse_slo(self.slo)


LONGEST_WINDOW_S = 600.0
SETTINGS_USAGE = "Settings are: " + ", ".join(PolicySettings.__struct_fields__)


def _check_seconds(name: str, value: float, least: float, most: float) -> None:
    # NaN fails the comparison.
    if not least <= value <= most:
        raise UserInputError(f"{name} must be a number of seconds from {least:g} to {most:g}, not {value!r}")


def check_sizes(settings: PolicySettings, max_ep_size: int) -> None:
    """Raises UserInputError where the smallest size is larger than the largest."""
    if settings.min_ep_size > max_ep_size:
        raise UserInputError(f"min_ep_size {settings.min_ep_size} is larger than the maximum of {max_ep_size} ranks")


def changed(settings: PolicySettings, values: Mapping[str, Any]) -> PolicySettings:
    """These settings with some replaced.

    Args:
        values: JSON values by name of the setting.

    Raises:
        UserInputError: an unknown setting, or a value that is impossible.
    """
    unknown = [name for name in values if name not in PolicySettings.__struct_fields__]
    if unknown:
        raise UserInputError(f"there is no setting {unknown[0][:40]!r}", hint=SETTINGS_USAGE)
    try:
        return msgspec.convert({**msgspec.to_builtins(settings), **values}, PolicySettings)
    except msgspec.ValidationError as error:
        # An error of __post_init__ comes wrapped.
        if isinstance(error.__cause__, UserInputError):
            raise error.__cause__ from None
        raise UserInputError(f"a setting is impossible: {error}", hint=SETTINGS_USAGE) from None
