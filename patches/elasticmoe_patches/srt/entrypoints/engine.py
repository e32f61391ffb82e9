"""Starting the HMM, the IMM, the coordinator, and our controller and detokenizer processes; an Engine's settings."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches import prefork
from elasticmoe_patches.plugin import install_for_process, verify_for_process
from elasticmoe_patches.spec import MAIN, Hooks
from elasticmoe_patches.versions import api

HOOKS = hook = Hooks(__name__, MAIN)


@hook(
    "attribute",
    "Engine.server_args_class: struct ServerArgs",
    scope="flags",
    expires="SGLang lets plugins declare arguments.",
)
def elastic_server_args(current: Any) -> Any:
    """`sgl.Engine` takes `elasticmoe_ep_size=2` where the launcher takes --elasticmoe-ep-size 2."""
    from elasticmoe_patches.engine import server_args_of

    def server_args(**values: Any) -> Any:
        return server_args_of(current, values)

    return staticmethod(server_args)


@hook(
    "around",
    "Engine._launch_subprocesses(cls, server_args, init_tokenizer_manager_func, run_scheduler_process_func, "
    "run_detokenizer_process_func, port_args=None, placement_group=None)",
    expires="SGLang offers a start-up hook for sidecars.",
)
def around_launch_subprocesses(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """Starts the coordinator once the first ranks serve, for an HTTP server and for an Engine, and gives Engine methods
    for what the HTTP server has routes for."""
    from elasticmoe_patches.engine import add_methods, name_backend
    from elasticmoe_patches.services import services

    launched = original(cls, *args, **kwargs)
    prefork.dismiss()
    verify_for_process("main")
    tokenizer_manager = launched[0]
    services().start_coordinator(tokenizer_manager)
    name_backend(tokenizer_manager.server_args)
    add_methods(cls)
    return launched


@hook(
    "around",
    "Engine._launch_scheduler_processes(cls, server_args, port_args, run_scheduler_process_func, *, "
    "placement_group=None)",
    expires="SGLang offers a start-up hook for sidecars.",
)
def around_launch_scheduler_processes(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """Starts the HMM and the IMM before the first rank.

    The controller, which the original starts, starts the ranks through them.
    """
    from elasticmoe_patches.services import start_services

    start_services()
    with prefork.used(), api().controller_starts_workers():
        return original(cls, *args, **kwargs)


@hook(
    "around",
    "Engine._launch_detokenizer_subprocesses(cls, server_args, port_args, run_detokenizer_process_func)",
    expires="SGLang loads plugins in the detokenizer.",
)
def around_launch_detokenizers(
    original: Any, cls: type, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> Any:
    """The detokenizer passes on the fence behind a retiring rank's last output: no token overtakes another."""
    with prefork.used():
        return original(cls, server_args, port_args, detokenizer_process)


def controller_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's data-parallel controller with our hooks installed; runs in a process of its own."""
    from elasticmoe_sglang.lifeline import die_with_parent

    die_with_parent()
    install_for_process("dpc")
    from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process

    from elasticmoe_patches.srt.managers.io_struct import register_types

    register_types()
    run_data_parallel_controller_process(*args, **kwargs)


@hook(
    "attribute",
    "run_data_parallel_controller_process(server_args, port_args, pipe_writer, "
    "run_scheduler_process_func=<function run_scheduler_process>)",
    also={
        "0.5.23": "(server_args, port_args, pipe_writer, run_scheduler_process_func=<function run_scheduler_process>, "
        "prelaunched_schedulers=None)"
    },
    expires="only 0.5.23 and later are supported, which load plugins there.",
)
def hooked_controller_process(_current: Any) -> Any:
    """SGLang 0.5.21 loads no plugins in the data-parallel controller, and neither version ends it with its parent."""
    return controller_process


def detokenizer_process(server_args: Any, port_args: Any) -> None:
    """SGLang's detokenizer, which also passes on the fence that a retiring rank sends behind its last output."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager, run_detokenizer_process
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, register_types
    from elasticmoe_sglang.lifeline import die_with_parent
    from elasticmoe_sglang.runtime import only_this_user

    class ElasticDetokenizerManager(DetokenizerManager):  # type: ignore[misc]
        def init_ipc_channels(self, port_args: Any, server_args: Any) -> None:
            super().init_ipc_channels(port_args, server_args)
            only_this_user(port_args.detokenizer_ipc_name)

        def init_request_dispatcher(self) -> None:
            super().init_request_dispatcher()
            self._request_dispatcher += TypeBasedDispatcher([(ElasticFenceReq, lambda fence: fence)])

    register_types()
    die_with_parent()
    install_for_process("detokenizer")  # names the process: where SGLang loads plugins here, `register` asks for it
    run_detokenizer_process(server_args, port_args, detokenizer_manager_class=ElasticDetokenizerManager)
