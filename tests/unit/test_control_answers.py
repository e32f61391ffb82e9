"""A control request waits for the ranks that are there, also when a commit or a death comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from elasticmoe_patches.srt.managers import communicator as module
from elasticmoe_patches.srt.managers.communicator import Answers


class Ranks:
    """Stands for SGLang's communicator: an answer for each call of `answer`."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._fan_out = 4

    def set_fan_out(self, fan_out: int) -> None:
        self._fan_out = fan_out

    async def queueing_call(self, request: int) -> list[int]:
        self.sent.append(request)
        self._result_event = asyncio.Event()
        self._result_values: list[int] = []
        self._result_fan_out = self._fan_out
        await self._result_event.wait()
        return self._result_values

    def answer(self) -> None:
        self._result_values.append(len(self._result_values))
        if len(self._result_values) == self._result_fan_out:
            self._result_event.set()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


def ask(answers: Answers, ranks: Ranks, request: int = 0) -> asyncio.Task[list[int]]:
    return asyncio.ensure_future(answers.ask(Ranks.queueing_call, ranks, request))


def test_it_waits_for_as_many_as_are_there() -> None:
    async def main() -> None:
        answers, ranks = Answers(2), Ranks()
        for members in (2, 3, 1):
            answers.resume(members)
            asked = ask(answers, ranks)
            await asyncio.sleep(0.01)
            for _ in range(members):
                assert not asked.done()
                ranks.answer()
            assert await asked == list(range(members))

    run(main())


def test_none_is_sent_while_a_commit_is_on_its_way() -> None:
    async def main() -> None:
        answers, ranks = Answers(2), Ranks()
        await answers.hold()
        asked = ask(answers, ranks)
        await asyncio.sleep(0.05)
        assert ranks.sent == []
        answers.resume(1)
        await asyncio.sleep(0.05)
        ranks.answer()
        assert await asked == [0]

    run(main())


def test_a_commit_does_not_wait_for_ever_and_retiring_ranks_need_not_answer() -> None:
    async def main() -> None:
        answers, ranks = Answers(3), Ranks()
        asked = ask(answers, ranks)
        await asyncio.sleep(0.01)
        ranks.answer()
        await answers.hold()
        answers.resume(1)
        assert await asked == [0]

    run(main())


def test_after_a_death_it_ends_with_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GIVE_UP_S", 0.05)

    async def main() -> None:
        answers, ranks = Answers(3), Ranks()
        asked = ask(answers, ranks)
        following = ask(answers, ranks, 1)
        await asyncio.sleep(0.01)
        ranks.answer()
        answers.resume(2)
        answers.give_up_later()
        assert await asked == [0]
        await asyncio.sleep(0.01)
        assert ranks.sent == [0, 1]
        ranks.answer()
        ranks.answer()
        assert await following == [0, 1]

    run(main())
