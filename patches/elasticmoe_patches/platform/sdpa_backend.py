"""Attention for the CPU platform: batched ``scaled_dot_product_attention`` over SGLang's KV pools.

It replaces SGLang's ``torch_native`` backend, which loops over requests and cannot serve MLA from a latent
cache. Keeping that name is on purpose: SGLang asks by name whether Triton kernels and graphs may be used
(``utils/common.py: support_triton``, ``mem_cache/allocation.py``, ``arg_groups/attention_hook.py``), and the answers
for ``torch_native`` are the right ones here.

MLA runs in the absorbed form in prefill and decode alike: SGLang folds ``kv_b_proj`` into the query, the backend sees
one latent KV head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

from elasticmoe_patches.platform.sdpa_plan import Group, attend, plan
from elasticmoe_sglang.errors import UnsupportedFeature

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "torch_native"
NO_WINDOW = -1
"""SGLang's `sliding_window_size` of a layer that sees all keys. Else it counts the keys before a query's own."""


class SdpaAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Prefill (also chunked, with a cached prefix, mixed with decode) and decode, MHA/GQA and absorbed MLA.

    A layer with a sliding window has its keys and values in the pool of all layers, and sees the last of them.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.latent = bool(model_runner.use_mla_backend)
        self.dtype = model_runner.dtype
        refuse_unsupported(model_runner)
        self.windows = windows_of(model_runner.model)
        self.forward_metadata: dict[int, list[Group]] = {window: [] for window in self.windows}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the pass: on this device lengths are host memory, so this costs no synchronisation."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = {window: [] for window in self.windows}
            return
        if mode.is_decode():
            extend = [1] * len(forward_batch.seq_lens)
            prefix = (forward_batch.seq_lens - 1).tolist()
        else:
            extend = forward_batch.extend_seq_lens.tolist()
            prefix = forward_batch.extend_prefix_lens.tolist()
        table, rows = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        self.forward_metadata = {
            window: plan(table, rows, prefix, extend, self.dtype, None if window == NO_WINDOW else window)
            for window in self.windows
        }

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [tokens, heads * width] (any shape with these elements), sinks [heads] -> [tokens, heads * value width]."""
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        heads = layer.tp_q_head_num
        query = q.reshape(-1, heads, layer.qk_head_dim)
        # Rows that belong to no request (padding of the data-parallel batch) stay zero.
        out = query.new_zeros((query.shape[0], heads, layer.v_head_dim))
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = None if self.latent else self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for group in self.forward_metadata[layer.sliding_window_size]:
            attend(group, query, keys, values, out, layer.scaling, sinks)
        return out.view(-1, heads * layer.v_head_dim)

    forward_extend = forward_decode

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    get_cpu_graph_seq_len_fill_value = get_cuda_graph_seq_len_fill_value

    def support_triton(self) -> bool:
        return False


def windows_of(model: torch.nn.Module) -> list[int]:
    """The window sizes of a model's layers, each once."""
    layers = (layer for layer in model.modules() if isinstance(layer, RadixAttention))
    return sorted({layer.sliding_window_size for layer in layers})


def refuse_unsupported(model_runner: Any) -> None:
    """Raise UnsupportedFeature when the model or a flag needs more than this backend does."""
    if not model_runner.spec_algorithm.is_none():
        raise UnsupportedFeature("speculative decoding is not supported on the CPU platform")
    if model_runner.token_to_kv_pool.dtype != model_runner.dtype:
        raise UnsupportedFeature(
            f"the CPU platform keeps KV in the model's dtype {model_runner.dtype}",
            hint="Leave out --kv-cache-dtype.",
        )
    if isinstance(model_runner.token_to_kv_pool, BaseSWAKVPool):
        raise UnsupportedFeature(
            "the CPU platform keeps the KV of layers with a sliding window in the pool of all layers",
            hint="Add --disable-hybrid-swa-memory.",
        )
    for name, layer in model_runner.model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        needs = {
            "a logit cap": layer.logit_cap > 0,
            "cross attention": layer.is_cross_attention,
            "bidirectional attention": layer.attn_type != AttentionType.DECODER,
        }
        for need, present in needs.items():
            if present:
                raise UnsupportedFeature(f"{name} needs {need}, which the CPU platform's attention does not do")


def register() -> None:
    """Announce the backend to SGLang, and that MLA models use the absorbed form with it."""
    register_attention_backend(NAME)(SdpaAttnBackend)
    AttentionBackendRegistry.register(NAME, lambda attn, forward_batch: AttnForwardMethod.MLA)
