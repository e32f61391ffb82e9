"""The group for NPU tensors with CPU tensors in the NPU's place: each is taken for one on a device, and copied."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticmoe_sglang.comm.npu_group import NpuProcessGroup
from elasticmoe_sglang.comm.process_group import install_groups
from elasticmoe_sglang.comm.region import CollectiveRegion


class StagedGroup(NpuProcessGroup):
    """What the host computes with is a copy, so that a result that is not copied back is missing."""

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _elsewhere(self, tensor: Tensor) -> bool:
        return True

    def _host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


def install(region: CollectiveRegion) -> None:
    install_groups(region, StagedGroup)
