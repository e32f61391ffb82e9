"""SGLang's log lines about what we have it do: one line a hook, and one a model that this machine cannot import."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class _Demotion(logging.Filter):
    def __init__(self, highest: int) -> None:
        super().__init__()
        self.highest = highest
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > self.highest:
            return True
        self.count += 1
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


@contextlib.contextmanager
def demoted(logger_name: str, highest: int) -> Iterator[_Demotion]:
    """Inside, what this logger says up to the level `highest` comes out at DEBUG. Yields an object whose `count` says
    how many lines that were."""
    logger, demotion = logging.getLogger(logger_name), _Demotion(highest)
    logger.addFilter(demotion)
    try:
        yield demotion
    finally:
        logger.removeFilter(demotion)
