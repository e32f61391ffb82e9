"""What a rank on a GPU runs before it serves."""

from __future__ import annotations

import pytest

from elasticmoe_patches.worker.warm_up import WarmedUp, WarmUp, rounds


def batches(requests: list[tuple[int, int]]) -> list[int]:
    """Sizes of the decode batches: the first new token comes from the prefill."""
    return [sum(new - 1 > step for _, new in requests) for step in range(max(new for _, new in requests) - 1)]


@pytest.mark.parametrize("sizes", [[1], [1, 2, 4, 8, 16], [64, 4, 1, 16], [3, 7]])
def test_every_captured_graph_is_replayed(sizes: list[int]) -> None:
    *prompts, batch = rounds(sizes, 100)
    assert set(batches(batch)) == set(sizes)
    assert all(len(round_) == 1 for round_ in prompts)


@pytest.mark.parametrize("longest", [1, 3, 4, 5, 2048])
def test_prompts_grow_up_to_the_longest(longest: int) -> None:
    lengths = [prompt for [(prompt, _)] in rounds([], longest)]
    assert lengths[-1] == longest
    assert lengths == sorted(set(lengths))


class Scheduler:
    """The attributes that a warm-up looks at; requests are over as soon as `finish` is called."""

    def __init__(self) -> None:
        self.waiting_queue: list[object] = []
        self.idle = True
        self.sent: list[int] = []

    def is_fully_idle(self) -> bool:
        return self.idle

    def handle_generate_request(self, request: object) -> None:
        self.idle = False
        self.sent.append(len(request.input_ids))  # type: ignore[attr-defined]

    class model_config:
        vocab_size = 11


@pytest.mark.process
def test_rounds_follow_each_other_and_then_it_ends() -> None:
    scheduler = Scheduler()
    warm = WarmUp([[(4, 1)], [(1, 3), (1, 5)]])
    warm.step(scheduler)
    warm.step(scheduler)  # still busy: nothing new
    assert scheduler.sent == [4]
    scheduler.idle = True
    warm.step(scheduler)
    assert scheduler.sent == [4, 1, 1]
    scheduler.idle = True
    with pytest.raises(WarmedUp):
        warm.step(scheduler)
