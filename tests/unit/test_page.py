"""The page as a document: complete in itself, and held to that by the policy it is sent with. Browsers: tests/e2e."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from elasticmoe_sglang.api.page import PATH, page_headers, render_page, serve_page

VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """Collects tags, ids and what is inside `style` and `script`; counts what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.inside[self.open[-1]] = self.inside.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def page() -> Reader:
    reader = Reader()
    reader.feed(render_page().decode())
    reader.close()
    assert reader.open == []
    return reader


def test_nothing_comes_from_elsewhere(page: Reader) -> None:
    document = render_page().decode()
    addresses = set(re.findall(r"""https?://[^\s"'<>)]+""", document))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            address = attributes.get(name) or ""
            assert not address or address.startswith(("data:", "#")), f"<{tag} {name}={address!r}>"


def test_the_policy_allows_this_style_and_this_script_and_no_other(page: Reader) -> None:
    policy = page_headers()["Content-Security-Policy"]
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inside[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    for tag, attributes in page.tags:
        wrong = [name for name in attributes if name == "style" or name.startswith("on")]
        assert wrong == [], f"<{tag}>: the policy lets the browser ignore {wrong}"


def test_ids_are_there_once_and_those_that_are_named_exist(page: Reader) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {
        each
        for _, attributes in page.tags
        for name in ("for", "aria-labelledby", "aria-describedby")
        for each in (attributes.get(name) or "").split()
    }
    named |= set(re.findall(r"""\$\("([\w-]+)"\)""", page.inside["script"]))
    assert named <= set(ids)


def test_the_key_goes_into_a_header_only(page: Reader) -> None:
    script = page.inside["script"]
    uses = [line.strip() for line in script.splitlines() if "state.key" in line or "KEY" in line]
    assert any("Authorization: `Bearer ${state.key}`" in line for line in uses)
    assert not any("fetch(" in line or "location" in line for line in uses)
    assert "localStorage.setItem(KEY" not in script


def test_the_page_is_in_front_of_the_middleware_and_the_rest_is_behind() -> None:
    app = FastAPI()

    @app.get("/elastic_ep/status")
    async def status() -> str:
        return "status"

    serve_page(app)

    @app.middleware("http")
    async def refuse(request: Request, _: object) -> Response:
        return Response(status_code=401)

    with TestClient(app) as client:
        answer = client.get(PATH)
        assert answer.status_code == 200 and answer.content == render_page()
        assert answer.headers["content-security-policy"] == page_headers()["Content-Security-Policy"]
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert client.head(PATH).status_code == 200
        for method, path in (("GET", "/elastic_ep/status"), ("POST", PATH), ("GET", f"{PATH}/x"), ("GET", f"{PATH}x")):
            assert client.request(method, path).status_code == 401, (method, path)


def test_a_prefix_that_a_proxy_adds() -> None:
    app = FastAPI()
    serve_page(app)
    with TestClient(app, root_path="/models/tiny") as client:
        assert client.get(f"/models/tiny{PATH}").status_code == 200
    script = render_page().decode()
    assert set(re.findall(r"""(?:fetch|ask)\(["'](.)""", script)) == {".", "e", "p"}, "relative to the page's address"
