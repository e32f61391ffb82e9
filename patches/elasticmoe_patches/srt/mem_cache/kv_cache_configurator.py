"""How large a rank's KV pool is.

SGLang sizes its pool once, by what the device has left. A rank's pool is what of its HMM memory is mapped now: it is
opened here, and SGLang is told that size. It changes later, see `worker/kv_resize.py`.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.device import on_npu
from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.kv import kv_heads, open_kv
from elasticmoe_patches.worker.worker import Worker, current_worker

HOOKS = hook = Hooks(__name__, WORKERS)

_NO_LIMIT = 1 << 50
_EXPIRES = "SGLang lets a platform supply the size of a pool that can change."
_POOLS = "SGLang's own platforms let a plugin supply the pools."


def _in_hmm_memory(worker: Worker) -> bool:
    """Whether this rank's pool is made over HMM memory: by our platform on the CPU, by the hooks below elsewhere."""
    from sglang.srt.platforms import current_platform

    return worker.cuda is not None or on_npu() or getattr(current_platform, "elastic_kv", False)


@hook("around", "KVCacheConfigurator.configure(self, *, pre_model_load_memory)", expires=_EXPIRES)
def around_configure(original: Any, self: Any, *, pre_model_load_memory: int) -> Any:
    """Maps the rank's KV memory, which the HMM owns, before SGLang builds its pool over it."""
    if _in_hmm_memory(current_worker()):
        open_kv(current_worker(), self)
    return original(self, pre_model_load_memory=pre_model_load_memory)


@hook("around", "KVCacheConfigurator._profile_available_bytes(self, pre_model_load_memory)", expires=_EXPIRES)
def around_profile_available_bytes(original: Any, self: Any, pre_model_load_memory: int) -> int:
    """The HMM's ledger decides how much KV there is, not the device's free memory."""
    return _NO_LIMIT if current_worker().kv is not None else int(original(self, pre_model_load_memory))


@hook("around", "KVCacheConfigurator._apply_token_constraints(self, token_capacity)", expires=_EXPIRES)
def around_apply_token_constraints(original: Any, self: Any, token_capacity: int) -> int:
    """Tells SGLang how many tokens are mapped.

    SGLang's own limits are in the shape's cap already.
    """
    kv = current_worker().kv
    return kv.shape.tokens(kv.chunks) if kv is not None else int(original(self, token_capacity))


@hook("around", "KVCacheConfigurator.resolve_max_num_reqs(self, token_capacity)", expires=_EXPIRES)
def around_resolve_max_num_reqs(original: Any, self: Any, token_capacity: int) -> int:
    """A joining rank that begins with little KV must be able to run as many requests as the others later.

    The table of requests is made for the most tokens the rank may ever have.
    """
    kv = current_worker().kv
    return int(original(self, kv.shape.tokens(kv.space.max_chunks) if kv is not None else token_capacity))


@hook(
    "around",
    "KVCacheConfigurator._build_mha_kv_pool(self, *, max_total_num_tokens, mha_pool_class, quant_method=None)",
    expires=_POOLS,
)
def around_build_mha_kv_pool(original: Any, self: Any, **kwargs: Any) -> Any:
    """The pool of a rank on a GPU lies in HMM memory too."""
    if current_worker().kv is not None:
        from elasticmoe_patches.kv_pools import ElasticMHATokenToKVPool

        kwargs["mha_pool_class"] = ElasticMHATokenToKVPool
    return original(self, **kwargs)


@hook(
    "around",
    "KVCacheConfigurator._build_mla_kv_pool(self, *, max_total_num_tokens)",
    also={"0.5.23": "(self, *, max_total_num_tokens, mla_pool_class)"},
    expires=_POOLS,
)
def around_build_mla_kv_pool(original: Any, self: Any, *, max_total_num_tokens: int, **kwargs: Any) -> Any:
    """The pool of a rank on a GPU lies in HMM memory too."""
    if current_worker().kv is None:
        return original(self, max_total_num_tokens=max_total_num_tokens, **kwargs)
    from elasticmoe_patches.kv_pools import ElasticMLATokenToKVPool

    if "mla_pool_class" in kwargs:
        return original(self, max_total_num_tokens=max_total_num_tokens, mla_pool_class=ElasticMLATokenToKVPool)
    return ElasticMLATokenToKVPool(  # as 0.5.21 makes its own
        max_total_num_tokens,
        kv_lora_rank=self.model_config.kv_lora_rank,
        qk_rope_head_dim=self.model_config.qk_rope_head_dim,
        **_of_any_pool(self),
    )


@hook("around", "KVCacheConfigurator._build_ascend_mha_kv_pool(self, *, max_total_num_tokens)", expires=_POOLS)
def around_build_ascend_mha_kv_pool(original: Any, self: Any, *, max_total_num_tokens: int) -> Any:
    """The pool of a rank on an NPU lies in HMM memory too."""
    if current_worker().kv is None:
        return original(self, max_total_num_tokens=max_total_num_tokens)
    from elasticmoe_patches.npu_kv_pools import ElasticNpuMhaPool

    return ElasticNpuMhaPool(
        max_total_num_tokens, head_num=kv_heads(self), head_dim=self.model_config.head_dim, **_of_any_pool(self)
    )


@hook(
    "around",
    "KVCacheConfigurator._build_ascend_mla_kv_pool(self, *, max_total_num_tokens, is_dsa_model)",
    expires=_POOLS,
)
def around_build_ascend_mla_kv_pool(original: Any, self: Any, *, max_total_num_tokens: int, is_dsa_model: bool) -> Any:
    """The pool of a rank on an NPU lies in HMM memory too."""
    if current_worker().kv is None:
        return original(self, max_total_num_tokens=max_total_num_tokens, is_dsa_model=is_dsa_model)
    from elasticmoe_patches.npu_kv_pools import ElasticNpuMlaPool

    assert not is_dsa_model, "models with a sparse-attention indexer are refused at launch"
    return ElasticNpuMlaPool(
        max_total_num_tokens,
        kv_lora_rank=self.model_config.kv_lora_rank,
        qk_rope_head_dim=self.model_config.qk_rope_head_dim,
        **_of_any_pool(self),
    )


def _of_any_pool(configurator: Any) -> dict[str, Any]:
    """Arguments that every pool of SGLang's takes."""
    return {
        "page_size": configurator.pool_page_size,
        "dtype": configurator.kv_cache_dtype,
        "layer_num": configurator.layer_info.num_effective_layers,
        "device": configurator.device,
        "enable_memory_saver": False,
        "start_layer": configurator.layer_info.start_layer,
        "end_layer": configurator.layer_info.end_layer,
    }
