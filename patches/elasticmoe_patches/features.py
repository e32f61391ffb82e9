"""Request features, and what becomes of a request with one when it moves to another rank or its rank dies.

`FEATURES` is the one table of them: launch and admission refuse from it, the table in docs/operations.md is written
from it (`featuredocs.py`), and tests read it. What is not refused is kept; nothing changes silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_sglang.errors import refused_sentence

KEPT = "unchanged"
REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of a request.

    Attributes:
        name: as operators know it.
        moved, died: what becomes of the rest of the answer when its rank retires, and when its rank dies.
        note: what to know about it; for a refused one why, to follow "not supported by an elastic server: ".
        flags: SGLang argument -> the values that are fine; others end the launch.
        fields: attributes of SGLang's GenerateReqInput that a request must not have; sampling: of its sampling
            parameters.
        cases: of a feature that is kept: names of the requests with which tests move it and kill its rank
            (`tests/helpers/corpus.py`).
        exact_without_overlap: with the overlap schedule SGLang's own answer depends on what else arrives, so the tests
            that compare tokens run without it, in `make soak`.
    """

    name: str
    moved: str = KEPT
    died: str = KEPT
    note: str = ""
    flags: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    exact_without_overlap: bool = False

    @property
    def refused(self) -> bool:
        return self.moved == REFUSED


def _refused(name: str, note: str, **where: Any) -> Feature:
    return Feature(name=name, moved=REFUSED, died=REFUSED, note=note, **where)


_OFF = (False,)
FEATURES: tuple[Feature, ...] = (
    Feature(
        name="sampling with `sampling_seed`",
        note="the random number of a token depends on the seed and the token's position alone. Refused with another "
        "`--sampling-backend` than `pytorch` (the default on the CPU), whose sampling knows no seeds, and with "
        "`n` > 1, which would give equal answers",
        cases=("seed", "seed and top-p"),
    ),
    Feature(
        name="sampling without a seed, also `n` > 1",
        note="each answer gets a seed when it arrives; that and the position are all of its generator's state. With "
        "another `--sampling-backend` the rest of the answer is a valid sample, with random numbers of the new rank, "
        "whose generator is its own",
        cases=("sampled", "several sampled"),
    ),
    Feature(
        name="`frequency_penalty`, `presence_penalty`, `repetition_penalty`",
        note="with the overlap schedule SGLang itself counts a token one step late, or not, depending on what else "
        "arrives",
        cases=("penalties", "repetition penalty"),
        exact_without_overlap=True,
    ),
    Feature(
        name="`min_new_tokens`", note="as penalties", cases=("min new tokens penalty",), exact_without_overlap=True
    ),
    Feature(name="`stop`, `stop_regex`, `stop_token_ids`", cases=("stop", "stop regex", "stop token")),
    Feature(name="natural end (EOS)", cases=("end",)),
    Feature(name="`regex`", cases=("regex",)),
    Feature(name="`json_schema`", cases=("json schema",)),
    Feature(name="`ebnf`", cases=("ebnf",)),
    Feature(name="`logit_bias`", cases=("logit bias",)),
    Feature(name="`n` > 1, greedy", cases=("several",)),
    Feature(
        name="log-probabilities of output and prompt, `top_logprobs_num`, `token_ids_logprob`",
        cases=("logprobs", "token logprobs"),
    ),
    Feature(name="`require_reasoning`, `reasoning_tokens`", cases=("reasoning",)),
    Feature(
        name="`routed_dp_rank`",
        moved="another rank, same tokens",
        died="another rank, same tokens",
        note="refused when the rank is not active on arrival",
        cases=("pinned",),
    ),
    _refused(
        "`input_embeds`, `positional_embed_overrides`",
        "a request without the token ids of its prompt cannot continue on another rank",
        fields=("input_embeds", "positional_embed_overrides"),
    ),
    _refused(
        "images, video, audio",
        "the supported models read text only",
        fields=("image_data", "video_data", "audio_data"),
        flags={"enable_multimodal": _OFF},
    ),
    _refused(
        "sessions",
        "a session's state lies on one rank",
        fields=("session_params",),
        flags={"enable_streaming_session": _OFF, "enable_session_radix_cache": _OFF},
    ),
    _refused(
        "LoRA",
        "LoRA adapters are not carried to ranks that join",
        fields=("lora_path",),
        flags={"enable_lora": _OFF, "lora_paths": ()},
    ),
    _refused(
        "`return_hidden_states`",
        "those of tokens that were sent before are lost with their rank",
        fields=("return_hidden_states",),
        flags={
            "enable_return_hidden_states": _OFF,
            "return_hidden_states_mode": (),
            "enable_return_aux_hidden_states": _OFF,
            "return_aux_hidden_state_layer_ids": (),
        },
    ),
    _refused(
        "`return_routed_experts`, `return_indexer_topk`",
        "they are recorded beside the KV cache, which moves without them",
        fields=("return_routed_experts", "return_indexer_topk"),
        flags={"enable_return_routed_experts": _OFF, "enable_return_indexer_topk": _OFF},
    ),
    _refused(
        "`return_sampling_mask`",
        "the masks of tokens that were sent before are lost with their rank",
        fields=("return_sampling_mask",),
    ),
    _refused(
        "`custom_logit_processor`",
        "whatever state a processor has is not carried",
        fields=("custom_logit_processor",),
        flags={"enable_custom_logit_processor": _OFF},
    ),
    _refused(
        "`max_thinking_tokens`",
        "how much a request has thought is not carried to its grammar on another rank",
        fields=("max_thinking_tokens",),
        flags={"enable_strict_thinking": _OFF},
    ),
    _refused(
        "watermarks",
        "the random numbers of a moved request were not compared with those of one that stayed",
        flags={"enable_watermark": _OFF},
    ),
    _refused("beam search", "the beams of a request cannot move together", sampling=("beam_width",)),
    _refused("embeddings", "only generation is supported", flags={"is_embedding": _OFF}),
)

