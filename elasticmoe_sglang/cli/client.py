"""HTTP client for a running server; uses only the standard library, so that the command starts fast."""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from elasticmoe_sglang.api.feed import Event
from elasticmoe_sglang.api.types import (
    OperationList,
    RebalanceAnswer,
    RebalanceRequest,
    ScaleAnswer,
    ScaleRequest,
    ServerStatus,
)
from elasticmoe_sglang.cli.exits import ServerRefused, ServerUnreachable
from elasticmoe_sglang.coordinator.status import Operation

URL_VARIABLE = "ELASTICMOE_URL"
KEY_VARIABLE = "ELASTICMOE_ADMIN_KEY"
DEFAULT_PORT = 30000
_ANSWER_S = 30.0
_POLL_S = 0.05
# The events' stream is never silent for longer while the server lives.
_SILENCE_S = 10.0
_EVENT = b"data: "

if TYPE_CHECKING:
    from elasticmoe_sglang.policy.view import PolicyView

Policy = dict[str, Any]
"""Answer of GET /elastic_ep/policy."""

Payload = TypeVar("Payload")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --url, --port and --admin-key, the same for every command that calls a server."""
    group = parser.add_argument_group("server")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"its address (default: ${URL_VARIABLE}, or http://127.0.0.1:{DEFAULT_PORT})")
    where.add_argument("--port", type=int, help="its port on this machine")
    group.add_argument("--admin-key", help=f"its --admin-api-key or --api-key (default: ${KEY_VARIABLE})")


class ServerClient:
    """Every call raises ServerUnreachable without a valid response and ServerRefused for a status of 400 or more.

    Args:
        url: scheme, host and port.
        key: sent as bearer token.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._key = key
        # A proxy from the environment cannot reach loopback ports of this machine.
        handlers = [urllib.request.ProxyHandler({})] if _is_loopback(self.url) else []
        self._opener = urllib.request.build_opener(*handlers)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ServerClient:
        """From the flags of `add_server_arguments` and environment variables."""
        url = f"http://127.0.0.1:{args.port}" if args.port is not None else args.url or os.environ.get(URL_VARIABLE)
        key = args.admin_key or os.environ.get(KEY_VARIABLE)
        return cls(url or f"http://127.0.0.1:{DEFAULT_PORT}", key)

    def scale(self, request: ScaleRequest) -> ScaleAnswer:
        """Request a change by size, or by ranks; returns the operation, which has ended only if `wait` is set."""
        return self._ask("/scale_elastic_ep", ScaleAnswer, body=msgspec.json.encode(request))

    def rebalance(self, request: RebalanceRequest) -> RebalanceAnswer:
        """Observe routing and request a better placement; returns when it was observed."""
        body, timeout_s = msgspec.json.encode(request), _ANSWER_S + request.observe_s
        return self._ask("/elastic_ep/rebalance", RebalanceAnswer, body=body, timeout_s=timeout_s)

    def operation(self, operation_id: str) -> Operation:
        return self._ask(f"/elastic_ep/operations/{quote(operation_id, safe='')}", Operation)

    def operations(self) -> list[Operation]:
        return self._ask("/elastic_ep/operations", OperationList).operations

    def status(self) -> ServerStatus:
        return self._ask("/elastic_ep/status", ServerStatus)

    def policy(self, limit: int = 20) -> PolicyView:
        from elasticmoe_sglang.policy.view import PolicyView  # which needs NumPy; the other commands do without

        return self._ask(f"/elastic_ep/policy?limit={limit}", PolicyView)

    def set_policy(self, values: dict[str, Any]) -> PolicyView:
        """Replace settings by name."""
        from elasticmoe_sglang.policy.view import PolicyView

        return self._ask("/elastic_ep/policy", PolicyView, body=msgspec.json.encode(values))

    def follow(self, operation: Operation, timeout_s: float, show: Callable[[Operation], None]) -> Operation:
        """Poll the operation until it has ended or `timeout_s` is over, and call `show` with every result."""
        deadline = time.monotonic() + timeout_s
        show(operation)
        while not operation.phase.ended and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            operation = self.operation(operation.operation_id)
            show(operation)
        return operation

    def events(self) -> Generator[Event, None, None]:
        """The server's events until the stream ends: the first at once, the next ones every second or earlier."""
        with self._open("/elastic_ep/events", _SILENCE_S) as answer:
            yield from self._read(answer)

    def policy_if_any(self) -> Policy | None:
        """The policy's state; None: this server has none."""
        try:
            return self._ask("/elastic_ep/policy", Policy)
        except ServerRefused as refusal:
            if refusal.status == 404:
                return None
            raise

    def _read(self, lines: Iterable[bytes]) -> Generator[Event, None, None]:
        try:
            for line in lines:
                if line.startswith(_EVENT):
                    yield self._decode(line[len(_EVENT) :], Event)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _ask(self, path: str, kind: type[Payload], body: bytes | None = None, timeout_s: float = _ANSWER_S) -> Payload:
        with self._open(path, timeout_s, body) as answer:
            try:
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
        return self._decode(content, kind)

    def _open(self, path: str, timeout_s: float, body: bytes | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=headers)
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error.code, error.read(), self._key is not None) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        return answer

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        return ServerUnreachable(
            f"no server answers at {self.url}: {getattr(error, 'reason', error)}",
            hint="Start one with `elasticmoe serve`, or give its address with --url or --port",
        )

    def _decode(self, content: bytes, kind: type[Payload]) -> Payload:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise ServerUnreachable(
                f"the response from {self.url} is not that of an elastic server: {error}"
            ) from error


def _refused(status: int, content: bytes, with_key: bool) -> ServerRefused:
    if status == 401:
        hint = "The given key is wrong" if with_key else f"Pass its key with --admin-key or ${KEY_VARIABLE}"
        return ServerRefused("the server requires a key", status=status, hint=hint)
    try:
        sentence = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        if status == 404:
            return ServerRefused(
                "the server is not elastic", status=status, hint="Start it with `elasticmoe serve` to change its size"
            )
        sentence = f"the server answered with status {status}"
    return ServerRefused(str(sentence), status=status)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
