"""Penalties of a request that continues on another rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "after",
    "BatchedPenalizerOrchestrator.__init__(self, vocab_size, batch, penalizers)",
    expires="SGLang restores penalties of retracted requests and applies them in a fixed order.",
)
def after_init(_result: None, self: Any, vocab_size: int, batch: Any, penalizers: Any) -> None:
    """A moved request's penalties count the tokens it has generated before, which SGLang forgets, and are applied in
    the same order in every rank.

    SGLang starts every batch that is prefilled at zero, also for a moved or retracted request that has output, so such
    a request would continue as if it had just begun. And it applies the penalties in the order of a set of classes,
    which differs from process to process, while adding and scaling do not commute: here the scaling ones come last in
    every rank, as the overlap schedule has it everywhere.
    """
    self.penalizers = dict(sorted(self.penalizers.items(), key=lambda item: (item[0].is_multiplicative, str(item[0]))))
    if not self.is_required:
        return
    import torch

    counted = [(row, torch.tensor(ids, dtype=torch.int64)) for row, ids in _counted(batch.reqs, batch.enable_overlap)]
    for penalizer in self.penalizers.values():
        if not penalizer.is_prepared():
            continue
        for row, ids in counted:
            _count(penalizer, row, ids.to(self.device))


def _counted(reqs: Sequence[Any], overlap: bool) -> Iterator[tuple[int, list[int]]]:
    """(row, token ids) that decoding without a break would have counted before the token that is sampled next.

    With the overlap schedule SGLang prepares a step before the last one's token is known: it counts one token later,
    and the prompt's last one first (`ScheduleBatch.cumulate_penalty_output_tokens`).
    """
    for row, req in enumerate(reqs):
        output = list(req.output_ids)
        if output:
            yield row, [req.origin_input_ids[-1], *output[:-1]] if overlap else output


def _count(penalizer: Any, row: int, ids: Any) -> None:
    """What a call of `cumulate_output_tokens` for each id would do to this row alone."""
    match type(penalizer).__name__:
        case "BatchedFrequencyPenalizer":
            weight = penalizer.frequency_penalties[row].expand(len(ids))
            penalizer.cumulated_frequency_penalties[row].scatter_add_(0, ids, weight)
        case "BatchedPresencePenalizer":
            penalizer.cumulated_presence_penalties[row, ids] = penalizer.presence_penalties[row]
        case "BatchedRepetitionPenalizer":
            penalizer.cumulated_repetition_penalties[row, ids] = penalizer.repetition_penalties[row]
        case "BatchedMinNewTokensPenalizer":
            penalizer.len_output_tokens[row] = len(ids)
        case other:
            raise NotImplementedError(f"the state of SGLang's {other} cannot be restored")
