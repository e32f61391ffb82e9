"""What a rank on a GPU runs before it serves."""

from __future__ import annotations

import pytest

from elasticmoe_patches.worker.linear_kernels import linear_token_counts
from elasticmoe_patches.worker.warm_up import Made, WarmedUp, WarmUp, rounds


def batches(requests: list[Made]) -> list[int]:
    """Sizes of the decode batches: the first new token comes from the prefill."""
    longest = max(made.new for made in requests)
    return [sum(made.new - 1 > step for made in requests) for step in range(longest - 1)]


@pytest.mark.parametrize("sizes", [[1], [1, 2, 4, 8, 16], [64, 4, 1, 16], [3, 7]])
def test_every_captured_graph_is_replayed(sizes: list[int]) -> None:
    *_, batch = rounds(sizes, 100)
    assert set(batches(batch)) == set(sizes)


@pytest.mark.parametrize("longest", [1, 3, 4, 5, 2048])
def test_prompts_grow_up_to_the_longest(longest: int) -> None:
    lengths = [round_[0].prompt for round_ in rounds([], longest) if len(round_) == 1 and round_[0].family is None]
    assert lengths[0] == 1 and lengths[-1] == longest
    assert lengths == sorted(set(lengths))


def test_prompts_come_together_and_behind_a_cached_beginning() -> None:
    *_, first, second, [alone] = rounds([], 2048)
    assert len(first) == len(second) and len(first) % 16 and len(first) > 1
    assert [made.family for made in first] == [made.family for made in second] == [0, 1, 2]
    assert all(short.prompt < long.prompt for short, long in zip(first, second, strict=True))
    assert alone.family == 0 and alone.prompt > second[0].prompt


TUNED = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""Numbers of tokens in SGLang's files of configurations."""


@pytest.mark.parametrize("tuned", [(), (1, 64), TUNED])
@pytest.mark.parametrize("most", [1, 17, 2048, 6000])
def test_every_variant_of_a_linear_layers_kernel_is_loaded(tuned: tuple[int, ...], most: int) -> None:
    def variant(tokens: int) -> tuple[int | None, bool, bool]:
        nearest = min(tuned, key=lambda number: abs(number - tokens)) if tuned else None
        return nearest, tokens == 1, tokens % 16 == 0

    counts = linear_token_counts(tuned, most)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] <= most
    assert {variant(tokens) for tokens in range(1, most + 1)} == {variant(tokens) for tokens in counts}
    assert len(counts) <= 3 * max(1, len(tuned))


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
    warm = WarmUp([[Made(4, 1)], [Made(1, 3), Made(1, 5)]])
    warm.step(scheduler)
    warm.step(scheduler)  # still busy: nothing new
    assert scheduler.sent == [4]
    scheduler.idle = True
    warm.step(scheduler)
    assert scheduler.sent == [4, 1, 1]
    scheduler.idle = True
    with pytest.raises(WarmedUp):
        warm.step(scheduler)
