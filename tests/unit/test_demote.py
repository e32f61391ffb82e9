"""SGLang's lines about what we have it do come out at DEBUG, and only those."""

from __future__ import annotations

import logging

import pytest

from elasticmoe_patches.demote import demoted

NAME = "sglang.made.up"


def say() -> None:
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(NAME).log(level, "at %d", level)


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, [40]), (logging.DEBUG, [10, 10, 40])])
def test_lines_are_demoted_inside(caplog: pytest.LogCaptureFixture, level: int, shown: list[int]) -> None:
    caplog.set_level(level)
    with demoted(NAME, logging.WARNING) as skipped:
        say()
    assert [record.levelno for record in caplog.records] == shown
    assert skipped.count == 2
    caplog.clear()
    say()
    assert [record.levelno for record in caplog.records] == [20, 30, 40]
