"""Our endpoints on SGLang's HTTP server, in front of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from elasticmoe_patches.plugin import verify_for_process
from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN)


@hook(
    "around",
    "_setup_and_run_http_server(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
    "subprocess_watchdog, execute_warmup_func=<function _execute_server_warmup>, launch_callback=None)",
    expires="SGLang lets plugins add routes, and its main process ends soon after its HTTP server.",
)
def around_setup_and_run(original: Any, *args: Any, **kwargs: Any) -> None:
    """Mounts the scale and status endpoints on SGLang's port, in front of SGLang's own, and ends a stopped server soon.

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
        policy=services().policy,
    )
    mount(app, router)
    start_with_server(app, tokenizer_manager.auto_create_handle_loop)
    original(*args, **kwargs)
    services().leave()


def start_with_server(app: Any, start: Callable[[], None]) -> None:
    """Call `start` in the event loop of a FastAPI application once it serves.

    For the tokenizer's loop: commands leave, fences arrive and signals to stop are handled there, and SGLang starts it
    only with the first request.
    """
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def started(app: Any) -> AsyncIterator[Any]:
        start()
        async with lifespan(app) as state:
            yield state

    app.router.lifespan_context = started
