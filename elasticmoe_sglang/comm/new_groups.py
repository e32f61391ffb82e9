"""`torch.distributed.new_group` under an elastic default group makes elastic groups, on every torch we support.

torch 2.13 asks the default group for its subgroups, whatever backend the caller names. Earlier ones build the named
backend, so that a group of "nccl" would wait for ranks that are not there: here the name is replaced. What asks
for a group's backend by name then, `monitored_barrier`, is told to take ours too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from elasticmoe_sglang.comm.group import ElasticProcessGroup, make_group

_TORCH_ASKS = "default_pg.new_group(" in inspect.getsource(c10d)
_installed = False


def install_new_groups(name: str) -> None:
    """Once a process; does nothing where torch asks by itself. name: the elastic backend's."""
    global _installed
    if _installed or _TORCH_ASKS:
        return
    _installed = True
    namespace: Any = c10d
    new_group = namespace.new_group

    def elastic_new_group(
        ranks: Sequence[int] | None = None,
        timeout: timedelta | None = None,
        backend: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        default = namespace._get_default_group()
        if isinstance(default, ElasticProcessGroup):
            backend = name
            engine = default.engine
            if ranks is not None and engine.rank not in ranks:
                # torch makes no group on ranks outside, but all ranks number the channels alike.
                outside = make_group(engine.region, tuple(engine.ranks[rank] for rank in ranks), timeout)
                assert outside is None
        return new_group(ranks, timeout, backend, *arguments, **options)

    monitored_barrier = namespace.monitored_barrier

    def elastic_monitored_barrier(
        group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        chosen = namespace._get_default_group() if group is None else group
        if isinstance(chosen, ElasticProcessGroup):
            chosen.monitored_barrier(timeout, wait_all_ranks)
        else:
            monitored_barrier(group, timeout, wait_all_ranks)

    for module in (namespace, dist):
        setattr(module, "new_group", elastic_new_group)  # noqa: B010  (mypy: assigning to a module's function)
        setattr(module, "monitored_barrier", elastic_monitored_barrier)  # noqa: B010