LAUNCH_REFUSALS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    flag: (fine, feature.note) for feature in FEATURES for flag, fine in feature.flags.items()
}
"""SGLang argument -> (values that are fine, why others are not)."""


def refusal(request: Any) -> str | None:
    """Why a request is not accepted, or None.

    Args:
        request: SGLang's GenerateReqInput or EmbeddingReqInput, of one request.
    """
    sampling = getattr(request, "sampling_params", None) or {}
    for feature in FEATURES:
        for name in feature.fields:
            if _given(getattr(request, name, None)):
                return refused_sentence(name, feature.note)
        for name in feature.sampling:
            if (sampling.get(name) or 1) != 1:
                return refused_sentence(name, feature.note)
    return None


def pin_refusal(rank: int | None, active: Sequence[int], what: str = "ranks") -> str | None:
    """Why a request that names a rank is not accepted, or None.

    Args:
        rank: `routed_dp_rank`. active: the committed membership. what: its numbers are.
    """
    if rank is None or rank in active:
        return None
    return f"routed_dp_rank {rank} is not active; the active {what} are {', '.join(map(str, sorted(active)))}"


def seed_refusal(sampling: Mapping[str, Any], backend: str | None) -> str | None:
    """Why sampling parameters with a seed are not accepted, or None.

    Args:
        backend: SGLang's `--sampling-backend`.
    """
    if sampling.get("sampling_seed") is None or sampling.get("temperature") == 0:
        return None
    if backend != "pytorch":
        return (
            f"sampling_seed has no effect with --sampling-backend {backend}; start the server with --sampling-backend "
            "pytorch, or leave it out"
        )
    if (sampling.get("n") or 1) > 1:
        return "sampling_seed with n > 1 would give equal answers; send a request with a seed of its own for each"
    return None


def _given(value: Any) -> bool:
    empty = value is None or value is False
    return not (empty or (isinstance(value, (list, tuple, dict, str)) and not value))
