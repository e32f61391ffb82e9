"""SGLang gets its model from our loader."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_sglang.errors import UserInputError

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "get_model_loader(load_config, model_config=None)",
    expires="SGLang lets a plugin register a model loader for a load format of its own.",
)
def elastic_model_loader(_original: Any, load_config: Any, model_config: Any = None) -> Any:
    """Weights live in the HMM's memory; a joining rank attaches to them and reads no checkpoint."""
    from sglang.srt.configs.load_config import LoadFormat

    from elasticmoe_patches.worker.loader import ElasticModelLoader

    if load_config.load_format not in (LoadFormat.AUTO, LoadFormat.SAFETENSORS, LoadFormat.DUMMY):
        raise UserInputError(
            f"--load-format {load_config.load_format} is not supported by an elastic server",
            hint="Leave it out: safetensors checkpoints are read into the HMM; or dummy, for weights by seed",
        )
    return ElasticModelLoader(load_config)
