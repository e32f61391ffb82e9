"""What torch.distributed's object collectives need to know about absent ranks.

They gather the size of each rank's pickled object into zeros, then the bytes. An absent rank's size stays 0, and 0
bytes are no pickle: it becomes None here. A real object never pickles to nothing, so other backends see no change.
`broadcast_object_list` from an absent root in a group in which only this rank is present keeps this rank's objects;
torch would read a size nobody sent.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from elasticmoe_sglang.comm.group import ElasticProcessGroup

_installed = False


def install_object_collectives() -> None:
    """Once a process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    namespace: Any = c10d
    to_object = namespace._tensor_to_object
    broadcast_list = namespace.broadcast_object_list

    def tensor_to_object(tensor: Any, tensor_size: Any, group: Any) -> Any:
        return None if int(tensor_size) == 0 else to_object(tensor, tensor_size, group)

    def broadcast_object_list(
        object_list: list[Any],
        src: int | None = None,
        group: Any = None,
        device: Any = None,
        group_src: int | None = None,
        **kwargs: Any,
    ) -> None:
        target = group or namespace._get_default_group()
        if isinstance(target, ElasticProcessGroup):
            target.engine.refresh()
            if target.engine.local:
                return
        broadcast_list(object_list, src=src, group=group, device=device, group_src=group_src, **kwargs)

    namespace._tensor_to_object = tensor_to_object
    namespace.broadcast_object_list = broadcast_object_list
    dist.broadcast_object_list = broadcast_object_list
