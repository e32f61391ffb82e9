"""Where SGLang's scheduler reports that it has been initialised, in a rank."""

from __future__ import annotations

import json
from typing import Any

from elasticmoe_sglang.imm.server import StandbyChannel


class ReadyPipe:
    """Takes the place of the pipe on which SGLang's scheduler reports its initialisation."""

    def __init__(self, channel: StandbyChannel, rank: int) -> None:
        self._channel = channel
        self._rank = rank

    def send(self, info: dict[str, Any]) -> None:
        self._channel.note(self._rank, json.dumps(info, default=str).encode())
