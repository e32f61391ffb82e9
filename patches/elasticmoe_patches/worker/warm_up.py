"""A rank on a GPU runs SGLang's own loop by itself before it meets the others.

The first launch of a kernel loads its module, and the first large batch grows torch's memory pool; the driver may let
both wait for what runs on the GPU. If that is a collective of another rank, it waits for this rank in turn: probably
why two ranks that had joined together blocked each other in their first prefill until the collective's deadline (seen
on an H200, four ranks under MPS). So every captured graph is replayed once, and prompts of
several lengths are run, while this rank's collectives are local.

What it computes is not the model's answer, since the other ranks' experts are missing: nothing is sent out, and the
KV cache is emptied afterwards.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from elasticmoe_patches.worker.worker import Worker

logger = logging.getLogger(__name__)

_LEAST_PROMPT = 4
_GROWTH = 4


class WarmedUp(BaseException):
    """Ends SGLang's event loop; not an Exception, which SGLang would take for a crash."""


def rounds(graph_sizes: Sequence[int], longest_prompt: int) -> list[list[tuple[int, int]]]:
    """What to run, one round after the other: (prompt tokens, new tokens) of each request of the round.

    First single prompts, up to the longest; then as many requests as the largest captured batch, which end at such
    lengths that every captured size is replayed.
    """
    prompts = []
    length = _LEAST_PROMPT
    while length < longest_prompt:
        prompts.append([(length, 1)])
        length *= _GROWTH
    prompts.append([(longest_prompt, 2)])
    sizes = sorted(graph_sizes)
    batch = [(1, 1 + 2 * sum(size > number for size in sizes)) for number in range(max(sizes, default=0))]
    return [*prompts, batch] if batch else prompts


class WarmUp:
    """Injects the rounds at the top of the loop's iterations, each once the one before has ended."""

    def __init__(self, todo: list[list[tuple[int, int]]]) -> None:
        self._todo = todo
        self._number = 0

    def step(self, scheduler: Any) -> None:
        """Raises WarmedUp when nothing is left to run."""
        if scheduler.waiting_queue or not scheduler.is_fully_idle():
            return
        if not self._todo:
            raise WarmedUp
        for prompt, new in self._todo.pop(0):
            scheduler.handle_generate_request(self._request(scheduler, prompt, new))

    def _request(self, scheduler: Any, prompt: int, new: int) -> Any:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._number += 1
        sampling = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        sampling.normalize(None)
        vocabulary = scheduler.model_config.vocab_size
        return TokenizedGenerateReqInput(
            rid=f"elasticmoe-warm-up-{self._number}",
            input_text=None,
            # Different prompts, so that none is found in the cache.
            input_ids=array("q", ((self._number + 7 * token) % vocabulary for token in range(prompt))),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )


def warm_up(loop: Callable[[Any], None], scheduler: Any, worker: Worker) -> None:
    """Run the scheduler's event loop over made-up requests until they have ended, and remove all traces of them."""
    started = time.monotonic()
    runner = scheduler.tp_worker.model_runner.decode_cuda_graph_runner
    sizes = runner.capture_bs if runner is not None else []
    room = min(scheduler.max_req_input_len - 8, scheduler.max_total_num_tokens // 2)
    worker.warm_up = WarmUp(rounds(sizes, max(1, min(scheduler.chunked_prefill_size or room, room)))).step
    sender = scheduler.ipc_channels.send_to_detokenizer
    socket, sender.socket = sender.socket, None
    try:
        loop(scheduler)
    except WarmedUp:
        scheduler.flush_cache(empty_cache=False)
    finally:
        sender.socket = socket
        worker.warm_up = None
    logger.info("rank %d: warmed up in %.1f s", worker.rank, time.monotonic() - started)
