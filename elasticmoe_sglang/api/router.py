"""The HTTP routes. Mounted in front of SGLang's own, they are covered by SGLang's admin-key middleware."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.params import Depends
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from elasticmoe_sglang.api.elastic_ep import ElasticEp
from elasticmoe_sglang.api.feed import Feed
from elasticmoe_sglang.api.types import (
    MAX_BODY_BYTES,
    ErrorBody,
    OperationList,
    ScaleRequest,
    parse_limit,
    parse_policy_request,
    parse_rebalance_request,
    parse_scale_request,
)
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import (
    ElasticMoEError,
    HmmError,
    OperationIdTaken,
    OperationInProgress,
    RoutingUnknown,
    StaleRequest,
    TooManyReaders,
    UserInputError,
)
from elasticmoe_sglang.live_figures import LiveFigures
from elasticmoe_sglang.policy.controller import PolicyController

Handler = Callable[[Request], Awaitable[Response]]
Protect = Callable[[Handler], Handler]

POLICY = "/elastic_ep/policy"
VLLM_DRAIN_TIMEOUT_S = 120
"""How long vLLM's request waits when it does not say."""


def unprotected(handler: Handler) -> Handler:
    """Return the handler unchanged: no key is required."""
    return handler


def mount(app: FastAPI, router: APIRouter) -> None:
    """Put these routes in front of all routes of `app`; the first route that matches wins.

    Not `app.include_router`: FastAPI may keep an included router as one opaque route. SGLang's middleware reads the
    required key level from the endpoint of the matching route; it would find none and let every request through.
    """
    app.router.routes[:0] = router.routes


def build_router(
    coordinator: Coordinator,
    protect: Protect = unprotected,
    dependencies: Sequence[Depends] = (),
    loop: asyncio.AbstractEventLoop | None = None,
    instance_id: str | None = None,
    feed: Feed | None = None,
    policy: PolicyController | None = None,
) -> APIRouter:
    """The routes, for `mount`.

    Args:
        protect: applied to each handler; SGLang's `auth_level(AuthLevel.ADMIN_OPTIONAL)` makes its middleware require
            the admin key.
        dependencies: run before each handler.
        loop: the event loop of the coordinator, which runs in another thread; None: the loop that serves the routes.
        instance_id: names this start of the server; None: a new name.
        feed: of the events; None: one whose figures stay empty.
        policy: asks for changes by itself; manual requests go through it, and it has a route.

    Status codes: 200, also for an operation that has only begun (`phase` tells), 400 for a malformed or impossible
    request, 404 for an unknown operation, 409 while another change runs, for a stale request, for an id of another
    target and where routing is not known, 503 while the HMM does not answer or too many readers follow the events. For
    vLLM's size 200 once it has been reached, 408 when its timeout has passed, 500 when the change failed. A body with
    status 400 or more is an `ErrorBody`.
    """
    elastic = ElasticEp(coordinator, instance_id=instance_id or uuid.uuid4().hex, loop=loop, policy=policy)
    handlers = Handlers(elastic, feed or Feed(coordinator, LiveFigures(), loop=loop))
    router = APIRouter(tags=["elastic expert parallelism"], dependencies=list(dependencies))
    for method, path, handler in (
        ("POST", "/scale_elastic_ep", handlers.scale),
        ("POST", "/elastic_ep/rebalance", handlers.rebalance),
        ("GET", "/elastic_ep/operations", handlers.operations),
        ("GET", "/elastic_ep/operations/{operation_id}", handlers.operation),
        ("GET", "/elastic_ep/status", handlers.status),
        ("GET", "/elastic_ep/events", handlers.events),
        *((("GET", POLICY, handlers.policy), ("POST", POLICY, handlers.set_policy)) if policy is not None else ()),
        # SGLang's clients ask with GET, vLLM's with POST, and each gets its own answer.
        ("GET", "/is_scaling_elastic_ep", handlers.sglang_state),
        ("POST", "/is_scaling_elastic_ep", handlers.vllm_state),
    ):
        router.add_api_route(path, protect(_function(handler)), methods=[method], response_model=None)
    return router


