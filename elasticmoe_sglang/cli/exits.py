"""Exit statuses of the `elasticmoe` command, and the client errors that lead to them."""

from __future__ import annotations

from elasticmoe_sglang.errors import ElasticMoEError, UserInputError

OK = 0
FAILED = 1
REFUSED = 2
UNREACHABLE = 3


class ServerUnreachable(ElasticMoEError):
    """No server answers, or the response is not that of an elastic server."""


class ServerRefused(UserInputError):
    """The server responded with a status of 400 or more.

    Args:
        status: the HTTP status.
    """

    def __init__(self, what: str, *, status: int, hint: str | None = None) -> None:
        self.status = status
        super().__init__(what, hint=hint)
