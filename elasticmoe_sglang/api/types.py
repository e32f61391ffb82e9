"""Payloads of the HTTP API besides the coordinator's reports (`coordinator.status`), for the server and for clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from elasticmoe_sglang.coordinator.status import Operation, Status
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import RestoreRanks, RetireRanks, ScaleTo, Target
from elasticmoe_sglang.policy.settings import DECISIONS_KEPT, SETTINGS_USAGE

MAX_BODY_BYTES = 16 << 10
SCALE_USAGE = (
    'Send {"new_ep_size": n}, {"new_data_parallel_size": n}, {"retire_ranks": [i, ...]} or '
    '{"restore_ranks": [i, ...]}, and optionally "operation_id", "wait", "expected_instance_id" and '
    '"expected_generation"'
)
_Positive = Annotated[Annotated[int, Meta(ge=1)] | UnsetType, Meta(description="a positive integer")]
_Text = Annotated[str | UnsetType, Meta(description="a string")]
_TARGETS = ("new_ep_size", "new_data_parallel_size", "retire_ranks", "restore_ranks")
# Clients of SGLang and vLLM send null for an identity that they do not use.
_MAY_BE_NULL = frozenset(("operation_id", "expected_instance_id", "expected_generation"))


class ScaleRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of POST /scale_elastic_ep. Exactly one of the first four fields is given.

    `scale_request` checks the constraints; a field's description completes its sentence "<field> must be ...".

    Attributes:
        new_ep_size: number of active ranks (SGLang's name).
        new_data_parallel_size: the same (vLLM's name); the answer is vLLM's and comes when the operation has ended.
        retire_ranks: active ranks to retire.
        restore_ranks: inactive ranks to activate.
        operation_id: names the operation; repeating a request with the same id returns the same operation.
        wait: respond when the operation has ended.
        drain_timeout: seconds to wait for the end of an operation with vLLM's size.
        expected_instance_id: refuse the request if the server has another instance_id.
        expected_generation: refuse the request if the membership has another epoch.

    Raises:
        UserInputError: not exactly one target, or drain_timeout without vLLM's size.
    """

    new_ep_size: _Positive = UNSET
    new_data_parallel_size: _Positive = UNSET
    retire_ranks: Annotated[
        list[int] | UnsetType, Meta(description="a list of rank numbers like [1, 3] without rank 0")
    ] = UNSET
    restore_ranks: Annotated[list[int] | UnsetType, Meta(description="a list of rank numbers like [1, 3]")] = UNSET
    operation_id: _Text = UNSET
    wait: Annotated[bool, Meta(description="true or false")] = False
    drain_timeout: _Positive = UNSET
    expected_instance_id: _Text = UNSET
    expected_generation: Annotated[
        Annotated[int, Meta(ge=0)] | UnsetType, Meta(description="a whole number of at least 0")
    ] = UNSET

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not UNSET]
        if not given:
            raise UserInputError("neither a size nor ranks to retire or to restore were given", hint=SCALE_USAGE)
        if len(given) > 1:
            raise UserInputError(f"{given[0]} and {given[1]} were given together", hint=SCALE_USAGE)
        if self.drain_timeout is not UNSET and self.new_data_parallel_size is UNSET:
            raise UserInputError("drain_timeout goes with new_data_parallel_size only", hint=SCALE_USAGE)


_FIELDS = get_type_hints(ScaleRequest, include_extras=True)

REBALANCE_USAGE = (
    'Send {} or any of "observe_s" (seconds), "least_gain" (a share), "copies" (a number), "dry_run", "wait" and '
    '"operation_id"'
)
_LONGEST_OBSERVATION_S = 600.0


class RebalanceRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /elastic_ep/rebalance.

    Attributes:
        observe_s: seconds for which routing is observed before columns are placed by it.
        least_gain: do nothing unless the fullest rank's load falls by this share of the mean.
        copies: the most copies of columns afterwards; None: the server's redundant_experts. Fewer than there are drops
            some, whatever is gained.
        dry_run: only say what would be done.
        operation_id: names the operation; repeating a request with the same id returns the same operation.
        wait: respond when the operation has ended.
    """

    observe_s: Annotated[float, Meta(ge=0.1, le=_LONGEST_OBSERVATION_S, description="seconds from 0.1 to 600")] = 10.0
    least_gain: Annotated[float, Meta(ge=0.0, lt=64.0, description="a share such as 0.05")] = 0.05
    copies: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="a whole number of at least 0")] = None
    dry_run: Annotated[bool, Meta(description="true or false")] = False
    operation_id: Annotated[str | None, Meta(description="a string")] = None
    wait: Annotated[bool, Meta(description="true or false")] = False


_REBALANCE_FIELDS = get_type_hints(RebalanceRequest, include_extras=True)


def parse_rebalance_request(body: bytes) -> RebalanceRequest:
    """An empty body is the default request. Raises UserInputError."""
    return rebalance_request(_object(body or b"{}", REBALANCE_USAGE))


def rebalance_request(values: Mapping[str, Any]) -> RebalanceRequest:
    """The request with these fields, checked. Raises UserInputError for one that does not exist or a wrong value."""
    for name, value in values.items():
        if name not in _REBALANCE_FIELDS:
            raise UserInputError(f"unknown field {_shown(name)}", hint=REBALANCE_USAGE)
        _checked(name, value, _REBALANCE_FIELDS[name])
    return RebalanceRequest(**values)


def parse_scale_request(body: bytes) -> tuple[ScaleRequest, list[str]]:
    """The request in a body, and a sentence for each field that is ignored.

    Raises:
        UserInputError: malformed; whether the change is possible is for the planner to decide.
    """
    if len(body) > MAX_BODY_BYTES:
        raise UserInputError(f"the body is larger than {MAX_BODY_BYTES} bytes", hint=SCALE_USAGE)
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserInputError("the body is not JSON", hint=SCALE_USAGE) from error
    if not isinstance(values, dict):
        raise UserInputError(f"the body must be a JSON object, not {_shown(values)}", hint=SCALE_USAGE)
    known = {name: value for name, value in values.items() if name in _FIELDS}
    warnings = [f"the field {_shown(name)} is unknown and was ignored" for name in values if name not in _FIELDS]
    return scale_request(known), warnings


def scale_request(values: Mapping[str, Any]) -> ScaleRequest:
    """The request with these fields, checked.

    Raises:
        UserInputError: a field does not exist or has a wrong value.
    """
    given = {name: value for name, value in values.items() if not (value is None and name in _MAY_BE_NULL)}
    for name, value in given.items():
        if name not in _FIELDS:
            raise UserInputError(f"unknown field {_shown(name)}", hint=SCALE_USAGE)
        _checked(name, value, _FIELDS[name])
    return ScaleRequest(**given)


def _checked(name: str, value: Any, field: Any) -> None:
    """One field at a time, because msgspec's own error neither shows the value nor says what is allowed."""
    try:
        msgspec.convert(value, field)
    except msgspec.ValidationError:
        (meta,) = field.__metadata__
        raise UserInputError(f"{name} must be {meta.description}, not {_shown(value)}") from None


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
    if request.restore_ranks is not UNSET:
        return RestoreRanks(ranks=tuple(sorted(request.restore_ranks)))
    size = request.new_data_parallel_size if request.new_ep_size is UNSET else request.new_ep_size
    assert size is not UNSET, "ScaleRequest was built without a target"
    return ScaleTo(size=size)


def _shown(value: Any) -> str:
    """A value as JSON, cut after 40 characters; callers in the process may pass what has no JSON."""
    text = msgspec.json.encode(value, enc_hook=repr).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


