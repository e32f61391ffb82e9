"""Our endpoints on SGLang's HTTP server, in front of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from elasticmoe_patches.runtime_state import refused_routes
from elasticmoe_patches.spec import MAIN, Hooks
from elasticmoe_patches.srt.managers.tokenizer_manager import stop

HOOKS = hook = Hooks(__name__, MAIN)


@hook(
    "around",
    "_setup_and_run_http_server(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
    "subprocess_watchdog, execute_warmup_func=<function _execute_server_warmup>, launch_callback=None)",
    expires="SGLang lets plugins add routes, and its main process ends soon after its HTTP server.",
)
def around_setup_and_run(original: Any, *args: Any, **kwargs: Any) -> None:
    """Mounts the scale and status endpoints on SGLang's port, in front of SGLang's own, and ends a stopped server soon.

    SIGINT stops it as SIGTERM does, after its running requests and with our coordinator knowing. SGLang leaves SIGINT
    to uvicorn, which ends by KeyboardInterrupt while our coordinator still serves.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from elasticmoe_patches.live import live
    from elasticmoe_patches.services import services
    from elasticmoe_sglang.api.feed import Feed
    from elasticmoe_sglang.api.page import serve_page
    from elasticmoe_sglang.api.refusals import build_refusals
    from elasticmoe_sglang.api.router import build_router, mount

    tokenizer_manager = kwargs["tokenizer_manager"] if "tokenizer_manager" in kwargs else args[1]
    protect = auth_level(AuthLevel.ADMIN_OPTIONAL)  # the level of SGLang's own scaling endpoint
    feed = Feed(
        services().coordinator,
        live(tokenizer_manager).figures,
        model=tokenizer_manager.served_model_name,
        loop=services().loop,
        ending=services().ending,
        instance_id=services().instance_id,
    )
    router = build_router(
        services().coordinator,
        protect=protect,
        loop=services().loop,
        instance_id=services().instance_id,
        feed=feed,
        policy=services().policy,
    )
    mount(app, build_refusals(refused_routes(), protect))
    services().watch(subprocess_watchdog(args, kwargs))
    mount(app, router)
    start_with_server(app, lambda: start_tokenizer(tokenizer_manager))
    serve_page(app)
    original(*args, **kwargs)
    services().leave()


def subprocess_watchdog(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """That of `around_setup_and_run`'s arguments."""
    return kwargs["subprocess_watchdog"] if "subprocess_watchdog" in kwargs else args[5]


def start_tokenizer(tokenizer_manager: Any) -> None:
    """Start the tokenizer's loop in the event loop that runs, with SIGINT as a signal to stop."""
    tokenizer_manager.auto_create_handle_loop()
    tokenizer_manager.event_loop.add_signal_handler(signal.SIGINT, stop, tokenizer_manager)


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
