"""What `elasticmoe top` keeps of a server's events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from elasticmoe_sglang.api.feed import Event
from elasticmoe_sglang.cli.client import Policy
from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.live_figures import SECONDS, Figures


@dataclass
class Seen:
    """What the events of a server have told so far.

    Attributes:
        lost: why there are no events now; None: there are.
    """

    event: Event | None = None
    figures: deque[Figures] = field(default_factory=lambda: deque(maxlen=SECONDS))
    operations: list[Operation] = field(default_factory=list)
    policy: Policy | None = None
    lost: str | None = None

    def take(self, event: Event) -> None:
        """The next event, of this stream or of the one after it."""
        newest = self.figures[-1].at if self.figures else 0
        self.figures.extend(second for second in event.figures if second.at > newest)
        if event.operations is not msgspec.UNSET:
            self.operations = event.operations
        self.event = event
        self.lost = None
