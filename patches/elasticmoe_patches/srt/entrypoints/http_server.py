"""Our endpoints on SGLang's HTTP server, in front of its own (mirrors sglang/srt/entrypoints/http_server.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process

_MAIN: frozenset[Process] = frozenset(("main",))


def before_setup_and_run(*args: Any, **kwargs: Any) -> None:
    """All first ranks serve: start the coordinator and mount its endpoints in front of SGLang's."""
    from fastapi import Depends
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from elasticmoe_patches.plugin import verify_for_process
    from elasticmoe_patches.services import services
    from elasticmoe_sglang.api.router import build_router, mount

    verify_for_process("main")
    tokenizer_manager = kwargs["tokenizer_manager"] if "tokenizer_manager" in kwargs else args[1]

    async def with_tokenizer_loop() -> None:
        # Commands are sent and fences received in this event loop; SGLang starts it only with the first request.
        tokenizer_manager.auto_create_handle_loop()

    router = build_router(
        services().start_coordinator(tokenizer_manager),
        protect=auth_level(AuthLevel.ADMIN_OPTIONAL),  # the level of SGLang's own scaling endpoint
        dependencies=[Depends(with_tokenizer_loop)],
        loop=services().loop,
    )
    mount(app, router)


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
