"""The routes. The caller mounts them in front of SGLang's, whose middleware then checks its own admin key for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.params import Depends
from starlette.requests import ClientDisconnect

from elasticmoe_sglang.api.parse import MAX_BODY_BYTES, parse_scale_request, target_of
from elasticmoe_sglang.api.types import ErrorBody, Operation, OperationList, Phase, ScalingState, Status
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import ElasticMoEError, HmmError, OperationInProgress, UserInputError
from elasticmoe_sglang.planner import Target

Handler = Callable[[Request], Awaitable[Response]]

# Our phases in the words of SGLang's elastic EP; a shrink ends in serving_shrunk, a growth in serving_expanded.
_UPSTREAM_PHASES = {
    Phase.PLANNED: "waiting_for_cohort",
    Phase.PREPARING: "waiting_for_cohort",
    Phase.COMMITTING: "syncing_new_world",
    Phase.FINISHING: "syncing_new_world",
    Phase.FAILED: "failed",
    Phase.ROLLED_BACK: "failed",
}


class Changes(Protocol):
    """What the routes need of a coordinator: a `Coordinator` in this event loop, or a `CoordinatorHandle`."""

    @property
    def membership(self) -> Membership: ...
    @property
    def running(self) -> Operation | None: ...
    @property
    def last(self) -> Operation | None: ...
    async def submit(self, target: Target, operation_id: str | None = None) -> Operation: ...
    async def wait(self, operation_id: str) -> Operation: ...
    async def status(self) -> Status: ...
    def get(self, operation_id: str) -> Operation | None: ...
    def operations(self) -> list[Operation]: ...


def unprotected(handler: Handler) -> Handler:
    """Leaves a handler as it is: no key is asked for."""
    return handler


def mount(app: FastAPI, router: APIRouter) -> None:
    """Put our routes in front of all that `app` has; the first route that matches wins.

    Not `app.include_router`: FastAPI may keep an included router as one opaque route, and SGLang's middleware, which
    looks for the key's level on the endpoint of the route that matches, would find none there and let everybody in.
    """
    app.router.routes[:0] = router.routes


def build_router(
    coordinator: Changes,
    protect: Callable[[Handler], Handler] = unprotected,
    dependencies: Sequence[Depends] = (),
) -> APIRouter:
    """The paths of the HTTP side, for `mount`.

    Args:
        coordinator: reached from the event loop that serves these routes.
        protect: applied to each handler; SGLang's `auth_level(AuthLevel.ADMIN_OPTIONAL)` makes its middleware ask for
            the admin key.
        dependencies: run before each handler.

    Statuses: 202 with an operation that goes on, 200 with one that has ended (however: see `phase`) and for all other
    answers, 400 for what is malformed or impossible, 404 for an unknown operation, 409 while another change runs, 503
    while the HMM does not answer. A body with status 400 or more is {"error": sentence}.
    """
    router = APIRouter(tags=["elastic expert parallelism"], dependencies=list(dependencies))

    @protect
    async def scale_elastic_ep(request: Request) -> Response:
        """Change the number of active ranks, or retire some."""
        try:
            asked = parse_scale_request(await _body(request))
            operation = await coordinator.submit(
                target_of(asked), None if asked.operation_id is msgspec.UNSET else asked.operation_id
            )
        except ElasticMoEError as error:
            return _refusal(error)
        if asked.wait:
            operation = await coordinator.wait(operation.operation_id)
        return _json(operation, status=200 if operation.phase.ended else 202)

    @protect
    async def operations(request: Request) -> Response:
        """The last operations, newest first."""
        return _json(OperationList(operations=coordinator.operations()))

    @protect
    async def operation(request: Request) -> Response:
        """One operation: phase, timings, columns and bytes moved, error."""
        operation_id = str(request.path_params["operation_id"])
        found = coordinator.get(operation_id)
        if found is None:
            return _json(ErrorBody(error=f"no operation {operation_id[:128]!r} among the last ones"), status=404)
        return _json(found)

    @protect
    async def status(request: Request) -> Response:
        """Ranks, membership, epoch, placement, memory, HMM, the running and the last operation."""
        return _json(await coordinator.status())

    @protect
    async def is_scaling_elastic_ep(request: Request) -> Response:
        """Whether a change is running, in upstream's words."""
        return _json(scaling_state(coordinator))

    add = router.add_api_route
    add("/scale_elastic_ep", scale_elastic_ep, methods=["POST"], response_model=None)
    add("/elastic_ep/operations", operations, methods=["GET"], response_model=None)
    add("/elastic_ep/operations/{operation_id}", operation, methods=["GET"], response_model=None)
    add("/elastic_ep/status", status, methods=["GET"], response_model=None)
    # SGLang's clients ask with GET, vLLM's with POST.
    add("/is_scaling_elastic_ep", is_scaling_elastic_ep, methods=["GET"], response_model=None)
    add("/is_scaling_elastic_ep", is_scaling_elastic_ep, methods=["POST"], response_model=None)
    return router


def scaling_state(coordinator: Changes) -> ScalingState:
    """The state of scaling as SGLang's own endpoint words it; clients of both SGLang and vLLM understand it."""
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
    """The body, read no further than its limit."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
    except ClientDisconnect as error:
        raise UserInputError("the client left before its body was complete") from error
    return bytes(body)


def _refusal(error: ElasticMoEError) -> Response:
    if isinstance(error, UserInputError):
        status = 400
    elif isinstance(error, OperationInProgress):
        status = 409
    elif isinstance(error, HmmError):
        status = 503
    else:
        raise error
    return _json(ErrorBody(error=str(error)), status=status)


def _json(payload: Operation | OperationList | Status | ScalingState | ErrorBody, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status_code=status, media_type="application/json")
