"""Our endpoints on SGLang's HTTP server, in front of its own."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.plugin import verify_for_process
from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN)


@hook(
    "before",
    "_setup_and_run_http_server(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
    "subprocess_watchdog, execute_warmup_func=<function _execute_server_warmup>, launch_callback=None)",
    expires="SGLang lets plugins add routes.",
)
def before_setup_and_run(*args: Any, **kwargs: Any) -> None:
    """Mounts the scale and status endpoints on SGLang's port.

    All first ranks serve by then, so the coordinator starts here too.
    """
    from sglang.srt.entrypoints.http_server import app

    from elasticmoe_patches.services import services

    verify_for_process("main")
    tokenizer_manager = kwargs["tokenizer_manager"] if "tokenizer_manager" in kwargs else args[1]
    mount(app, services().start_coordinator(tokenizer_manager), tokenizer_manager)


def mount(app: Any, handle: Any, tokenizer_manager: Any) -> None:
    """Same admin key as SGLang's own endpoint; the first matching route wins."""
    from fastapi import Depends
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from elasticmoe_sglang.api.router import build_router
    from elasticmoe_sglang.api.router import mount as mount_first

    async def with_tokenizer_loop() -> None:
        # Commands are sent and fences received in this loop; SGLang starts it with the first request otherwise.
        tokenizer_manager.auto_create_handle_loop()

    router = build_router(
        handle, protect=auth_level(AuthLevel.ADMIN_OPTIONAL), dependencies=[Depends(with_tokenizer_loop)]
    )
    mount_first(app, router)
