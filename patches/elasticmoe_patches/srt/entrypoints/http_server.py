"""Our endpoints on SGLang's HTTP server, in front of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
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
    """Mounts the scale and status endpoints on SGLang's port, in front of SGLang's own.

    All first ranks serve by then, so the coordinator starts here too.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from elasticmoe_patches.services import services
    from elasticmoe_sglang.api.router import build_router, mount

    verify_for_process("main")
    tokenizer_manager = kwargs["tokenizer_manager"] if "tokenizer_manager" in kwargs else args[1]

    router = build_router(
        services().start_coordinator(tokenizer_manager),
        protect=auth_level(AuthLevel.ADMIN_OPTIONAL),  # the level of SGLang's own scaling endpoint
        loop=services().loop,
    )
    mount(app, router)
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def with_tokenizer_loop(app: Any) -> AsyncIterator[Any]:
        # Commands leave, fences arrive and signals to stop are handled in this loop; SGLang starts it with the first
        # request otherwise.
        tokenizer_manager.auto_create_handle_loop()
        async with lifespan(app) as state:
            yield state

    app.router.lifespan_context = with_tokenizer_loop
