"""The operator's page: one document, made of the files in `ui/`, that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/elastic_ep/ui"
_PARTS = {"style": ("page.css",), "script": ("base.js", "plots.js", "page.js")}
"""Files of `ui/` that are the content of the document's elements."""


def serve_page(app: FastAPI) -> None:
    """Serve the page under PATH, in front of all middleware. To be called before the application serves.

    SGLang's middleware would ask for `--api-key`, which a browser cannot send with the address that somebody enters.
    The page tells nothing of the server: what it shows it asks for, with the key that is entered there.
    """
    headers, content = page_headers(), render_page()

    async def page(request: Request) -> Response:
        return Response(content, headers=headers)

    route = Route(PATH, page, methods=["GET"], include_in_schema=False)
    build = app.build_middleware_stack

    def with_the_page() -> ASGIApp:
        inner = build()

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and route.matches(scope)[0] is Match.FULL:
                await route.handle(scope, receive, send)
            else:
                await inner(scope, receive, send)

        return serve

    setattr(app, "build_middleware_stack", with_the_page)  # noqa: B010 (mypy forbids the assignment)


def render_page() -> bytes:
    """The document, with its style and its script inside."""
    document = _read("page.html")
    for element in _PARTS:
        empty = f"<{element}></{element}>"
        assert document.count(empty) == 1, f"page.html has no place for the {element}"
        document = document.replace(empty, f"<{element}>{_content(element)}</{element}>")
    return document.encode()


def page_headers() -> dict[str, str]:
    """With a policy under which the browser runs this script, uses this style and talks to this server only."""
    policy = {
        "default-src": "'none'",
        "script-src": _hash("script"),
        "style-src": _hash("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hash(element: str) -> str:
    digest = hashlib.sha256(_content(element).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _content(element: str) -> str:
    return "\n".join(_read(name) for name in _PARTS[element])


def _read(name: str) -> str:
    return (files("elasticmoe_sglang.api") / "ui" / name).read_text(encoding="utf-8")