class Handlers:
    """One method for each route."""

    def __init__(self, elastic: ElasticEp, feed: Feed) -> None:
        self._elastic = elastic
        self._feed = feed

    async def scale(self, request: Request) -> Response:
        """Change the number of active ranks, or retire or restore some."""
        try:
            asked, warnings = parse_scale_request(await _body(request))
            if asked.new_data_parallel_size is not msgspec.UNSET:
                return await self._scale_as_vllm(asked, warnings)
            return _json(await self._elastic.scale(asked, warnings))
        except ElasticMoEError as error:
            return self._refusal(error)

    async def _scale_as_vllm(self, asked: ScaleRequest, warnings: list[str]) -> Response:
        timeout_s = VLLM_DRAIN_TIMEOUT_S if asked.drain_timeout is msgspec.UNSET else asked.drain_timeout
        operation = await self._elastic.wait(await self._elastic.submit(asked), timeout_s)
        operation_id = operation.operation_id
        if not operation.phase.ended:
            sentence = (
                f"the change to EP size {operation.new_ep_size} is still {operation.phase.value} after {timeout_s} "
                f"seconds and goes on; GET /elastic_ep/operations/{operation_id} tells how it ends"
            )
            return _json(ErrorBody(error=sentence, operation_id=operation_id), status=408)
        if operation.phase is not Phase.DONE:
            was = "was rolled back" if operation.phase is Phase.ROLLED_BACK else "failed"
            sentence = f"the change to EP size {operation.new_ep_size} {was}: {operation.error}"
            return _json(ErrorBody(error=sentence, operation_id=operation_id), status=500)
        return _json(self._elastic.vllm_answer(operation, warnings))

    async def operations(self, request: Request) -> Response:
        """The latest operations, newest first."""
        return _json(OperationList(operations=self._elastic.operations()))

    async def operation(self, request: Request) -> Response:
        """One operation: phase, timings, columns and bytes moved, error."""
        operation_id = str(request.path_params["operation_id"])
        found = self._elastic.operation(operation_id)
        if found is None:
            return _json(ErrorBody(error=f"no operation {operation_id[:128]!r} among the latest ones"), status=404)
        return _json(found)

    async def rebalance(self, request: Request) -> Response:
        """Observe routing for some seconds, then move expert columns so that ranks get equal shares of it."""
        try:
            return _json(await self._elastic.rebalance(parse_rebalance_request(await _body(request))))
        except ElasticMoEError as error:
            return self._refusal(error)

    async def status(self, request: Request) -> Response:
        """Ranks, membership, epoch, placement, memory, HMM, the running and the last ended operation."""
        return _json(await self._elastic.status())

    async def events(self, request: Request) -> Response:
        """Status, operations and figures as server-sent events: every second, and at once when something changes."""
        try:
            stream = self._feed.open()
        except ElasticMoEError as error:
            return self._refusal(error)
        # A proxy in front of the server must not collect events.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def policy(self, request: Request) -> Response:
        """Settings, state, figures and the latest decisions, newest first; ?limit= says how many."""
        try:
            return _json(self._elastic.policy_view(parse_limit(request.query_params.get("limit"))))
        except ElasticMoEError as error:
            return self._refusal(error)

    async def set_policy(self, request: Request) -> Response:
        """Replace settings; the fields that are given."""
        try:
            return _json(await self._elastic.set_policy(parse_policy_request(await _body(request))))
        except ElasticMoEError as error:
            return self._refusal(error)

    async def sglang_state(self, request: Request) -> Response:
        """Whether a change is running, in SGLang's terms."""
        return _json(self._elastic.scaling_state())

    async def vllm_state(self, request: Request) -> Response:
        """Whether a change is running, in vLLM's terms."""
        return _json(self._elastic.vllm_state())

    def _refusal(self, error: ElasticMoEError) -> Response:
        if isinstance(error, (OperationInProgress, OperationIdTaken, RoutingUnknown, StaleRequest)):
            running = self._elastic.running
            body = ErrorBody(
                error=str(error),
                instance_id=self._elastic.instance_id,
                topology_generation=self._elastic.generation,
                operation_id=running.operation_id if running is not None else None,
            )
            return _json(body, status=409)
        if isinstance(error, UserInputError):
            return _json(ErrorBody(error=str(error)), status=400)
        if isinstance(error, (HmmError, TooManyReaders)):
            return _json(ErrorBody(error=str(error)), status=503)
        raise error


def _function(method: Handler) -> Handler:
    """The bound method as a function, to which SGLang's `auth_level` can attach its mark."""

    async def handler(request: Request) -> Response:
        return await method(request)

    handler.__name__ = handler.__qualname__ = getattr(method, "__name__")  # noqa: B009 (Handler has none for mypy)
    handler.__doc__ = method.__doc__
    return handler


async def _body(request: Request) -> bytes:
    """The body; reading stops beyond MAX_BODY_BYTES."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
    except ClientDisconnect as error:
        raise UserInputError("the client disconnected before its body was complete") from error
    return bytes(body)


def _json(payload: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status_code=status, media_type="application/json")
