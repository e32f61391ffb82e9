"""A rank on a GPU runs SGLang's own loop by itself before it meets the others.

The first launch of a kernel loads its module, and the first large batch grows torch's memory pool; the driver may let
both wait for what runs on the GPU. If that is a collective of another rank, it waits for this rank in turn: probably
why two ranks that had joined together blocked each other in their first prefill until the collective's deadline (seen
on an H200, four ranks under MPS). So every captured graph is replayed once, and prompts of
several lengths are run, while this rank's collectives are local. The kernels of the MoE layer and of block-quantised
linear layers are loaded from lists (`elasticmoe_kernels.triton.warm`, `linear_kernels.py`); what is still loaded later
is named in the log (`first_use.py`).

What it computes is not the model's answer, since the other ranks' experts are missing: nothing is sent out, and the
KV cache is emptied afterwards.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elasticmoe_patches.worker.linear_kernels import load_linear_kernels
from elasticmoe_patches.worker.worker import Worker

logger = logging.getLogger(__name__)

_LEAST_PROMPT = 4
_GROWTH = 4
_TOGETHER = 3
_CACHED = (16, 40)
_ALONE = 72


class WarmedUp(BaseException):
    """Ends SGLang's event loop; not an Exception, which SGLang would take for a crash."""


@dataclass(frozen=True)
class Made:
    """A made-up request. Those of one family begin alike: a later one finds its beginning cached. None: of none."""

    prompt: int
    new: int
    family: int | None = None


def rounds(graph_sizes: Sequence[int], longest_prompt: int) -> list[list[Made]]:
    """What to run, one round after the other.

    First single prompts, up to the longest. Then several at once, whose number is neither 1 nor a multiple of 16, for
    which Triton compiles anew, and the same again with more tokens, behind a cached beginning; one of them once more
    without the others, which is another form of MLA's kernel. Then as many requests as the largest captured batch,
    which end at such lengths that every captured size is replayed.
    """
    prompts = [[Made(1, 1)]]
    length = _LEAST_PROMPT
    while length < longest_prompt:
        prompts.append([Made(length, 1)])
        length *= _GROWTH
    if longest_prompt > 1:
        prompts.append([Made(longest_prompt, 2)])
    room = longest_prompt // _TOGETHER
    together = [
        [Made(min(tokens, room), 1, family) for family in range(_TOGETHER)] for tokens in _CACHED if room >= _CACHED[-1]
    ]
    alone = [[Made(_ALONE, 1, 0)]] if together else []
    sizes = sorted(graph_sizes)
    batch = [Made(1, 1 + 2 * sum(size > number for size in sizes)) for number in range(max(sizes, default=0))]
    return [*prompts, *together, *alone, *([batch] if batch else [])]


class WarmUp:
    """Injects the rounds at the top of the loop's iterations, each once the one before has ended."""

    def __init__(self, todo: list[list[Made]]) -> None:
        self._todo = todo
        self._number = 0

    def step(self, scheduler: Any) -> None:
        """Raises WarmedUp when nothing is left to run."""
        if scheduler.waiting_queue or not scheduler.is_fully_idle():
            return
        if not self._todo:
            raise WarmedUp
        for made in self._todo.pop(0):
            scheduler.handle_generate_request(self._request(scheduler, made))

    def _request(self, scheduler: Any, made: Made) -> Any:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._number += 1
        sampling = SamplingParams(max_new_tokens=made.new, temperature=0.0, ignore_eos=True)
        sampling.normalize(None)
        vocabulary = scheduler.model_config.vocab_size
        first = self._number if made.family is None else -1 - made.family
        return TokenizedGenerateReqInput(
            rid=f"elasticmoe-warm-up-{self._number}",
            input_text=None,
            input_ids=array("q", ((first + 7 * token) % vocabulary for token in range(made.prompt))),
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


def load_moe_kernels(scheduler: Any, worker: Worker, longest_prompt: int) -> None:
    """Every kernel of the MoE layer, up to the rows of all ranks' longest prompts together."""
    from elasticmoe_kernels.triton.warm import load_moe
    from elasticmoe_patches.worker.experts import biases_of, scales_of
    from elasticmoe_patches.worker.loader import moe_layers

    runner = scheduler.tp_worker.model_runner
    if runner.dtype not in (torch.bfloat16, torch.float16):
        return  # computed by PyTorch
    most = worker.region.capacity * longest_prompt
    # Of a quantised model some layers may be unquantised.
    for layer in {layer.w13_weight.dtype: layer for layer in moe_layers(runner.model)}.values():
        counts = load_moe(
            layer.w13_weight,
            layer.w2_weight,
            top_k=layer.top_k,
            most=most,
            dtype=runner.dtype,
            **scales_of(layer),
            **biases_of(layer),
        )
        logger.info("rank %d: %s MoE kernels loaded for %s tokens", worker.rank, layer.w13_weight.dtype, counts)


def warm_up(loop: Callable[[Any], None], scheduler: Any, worker: Worker) -> None:
    """Run the scheduler's event loop over made-up requests until they have ended, and remove all traces of them."""
    started = time.monotonic()
    runner = scheduler.tp_worker.model_runner.decode_cuda_graph_runner
    sizes = runner.capture_bs if runner is not None else []
    room = min(scheduler.max_req_input_len - 8, scheduler.max_total_num_tokens // 2)
    longest = max(1, min(scheduler.chunked_prefill_size or room, room))
    load_moe_kernels(scheduler, worker, longest)
    target = scheduler.tp_worker.model_runner
    load_linear_kernels(target.model, target.dtype, worker.region.capacity * longest)
    worker.warm_up = WarmUp(rounds(sizes, longest)).step
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
