"""The CPU platform: SGLang serves text on a machine with no accelerator and no ``sgl_kernel``.

Everything SGLang lets a platform supply is supplied here (attention backend, pools, allocator, operators); what it
decides by a module-level flag instead is corrected by the hooks of scope `platform`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from elasticmoe_patches.platform import environment
from elasticmoe_patches.plugin import install_for_platform
from elasticmoe_patches.srt.layers.quantization import unquant
from elasticmoe_sglang.runtime import current_runtime

DISPATCH_KEY = "elasticmoe_cpu"
ATTENTION_BACKEND = "torch_native"
KV_TOKENS = 65536
"""KV rows of a rank where nothing configures how many: no --max-total-tokens, no --mem-fraction-static, and
for an elastic server no budget and no --elasticmoe-kv-tokens. SGLang's own rule would take
most of the machine's memory in every rank and write zeros to all of it: 14 s of a launch for 4.3 GiB."""


class ElasticCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Out-of-tree platform on plain PyTorch CPU operators and this project's MoE kernels."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Server defaults: the backends that exist here, and a KV pool that leaves the machine usable."""
        if server_args.dtype == "auto" and checkpoint_dtype(server_args.model_path) == "float32":
            server_args.dtype = "float32"  # SGLang would take float16, which this processor computes in float32 anyway
        if server_args.attention_backend is None:
            server_args.attention_backend = ATTENTION_BACKEND
        # Layers with a sliding window keep their KV in the one pool there is.
        server_args.disable_hybrid_swa_memory = True
        if server_args.moe_runner_backend == "auto":
            server_args.moe_runner_backend = "triton"  # the layout of weights that this platform's kernels read
        if server_args.mem_fraction_static is None and server_args.max_total_tokens is None and not kv_is_chosen():
            server_args.max_total_tokens = KV_TOKENS
        environment.set_rank_defaults(ranks(server_args), bound_cores())

    def get_device(self, local_rank: int | None = None) -> str:
        # A string, as for the accelerators: SGLang splits what it detects at the colon.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    @property
    def elastic_kv(self) -> bool:
        """Whether this server's KV pools lie in HMM memory and change their size."""
        return current_runtime() is not None

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """What 0.5.23 asks for, where 0.5.21 asks for the two below. None: SGLang's own pool."""
        ours = {"mha": self.get_mha_kv_pool_cls, "mla": self.get_mla_kv_pool_cls}
        return ours[kind]() if kind in ours else None

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        from elasticmoe_patches.kv_pools import ElasticMHATokenToKVPool

        return ElasticMHATokenToKVPool if self.elastic_kv else MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from elasticmoe_patches import kv_pools

        return kv_pools.ElasticMLATokenToKVPool if self.elastic_kv else kv_pools.CpuMLATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from elasticmoe_patches.kv_pools import allocator_class

        return allocator_class()

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def init_backend(self) -> None:
        """Called once in every scheduler process, before the model is built; a hook that does not fit ends it."""
        from sglang.kernels.fused_op import BaseFusedOp
        from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

        from elasticmoe_patches.platform import sdpa_backend

        sdpa_backend.register()
        BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, unquant.forward, DISPATCH_KEY)
        install_for_platform("worker")


def bound_cores() -> list[tuple[int, ...]] | None:
    """The cores of each rank of an elastic server; None where its workers are not bound to any."""
    runtime = current_runtime()
    if runtime is None:
        return None
    found = [runtime.config.cores_of(rank) for rank in range(runtime.config.max_ep_size)]
    return [cores for cores in found if cores is not None] or None


def kv_is_chosen() -> bool:
    """Whether an elastic server was told how much memory it has: then KV uses what the weights do not."""
    runtime = current_runtime()
    if runtime is None:
        return False
    config = runtime.config
    return config.device_budget is not None or config.hmm_endpoint is not None or config.kv_tokens is not None


def checkpoint_dtype(model_path: str) -> str | None:
    """Dtype that a local checkpoint's config names; None for a model that is not a local folder."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config.get("torch_dtype") or config.get("dtype")


def ranks(server_args: Any) -> int:
    """Scheduler processes that this node will run."""
    replicas = 1 if server_args.enable_dp_attention else int(server_args.dp_size)
    return max(1, int(server_args.tp_size) * int(server_args.pp_size) * replicas // int(server_args.nnodes))
