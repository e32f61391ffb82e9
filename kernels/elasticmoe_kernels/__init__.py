"""Device code of ElasticMoE on raw tensors: the MoE layer on expert columns, for CPU, CUDA (Triton) and Ascend.

Imports neither sglang nor elasticmoe_sglang. `registry` says what runs where; `moe_experts` is the entry.
"""

from elasticmoe_kernels.errors import KernelError, NoBackend, ShapeError
from elasticmoe_kernels.registry import moe_experts

__all__ = ["KernelError", "NoBackend", "ShapeError", "moe_experts"]