class ScaleAnswer(Operation, frozen=True, kw_only=True):
    """Response of POST /scale_elastic_ep: the operation, and what SGLang's clients and orchestrators look for.

    Attributes:
        instance_id, topology_generation: of the server, now.
        pending_ep_size: the new size while the operation runs, then None.
        scale_phase: as in `ScalingState`.
        warnings: one sentence for each thing in the request that was ignored.
    """

    instance_id: str
    topology_generation: int
    pending_ep_size: int | None
    scale_phase: str
    warnings: list[str]


class RebalanceAnswer(Struct, frozen=True, kw_only=True):
    """Response of POST /elastic_ep/rebalance.

    Attributes:
        instance_id, topology_generation: of the server, now.
        observed_tokens: routed to any column while it was observed, over all layers.
        imbalance: the fullest rank's load over the mean, as observed; 1.0 is perfect. expected_imbalance: with the new
            placement, if routing stays.
        rank_loads: rank -> its share of the observed tokens. expected_rank_loads: with the new placement.
        columns: that move or are copied.
        copies: of columns, now. expected_copies: with the new placement.
        note: why nothing moves; empty otherwise.
        operation: that moves them; None if nothing moves or it is a dry run.
    """

    instance_id: str
    topology_generation: int
    observed_tokens: int
    imbalance: float
    expected_imbalance: float
    rank_loads: dict[int, float]
    expected_rank_loads: dict[int, float]
    columns: int
    copies: int = 0
    expected_copies: int = 0
    note: str = ""
    operation: ScaleAnswer | None = None


class ServerStatus(Status, frozen=True, kw_only=True):
    """Response of GET /elastic_ep/status.

    Attributes:
        instance_id: differs for every start of a server.
        topology_generation: the epoch of the membership.
        safe_to_terminate_ranks: ranks that are no members and take part in no change: nothing that is served needs
            their devices.
    """

    instance_id: str
    topology_generation: int
    safe_to_terminate_ranks: list[int]


class ScalingState(Struct, frozen=True, kw_only=True):
    """Response of GET /is_scaling_elastic_ep: SGLang's fields (`TokenizerManager.get_elastic_ep_state`) and, from
    instance_id on, those for orchestrators.

    Attributes:
        scale_phase: idle, waiting_for_cohort, syncing_new_world, serving_expanded, serving_shrunk or failed.
        operation_id: of the running or the latest operation.
        operation_succeeded: None while it runs.
    """

    is_scaling_elastic_ep: bool
    effective_ep_size: int
    pending_ep_size: int | None
    scale_phase: str
    last_error: str | None
    instance_id: str
    topology_generation: int
    operation_id: str | None
    target_ep_size: int | None
    operation_succeeded: bool | None
    active_ranks: list[int]
    safe_to_terminate_ranks: list[int]


class VllmScalingState(Struct, frozen=True, kw_only=True):
    """Response of POST /is_scaling_elastic_ep, in vLLM's terms.

    Attributes:
        phase: idle, preparing, committing, failed or completed: of the running or the latest operation.
        epoch, topology_generation: of the membership, now.
        error: why the latest operation failed or was rolled back.
        requested_data_parallel_size: its target.
    """

    is_scaling_elastic_ep: bool
    phase: str
    epoch: int
    error: str | None
    requested_data_parallel_size: int | None
    effective_data_parallel_size: int
    operation_id: str | None
    instance_id: str
    topology_generation: int


class VllmAnswer(VllmScalingState, frozen=True, kw_only=True):
    """Response of POST /scale_elastic_ep with new_data_parallel_size, once the operation is done."""

    message: str
    warnings: list[str]


class OperationList(Struct, frozen=True, kw_only=True):
    """Response of GET /elastic_ep/operations, newest first."""

    operations: list[Operation]


class ErrorBody(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of every response with a status of 400 or more; the same shape as SGLang's.

    Attributes:
        error: one sentence.
        instance_id, topology_generation: with status 409: of the server, now.
        operation_id: with 408 and 500: the request's operation; with 409: the one that runs, if any.
    """

    error: str
    instance_id: str | None = None
    topology_generation: int | None = None
    operation_id: str | None = None
