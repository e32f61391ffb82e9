"""Starting the HMM, the IMM and our controller and detokenizer processes (mirrors sglang/srt/entrypoints/engine.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec


def around_launch_scheduler_processes(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """HMM and IMM first: the controller, started by the original, puts ranks into place through them."""
    from elasticmoe_patches.services import start_services

    start_services()
    return original(cls, *args, **kwargs)


def around_launch_detokenizers(
    original: Any, cls: type, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> Any:
    return original(cls, server_args, port_args, detokenizer_process)


def controller_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's data-parallel controller with our hooks in it; runs in a spawned process."""
    from elasticmoe_patches.plugin import install_for_process
    from elasticmoe_sglang.imm.server import die_with_parent

    die_with_parent()
    install_for_process("dpc")
    from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process

    from elasticmoe_patches.srt.managers.io_struct import register_types

    register_types()
    run_data_parallel_controller_process(*args, **kwargs)


def put_controller_process(_current: Any) -> Any:
    return controller_process


def detokenizer_process(server_args: Any, port_args: Any) -> None:
    """SGLang's detokenizer, which also passes on the fence that a retiring rank puts behind its last output."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager, run_detokenizer_process
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, register_types
    from elasticmoe_sglang.imm.server import die_with_parent

    class ElasticDetokenizerManager(DetokenizerManager):  # type: ignore[misc]
        def init_request_dispatcher(self) -> None:
            super().init_request_dispatcher()
            self._request_dispatcher += TypeBasedDispatcher([(ElasticFenceReq, lambda fence: fence)])

    register_types()
    die_with_parent()
    run_detokenizer_process(server_args, port_args, detokenizer_manager_class=ElasticDetokenizerManager)


HOOKS = (
    HookSpec(
        target="sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        kind="around",
        hook=f"{__name__}:around_launch_scheduler_processes",
        signature="(cls, server_args, port_args, run_scheduler_process_func, *, placement_group=None)",
        reason="Starts the HMM, the IMM and the coordinator before the first rank.",
        expires="SGLang offers a start-up hook for sidecars.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses",
        kind="around",
        hook=f"{__name__}:around_launch_detokenizers",
        signature="(cls, server_args, port_args, run_detokenizer_process_func)",
        reason="The detokenizer passes on the fence behind a retiring rank's last output: no token overtakes another.",
        expires="SGLang loads plugins in the detokenizer.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.entrypoints.engine.run_data_parallel_controller_process",
        kind="attribute",
        hook=f"{__name__}:put_controller_process",
        signature="(server_args, port_args, pipe_writer, run_scheduler_process_func=<function run_scheduler_process>)",
        reason="SGLang 0.5.21 loads no plugins in the data-parallel controller.",
        expires="0.5.23, which loads them there.",
        processes=frozenset(("main",)),
    ),
)
