"""An elastic `sgl.Engine`: its settings, and methods for what the HTTP server has routes for.

Every method returns what the route answers, as plain values. The coordinator sends its commands in the event loop of
SGLang's tokenizer, so a change and a recovery proceed while that loop runs: the blocking methods run it until the
operation has ended, and the `async_` ones are for a program whose own loop runs.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import fields
from typing import Any

import msgspec

from elasticmoe_patches.launch import BACKEND, elastic_config
from elasticmoe_patches.plugin import check_all
from elasticmoe_sglang.api.elastic_ep import ElasticEp
from elasticmoe_sglang.api.types import OperationList, rebalance_request, scale_request
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.units import parse_bytes

_PREFIX = "elasticmoe_"
_SIZES = ("device_budget", "pull_bandwidth", "window_bytes")
_STATUS_S = 30.0


def server_args_of(server_args_class: Any, values: dict[str, Any]) -> Any:
    """SGLang's arguments for the keyword arguments of an Engine, elastic if any of them says so.

    Raises:
        UserInputError: a setting does not exist, it or SGLang's argument is not supported, or this process has had an
            elastic server.
        HookError: SGLang is not what the hooks were written for.
    """
    ours = {name: value for name, value in values.items() if name.startswith(_PREFIX)}
    sglangs = {name: value for name, value in values.items() if name not in ours}
    given = server_args_class(**sglangs)
    if not ours and given.elastic_ep_backend != BACKEND:
        return given
    from elasticmoe_patches.services import refuse_another
    from elasticmoe_patches.srt.server_args import prepare_launch

    check_all()
    refuse_another()
    args = argparse.Namespace(**msgspec.structs.asdict(given), **_settings(ours))
    config = elastic_config(args)
    assert config is not None, "an elastic Engine without settings"
    prepare_launch(args, config)
    return server_args_class(**{name: value for name, value in vars(args).items() if name not in ours})


def _settings(ours: dict[str, Any]) -> dict[str, Any]:
    """The settings with sizes like "2GiB" in bytes, as the launcher's flags have them."""
    known = {_PREFIX + field.name for field in fields(ElasticConfig)}
    unknown = sorted(set(ours) - known)
    if unknown:
        raise UserInputError(f"no such setting: {', '.join(unknown)}", hint=f"Known: {', '.join(sorted(known))}")
    sizes = {_PREFIX + name for name in _SIZES}
    return {
        name: parse_bytes(value) if name in sizes and isinstance(value, str) else value for name, value in ours.items()
    }


def name_backend(server_args: Any) -> None:
    """Name our backend in the tokenizer's arguments, where NVIDIA Dynamo looks whether elastic EP is on.

    Only there: in SGLang's published configuration any value starts its own elastic EP. To be called when all other
    processes have their copy.
    """
    msgspec.Struct.__setattr__(server_args, "elastic_ep_backend", BACKEND)


def add_methods(engine_class: type) -> None:
    """Give SGLang's Engine the functions of this module that are for it."""
    for method in (
        scale_elastic_ep,
        async_scale_elastic_ep,
        rebalance_elastic_ep,
        async_rebalance_elastic_ep,
        get_elastic_ep_state,
        get_elastic_ep_status,
        async_get_elastic_ep_status,
        get_elastic_ep_operations,
        get_elastic_ep_operation,
    ):
        setattr(engine_class, method.__name__, method)


def _elastic(engine: Any) -> ElasticEp:
    from elasticmoe_patches.services import services

    # Starts the tokenizer's loop in the event loop that runs now, as any request does.
    engine.tokenizer_manager.auto_create_handle_loop()
    return services().elastic


def scale_elastic_ep(self: Any, **request: Any) -> dict[str, Any]:
    """Change the number of active ranks, or retire or restore some; blocks until the operation has ended.

    Args:
        request: the fields of `ScaleRequest`: new_ep_size=4, retire_ranks=[1] or restore_ranks=[1], ...

    Returns:
        The operation; its phase tells how it ended.

    Raises:
        ElasticMoEError: as `Coordinator.submit`; StaleRequest: another generation or instance was expected.
    """
    answer: dict[str, Any] = self.loop.run_until_complete(async_scale_elastic_ep(self, **{**request, "wait": True}))
    return answer


async def async_scale_elastic_ep(self: Any, **request: Any) -> dict[str, Any]:
    """The same for a program whose event loop runs: returns at once, or with wait=True when the operation has ended."""
    return _plain(await _elastic(self).scale(scale_request(request)))


def rebalance_elastic_ep(self: Any, **request: Any) -> dict[str, Any]:
    """Observe routing, then move columns so that ranks get equal shares of it; blocks until the operation has ended.

    Args:
        request: the fields of `RebalanceRequest`: observe_s=10, dry_run=True, ...

    Raises:
        RoutingUnknown: it could not be observed. ElasticMoEError: as `Coordinator.submit`.
    """
    request = {**request, "wait": True}
    answer: dict[str, Any] = self.loop.run_until_complete(async_rebalance_elastic_ep(self, **request))
    return answer


async def async_rebalance_elastic_ep(self: Any, **request: Any) -> dict[str, Any]:
    """The same for a program whose event loop runs: returns when routing was observed, or with wait=True at the end."""
    return _plain(await _elastic(self).rebalance(rebalance_request(request)))


def get_elastic_ep_state(self: Any) -> dict[str, Any]:
    """Whether a change is running, in SGLang's terms."""
    from elasticmoe_patches.services import services

    return _plain(services().elastic.scaling_state())


def get_elastic_ep_status(self: Any) -> dict[str, Any]:
    """Ranks, membership, epoch, placement, memory, the running and the last operation; blocks for the HMM's answer."""
    from elasticmoe_patches.services import services

    status = asyncio.run_coroutine_threadsafe(services().elastic.status(), services().loop)
    return _plain(status.result(_STATUS_S))


async def async_get_elastic_ep_status(self: Any) -> dict[str, Any]:
    """The same for a program whose event loop runs."""
    from elasticmoe_patches.services import services

    return _plain(await services().elastic.status())


def get_elastic_ep_operations(self: Any) -> list[dict[str, Any]]:
    """The latest operations, newest first."""
    from elasticmoe_patches.services import services

    operations: list[dict[str, Any]] = _plain(OperationList(operations=services().elastic.operations()))["operations"]
    return operations


def get_elastic_ep_operation(self: Any, operation_id: str) -> dict[str, Any]:
    """One of them. Raises KeyError for an unknown one."""
    from elasticmoe_patches.services import services

    operation = services().elastic.operation(operation_id)
    if operation is None:
        raise KeyError(operation_id)
    return _plain(operation)


def _plain(answer: msgspec.Struct) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(answer)
    return values
