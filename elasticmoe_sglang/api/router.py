"""The HTTP routes. Mounted in front of SGLang's own, they are covered by SGLang's admin-key middleware."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.params import Depends
from starlette.requests import ClientDisconnect

from elasticmoe_sglang.api.types import (
    MAX_BODY_BYTES,
    ErrorBody,
    OperationList,
    ScalingState,
    parse_limit,
    parse_policy_request,
    parse_scale_request,
    target_of,
)
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Operation, Phase, Status
from elasticmoe_sglang.errors import ElasticMoEError, HmmError, OperationInProgress, PhaseTimeout, UserInputError
from elasticmoe_sglang.event_loop import run_in
from elasticmoe_sglang.policy.controller import PolicyController
from elasticmoe_sglang.policy.view import PolicyView

Handler = Callable[[Request], Awaitable[Response]]
_ResultT = TypeVar("_ResultT")

# Phases in the terms of SGLang's elastic EP; scaling down ends in serving_shrunk, scaling up in serving_expanded.
_UPSTREAM_PHASES = {
    Phase.PLANNED: "waiting_for_cohort",
    Phase.PREPARING: "waiting_for_cohort",
    Phase.COMMITTING: "syncing_new_world",
    Phase.FINISHING: "syncing_new_world",
    Phase.FAILED: "failed",
    Phase.ROLLED_BACK: "failed",
}


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
    protect: Callable[[Handler], Handler] = unprotected,
    dependencies: Sequence[Depends] = (),
    loop: asyncio.AbstractEventLoop | None = None,
    policy: PolicyController | None = None,
) -> APIRouter:
    """The routes, for `mount`.

    Args:
        protect: applied to each handler; SGLang's `auth_level(AuthLevel.ADMIN_OPTIONAL)` makes its middleware require
            the admin key.
        dependencies: run before each handler.
        loop: the event loop of the coordinator, which runs in another thread; None: the loop that serves the routes.
        policy: asks for changes by itself; manual requests go through it, and it has a route.

    Status codes: 202 with an operation that is running, 200 with one that has ended (`phase` tells how) and for all
    other responses, 400 for a malformed or impossible request, 404 for an unknown operation, 409 while another change
    runs, 503 while the HMM does not answer. A body with status 400 or more is {"error": sentence}.
    """

    async def call(coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
        return await (coroutine if loop is None else run_in(loop, coroutine))

    router = APIRouter(tags=["elastic expert parallelism"], dependencies=list(dependencies))
    submit = coordinator.submit if policy is None else policy.submit

    @protect
    async def scale_elastic_ep(request: Request) -> Response:
        """Change the number of active ranks, or retire some."""
        try:
            asked = parse_scale_request(await _body(request))
            operation_id = None if asked.operation_id is msgspec.UNSET else asked.operation_id
            operation = await call(submit(target_of(asked), operation_id))
        except ElasticMoEError as error:
            return _refusal(error)
        if asked.wait:
            operation = await call(coordinator.wait(operation.operation_id))
        return _json(operation, status=200 if operation.phase.ended else 202)

    @protect
    async def operations(request: Request) -> Response:
        """The latest operations, newest first."""
        return _json(OperationList(operations=coordinator.operations()))

    @protect
    async def operation(request: Request) -> Response:
        """One operation: phase, timings, columns and bytes moved, error."""
        operation_id = str(request.path_params["operation_id"])
        found = coordinator.get(operation_id)
        if found is None:
            return _json(ErrorBody(error=f"no operation {operation_id[:128]!r} among the latest ones"), status=404)
        return _json(found)

    @protect
    async def status(request: Request) -> Response:
        """Ranks, membership, epoch, placement, memory, HMM, the running and the last ended operation."""
        return _json(await call(coordinator.status()))

    @protect
    async def is_scaling_elastic_ep(request: Request) -> Response:
        """Whether a change is running, in SGLang's terms."""
        return _json(scaling_state(coordinator))

    add = router.add_api_route
    add("/scale_elastic_ep", scale_elastic_ep, methods=["POST"], response_model=None)
    add("/elastic_ep/operations", operations, methods=["GET"], response_model=None)
    add("/elastic_ep/operations/{operation_id}", operation, methods=["GET"], response_model=None)
    add("/elastic_ep/status", status, methods=["GET"], response_model=None)
    # SGLang's clients ask with GET, vLLM's with POST.
    add("/is_scaling_elastic_ep", is_scaling_elastic_ep, methods=["GET"], response_model=None)
    add("/is_scaling_elastic_ep", is_scaling_elastic_ep, methods=["POST"], response_model=None)
    if policy is not None:
        _add_policy(router, policy, protect, call)
    return router


def _add_policy(
    router: APIRouter,
    policy: PolicyController,
    protect: Callable[[Handler], Handler],
    call: Callable[[Coroutine[Any, Any, PolicyView]], Awaitable[PolicyView]],
) -> None:
    async def replace_settings(values: dict[str, Any]) -> PolicyView:
        return policy.set(values)

    @protect
    async def show_policy(request: Request) -> Response:
        """Settings, state, figures and the latest decisions, newest first; ?limit= says how many."""
        try:
            return _json(policy.view(parse_limit(request.query_params.get("limit"))))
        except UserInputError as error:
            return _refusal(error)

    @protect
    async def set_policy(request: Request) -> Response:
        """Replace the settings that the body has."""
        try:
            return _json(await call(replace_settings(parse_policy_request(await _body(request)))))
        except UserInputError as error:
            return _refusal(error)

    router.add_api_route("/elastic_ep/policy", show_policy, methods=["GET"], response_model=None)
    router.add_api_route("/elastic_ep/policy", set_policy, methods=["POST"], response_model=None)


def scaling_state(coordinator: Coordinator) -> ScalingState:
    """The state of scaling as SGLang's own endpoint reports it; clients of SGLang and vLLM understand it."""
    running = coordinator.running
    latest = running or coordinator.last
    return ScalingState(
        is_scaling_elastic_ep=running is not None,
        effective_ep_size=len(coordinator.membership.ranks),
        pending_ep_size=running.new_ep_size if running else None,
        scale_phase=_upstream_phase(latest),
        last_error=latest.error if latest else None,
    )


def _upstream_phase(operation: Operation | None) -> str:
    if operation is None:
        return "idle"
    if operation.phase is Phase.DONE:
        return "serving_shrunk" if operation.new_ep_size < operation.old_ep_size else "serving_expanded"
    return _UPSTREAM_PHASES[operation.phase]


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


def _refusal(error: ElasticMoEError) -> Response:
    if isinstance(error, UserInputError):
        status = 400
    elif isinstance(error, OperationInProgress):
        status = 409
    elif isinstance(error, (HmmError, PhaseTimeout)):
        status = 503
    else:
        raise error
    return _json(ErrorBody(error=str(error)), status=status)


def _json(
    payload: Operation | OperationList | Status | ScalingState | PolicyView | ErrorBody, status: int = 200
) -> Response:
    return Response(msgspec.json.encode(payload), status_code=status, media_type="application/json")
