"""What a long test found out, kept as a small JSON file beside the benchmarks' results.

Only where ELASTICMOE_RECORD names a folder, which is made, so that an ordinary test run leaves the tree as it is:
`ELASTICMOE_RECORD=benchmarks/results make soak`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.scaling.machine import describe

ENV_RECORD = "ELASTICMOE_RECORD"


def record(name: str, key: str, found: dict[str, Any]) -> None:
    """Put `found`, with the machine and commit it was found on, into NAME.json under `key`; other entries stay."""
    folder = os.environ.get(ENV_RECORD)
    if not folder:
        return
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[key] = found | {"machine": describe()}
    path.write_text(json.dumps(entries, indent=1) + "\n")
