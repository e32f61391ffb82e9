"""What a long test found out, kept as a small JSON file beside the benchmarks' results.

Only where ELASTICMOE_RECORD names a folder, so that an ordinary test run leaves the tree as it is:
`ELASTICMOE_RECORD=benchmarks/results make soak`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

ENV_RECORD = "ELASTICMOE_RECORD"


def record(name: str, key: str, found: dict[str, Any]) -> None:
    """Put `found`, with what it was found on, into NAME.json under `key`; the file's other entries stay."""
    folder = os.environ.get(ENV_RECORD)
    if not folder:
        return
    path = Path(folder) / f"{name}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    where = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    entries[key] = found | where | {"commit": _commit()}
    path.write_text(json.dumps(entries, indent=1) + "\n")


def _commit() -> str:
    """Of this checkout; ends in "-dirty" where files were changed."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return described.stdout.strip()
