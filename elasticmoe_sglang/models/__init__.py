"""The architectures that can be served elastically, and those that cannot, with the reason."""

from __future__ import annotations

from elasticmoe_sglang.errors import UnsupportedFeature
from elasticmoe_sglang.models.base import Architecture, Config
from elasticmoe_sglang.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from elasticmoe_sglang.models.glm4_moe import GLM4_MOE
from elasticmoe_sglang.models.gpt_oss import GPT_OSS
from elasticmoe_sglang.models.qwen2_moe import QWEN2_MOE
from elasticmoe_sglang.models.qwen3_moe import QWEN3_MOE

ARCHITECTURES = {each.name: each for each in (QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, QWEN2_MOE, GLM4_MOE, GPT_OSS)}

CORRECTED = tuple(each.arch for each in ARCHITECTURES.values() if each.corrected)
"""Those of which a tiny model can be made with a skew."""

_NO_REPLICAS = "SGLang has no data-parallel attention for it: its attention is sharded over all ranks"
_HYBRID = "it has linear attention, whose states are in no KV pool that can move or change its size"
REFUSED = {
    "MixtralForCausalLM": _NO_REPLICAS,
    "OlmoeForCausalLM": _NO_REPLICAS,
    "GraniteMoeForCausalLM": _NO_REPLICAS,
    "PhiMoEForCausalLM": _NO_REPLICAS,
    "Llama4ForConditionalGeneration": "its experts' outputs are weighed before they are computed",
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5MoeForConditionalGeneration": _HYBRID,
    "DeepseekV32ForCausalLM": "its sparse attention keeps an index in a KV pool of its own",
}
"""Architecture -> why it cannot be served elastically, for those that users ask for."""


def architecture_of(config: Config) -> Architecture:
    """That of a config.json. Raises UnsupportedFeature with the reason."""
    name = (config.get("architectures") or ["none"])[0]
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    reason = REFUSED.get(name, "nobody has looked yet what it shards beside its routed experts")
    raise UnsupportedFeature(
        f"a {name} cannot be served elastically: {reason}", hint=f"Served: {', '.join(ARCHITECTURES)}"
    )
