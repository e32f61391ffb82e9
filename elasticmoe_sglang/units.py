"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re

from elasticmoe_sglang.errors import UserInputError

_FACTORS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """ "2GiB", "512M", "1.5 GB" or "1048576" to bytes; KiB and K are powers of 1024, KB of 1000.

    Raises:
        UserInputError: not a size, or not larger than zero.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UserInputError(f"{text!r} is not a size", hint="Write it like 2GiB, 512MiB or 1048576")
    size = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size < 1:
        raise UserInputError(f"the size {text!r} is not larger than zero")
    return size


def format_bytes(size: float) -> str:
    """Bytes to a short text in powers of 1024, three significant digits: "1.5 GiB"."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    value = size / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
