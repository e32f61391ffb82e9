"""Endpoints of SGLang's server that an elastic one refuses, with a sentence."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe_sglang.api.router import Handler, Protect, unprotected
from elasticmoe_sglang.api.types import ErrorBody
from elasticmoe_sglang.errors import refused_sentence


def build_refusals(routes: Iterable[tuple[str, tuple[str, ...], str]], protect: Protect = unprotected) -> APIRouter:
    """Routes that answer 400 and {"error": sentence}, for `mount`.

    Args:
        routes: path, HTTP methods and why.
        protect: as for `build_router`.
    """
    router = APIRouter(tags=["elastic expert parallelism"])
    for path, methods, why in routes:
        router.add_api_route(path, protect(_refusing(why)), methods=list(methods), response_model=None)
    return router


def _refusing(why: str) -> Handler:
    async def refuse(request: Request) -> Response:
        content = msgspec.json.encode(ErrorBody(error=refused_sentence(request.url.path, why)))
        return Response(content, status_code=400, media_type="application/json")

    return refuse
