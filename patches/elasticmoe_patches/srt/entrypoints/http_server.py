"""Our endpoints on SGLang's HTTP server, in front of its own (mirrors sglang/srt/entrypoints/http_server.py)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from elasticmoe_patches.spec import HookSpec, Process

_MAIN: frozenset[Process] = frozenset(("main",))


def before_setup_and_run(*args: Any, **kwargs: Any) -> None:
    """All first ranks serve: start the coordinator and put its endpoints in front."""
    from sglang.srt.entrypoints.http_server import app

    from elasticmoe_patches.plugin import verify_for_process
    from elasticmoe_patches.services import services

    verify_for_process("main")
    tokenizer_manager = kwargs["tokenizer_manager"] if "tokenizer_manager" in kwargs else args[1]
    mount(app, services().start_coordinator(tokenizer_manager), tokenizer_manager)


def mount(app: Any, handle: Any, tokenizer_manager: Any) -> None:
    """Same admin key as SGLang's own endpoint; the first matching route wins."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from elasticmoe_sglang.api.router import build_router
    from elasticmoe_sglang.api.router import mount as put_in_front

    put_in_front(app, build_router(handle, protect=auth_level(AuthLevel.ADMIN_OPTIONAL)))
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def with_tokenizer_loop(app: Any) -> AsyncIterator[Any]:
        # Commands leave, fences arrive and signals to stop are handled in this loop; SGLang starts it with the first
        # request otherwise.
        tokenizer_manager.auto_create_handle_loop()
        async with lifespan(app) as state:
            yield state

    app.router.lifespan_context = with_tokenizer_loop


HOOKS = (
    HookSpec(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        kind="before",
        hook=f"{__name__}:before_setup_and_run",
        signature="(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, subprocess_watchdog, "
        "execute_warmup_func=<function _execute_server_warmup>, launch_callback=None)",
        reason="Mounts the scale and status endpoints on SGLang's port.",
        expires="SGLang lets plugins add routes.",
        processes=_MAIN,
    ),
)
