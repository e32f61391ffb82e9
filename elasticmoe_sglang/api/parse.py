"""The body of a scale request: strictly typed, and refused with a sentence that says what is allowed."""

from __future__ import annotations

from typing import Any

import msgspec

from elasticmoe_sglang.api.types import ScaleRequest
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import RetireRanks, ScaleTo, Target

MAX_BODY_BYTES = 16 << 10
_SIZES = ("new_ep_size", "new_data_parallel_size")
_TARGETS = (*_SIZES, "retire_ranks")
# vLLM's clients send a drain_timeout with their size. Nothing is drained here, so it is checked and has no effect.
_OTHERS = ("operation_id", "wait", "drain_timeout")
_ALLOWED = (
    'Send {"new_ep_size": n}, {"new_data_parallel_size": n} or {"retire_ranks": [i, ...]}, '
    'and optionally "operation_id" and "wait"'
)


def parse_scale_request(body: bytes) -> ScaleRequest:
    """Raises UserInputError for anything but a well-formed request; whether it is possible is the planner's to say."""
    values = _decode(body)
    unknown = sorted(set(values) - {*_TARGETS, *_OTHERS})
    if unknown:
        raise UserInputError(f"unknown field {_shown(unknown[0])}", hint=_ALLOWED)
    targets = [name for name in _TARGETS if name in values]
    if len(targets) != 1:
        given = f"{targets[0]} and {targets[1]} were given together" if targets else "no size and no ranks to retire"
        raise UserInputError(given, hint=_ALLOWED)
    for name in (*_SIZES, "drain_timeout"):
        if name in values and not _is_positive(values[name]):
            raise UserInputError(f"{name} must be a positive integer, not {_shown(values[name])}")
    if "retire_ranks" in values and not _is_list_of_ranks(values["retire_ranks"]):
        raise UserInputError(
            f"retire_ranks must be a list of rank numbers, not {_shown(values['retire_ranks'])}",
            hint="Name each rank once, like [1, 3]; rank 0 stays",
        )
    if "drain_timeout" in values and "new_data_parallel_size" not in values:
        raise UserInputError("drain_timeout goes with new_data_parallel_size only", hint=_ALLOWED)
    if "wait" in values and not isinstance(values["wait"], bool):
        raise UserInputError(f"wait must be true or false, not {_shown(values['wait'])}")
    if "operation_id" in values and not isinstance(values["operation_id"], str):
        raise UserInputError(f"operation_id must be a string, not {_shown(values['operation_id'])}")
    values.pop("drain_timeout", None)
    return ScaleRequest(**values)


def target_of(request: ScaleRequest) -> Target:
    """What a request asks for; two requests that mean the same give equal targets."""
    if request.retire_ranks is not None:
        return RetireRanks(ranks=tuple(sorted(request.retire_ranks)))
    size = request.new_ep_size if request.new_ep_size is not None else request.new_data_parallel_size
    assert size is not None, "a request has passed the parser without a target"
    return ScaleTo(size=size)


def _decode(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BODY_BYTES:
        raise UserInputError(f"the body is larger than {MAX_BODY_BYTES} bytes", hint=_ALLOWED)
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserInputError("the body is not JSON", hint=_ALLOWED) from error
    if not isinstance(values, dict):
        raise UserInputError(f"the body must be a JSON object, not {_shown(values)}", hint=_ALLOWED)
    return values


def _is_integer(value: object) -> bool:
    # bool is a kind of int in Python, and true is no number of ranks.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_integer(value) and value > 0  # type: ignore[operator]


def _is_list_of_ranks(value: object) -> bool:
    return isinstance(value, list) and all(_is_integer(rank) for rank in value)


def _shown(value: object) -> str:
    """A value as JSON says it, cut short."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."
