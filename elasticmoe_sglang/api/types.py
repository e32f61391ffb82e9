"""Payloads of the HTTP API besides the coordinator's reports (`coordinator.status`), for the server and for clients."""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import RetireRanks, ScaleTo, Target
from elasticmoe_sglang.policy.controller import DECISIONS_KEPT
from elasticmoe_sglang.policy.settings import SETTINGS_USAGE

MAX_BODY_BYTES = 16 << 10
SCALE_USAGE = (
    'Send {"new_ep_size": n}, {"new_data_parallel_size": n} or {"retire_ranks": [i, ...]}, '
    'and optionally "operation_id" and "wait"'
)
_Positive = Annotated[Annotated[int, Meta(ge=1)] | UnsetType, Meta(description="a positive integer")]


class ScaleRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of POST /scale_elastic_ep. Exactly one of the first three fields is given.

    `parse_scale_request` checks the constraints; a field's description completes its sentence "<field> must be ...".

    Attributes:
        new_ep_size: number of active ranks (SGLang's name).
        new_data_parallel_size: the same (vLLM's name).
        retire_ranks: active ranks to retire.
        operation_id: names the operation; repeating a request with the same id returns the same operation.
        wait: respond when the operation has ended.
        drain_timeout: vLLM's clients send it with their size. It has no effect, because nothing is drained here.

    Raises:
        UserInputError: not exactly one target, or drain_timeout without vLLM's size.
    """

    new_ep_size: _Positive = UNSET
    new_data_parallel_size: _Positive = UNSET
    retire_ranks: Annotated[
        list[int] | UnsetType, Meta(description="a list of rank numbers like [1, 3] without rank 0")
    ] = UNSET
    operation_id: Annotated[str | UnsetType, Meta(description="a string")] = UNSET
    wait: Annotated[bool, Meta(description="true or false")] = False
    drain_timeout: _Positive = UNSET

    def __post_init__(self) -> None:
        targets = ("new_ep_size", "new_data_parallel_size", "retire_ranks")
        given = [name for name in targets if getattr(self, name) is not UNSET]
        if not given:
            raise UserInputError("neither a size nor ranks to retire were given", hint=SCALE_USAGE)
        if len(given) > 1:
            raise UserInputError(f"{given[0]} and {given[1]} were given together", hint=SCALE_USAGE)
        if self.drain_timeout is not UNSET and self.new_data_parallel_size is UNSET:
            raise UserInputError("drain_timeout goes with new_data_parallel_size only", hint=SCALE_USAGE)


_FIELDS = get_type_hints(ScaleRequest, include_extras=True)


def parse_scale_request(body: bytes) -> ScaleRequest:
    """Raises UserInputError for a malformed request; whether the change is possible is for the planner to decide."""
    values = _object(body, SCALE_USAGE)
    for name, value in values.items():
        if name not in _FIELDS:
            raise UserInputError(f"unknown field {_shown(name)}", hint=SCALE_USAGE)
        # Field by field, because msgspec's own error neither shows the value nor says what is allowed.
        try:
            msgspec.convert(value, _FIELDS[name])
        except msgspec.ValidationError:
            (meta,) = _FIELDS[name].__metadata__
            raise UserInputError(f"{name} must be {meta.description}, not {_shown(value)}") from None
    return ScaleRequest(**values)


def parse_policy_request(body: bytes) -> dict[str, Any]:
    """Settings by name, whose values the policy checks. Raises UserInputError for anything but a JSON object."""
    return _object(body, SETTINGS_USAGE)


def parse_limit(text: str | None) -> int:
    """The number of decisions to show. Raises UserInputError."""
    if text is None:
        return 20
    if not text.isdecimal() or not text.isascii() or int(text[:9]) > DECISIONS_KEPT:
        raise UserInputError(f"limit must be a whole number from 0 to {DECISIONS_KEPT}, not {_shown(text)}")
    return int(text[:9])


def _object(body: bytes, usage: str) -> dict[str, Any]:
    if len(body) > MAX_BODY_BYTES:
        raise UserInputError(f"the body is larger than {MAX_BODY_BYTES} bytes", hint=usage)
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserInputError("the body is not JSON", hint=usage) from error
    if not isinstance(values, dict):
        raise UserInputError(f"the body must be a JSON object, not {_shown(values)}", hint=usage)
    return values


def target_of(request: ScaleRequest) -> Target:
    """The planner's target for a request; requests with the same meaning give equal targets."""
    if request.retire_ranks is not UNSET:
        return RetireRanks(ranks=tuple(sorted(request.retire_ranks)))
    size = request.new_data_parallel_size if request.new_ep_size is UNSET else request.new_ep_size
    assert size is not UNSET, "ScaleRequest was built without a target"
    return ScaleTo(size=size)


def _shown(value: Any) -> str:
    """A value as JSON, cut after 40 characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


class ScalingState(Struct, frozen=True, kw_only=True):
    """Response of /is_scaling_elastic_ep, in SGLang's terms (`TokenizerManager.get_elastic_ep_state`).

    Attributes:
        scale_phase: idle, waiting_for_cohort, syncing_new_world, serving_expanded, serving_shrunk or failed.
    """

    is_scaling_elastic_ep: bool
    effective_ep_size: int
    pending_ep_size: int | None
    scale_phase: str
    last_error: str | None


class OperationList(Struct, frozen=True, kw_only=True):
    """Response of GET /elastic_ep/operations, newest first."""

    operations: list[Operation]


class ErrorBody(Struct, frozen=True, kw_only=True):
    """Body of every response with a status of 400 or more; the same shape as SGLang's."""

    error: str
