"""The body of a scale request, checked against the constraints that `ScaleRequest` declares."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec

from elasticmoe_sglang.api.types import SCALE_USAGE, ScaleRequest
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import RetireRanks, ScaleTo, Target

MAX_BODY_BYTES = 16 << 10
_FIELDS = get_type_hints(ScaleRequest, include_extras=True)


def parse_scale_request(body: bytes) -> ScaleRequest:
    """Raises UserInputError for a malformed request; whether the change is possible is for the planner to decide."""
    if len(body) > MAX_BODY_BYTES:
        raise UserInputError(f"the body is larger than {MAX_BODY_BYTES} bytes", hint=SCALE_USAGE)
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserInputError("the body is not JSON", hint=SCALE_USAGE) from error
    if not isinstance(values, dict):
        raise UserInputError(f"the body must be a JSON object, not {_shown(values)}", hint=SCALE_USAGE)
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


def target_of(request: ScaleRequest) -> Target:
    """The planner's target for a request; requests with the same meaning give equal targets."""
    if request.retire_ranks is not msgspec.UNSET:
        return RetireRanks(ranks=tuple(sorted(request.retire_ranks)))
    size = request.new_data_parallel_size if request.new_ep_size is msgspec.UNSET else request.new_ep_size
    assert size is not msgspec.UNSET, "ScaleRequest was built without a target"
    return ScaleTo(size=size)


def _shown(value: Any) -> str:
    """A value as JSON, cut after 40 characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."
