"""The operators that a server ran on the simulated NPU, and how each was checked: docs/ascend-operators.md.

`python -m tests.helpers.npusim.operators FOLDER...` writes the page from folders that servers left (`NPUSIM_RECORD`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers import npusim

PAGE = npusim.ROOT / "docs/ascend-operators.md"
_HOST = "PyTorch's CPU kernel, on the same bytes"
_BY_COPY = "the stand-in's rules for copies"
_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
_HEAD = """# Operators on the simulated NPU

What served models ran in `tests/e2e/test_npu_served.py`, 2 -> 3 -> 1 -> 4 -> 2 ranks with streams, and how each was
checked. It is a list of what SGLang and this plugin ask an NPU for, no statement that an NPU computes it so:
`tests/helpers/npusim/README.md`. Written by `python -m tests.helpers.npusim.operators FOLDER...`; the test fails for an
operator that is not here.

- *Meta kernel*: shapes and dtypes of every call are those of torch_npu's own Meta kernel; values are this project's, in
  plain torch.
- *SGLang's call sites only*: neither a schema nor a Meta kernel was at hand. What it computes is read from how SGLang
  calls it.

| Operator | How it was checked |
|---|---|
"""


def of(record: Path) -> dict[str, str]:
    """Operator -> how its outputs were checked, of all processes that left their records there."""
    calls, checked = npusim.recorded(record)
    return {name: checked.get(name, _BY_COPY if name == "aten::copy_" else _HOST) for name in sorted(calls)}


def listed() -> dict[str, str]:
    """The same, as the page says."""
    return dict(_ROW.findall(PAGE.read_text(encoding="utf-8"))) if PAGE.exists() else {}


def page(found: Mapping[str, str]) -> str:
    rows = (f"| `{name}` | {how} |" for name, how in sorted(found.items(), key=lambda row: (row[1], row[0])))
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    found: dict[str, str] = {}
    for folder in sys.argv[1:]:
        found.update(of(Path(folder)))
    PAGE.write_text(page(found), encoding="utf-8")
