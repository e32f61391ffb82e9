"""What an HMM is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elasticmoe_sglang.errors import UserInputError

_MAX_PATH = 107
"""Bytes that fit into sockaddr_un.sun_path with its final zero (Linux, unix(7))."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The three files of one HMM, all in one folder that only its owner may enter."""

    commands: Path
    """The ZMQ ROUTER socket."""
    handles: Path
    """The SEQPACKET socket that carries descriptors."""
    lock: Path
    """Locked by the HMM that serves here; the lock ends with its process, however that ends."""

    @classmethod
    def parse(cls, endpoint: str) -> Endpoint:
        """From "ipc:///folder/hmm.sock". Raises UserInputError for what is no such path or too long for a socket."""
        scheme, _, name = endpoint.partition("://")
        if scheme != "ipc" or not name or name.startswith("@") or "\0" in name:
            raise UserInputError(
                f"{endpoint!r} is no endpoint of an HMM",
                hint="Write it as ipc:///folder/hmm.sock; abstract sockets are not used, since any user may open them.",
            )
        path = Path(name).absolute()
        beside = [path.with_name(path.name + suffix) for suffix in (".fds", ".lock")]
        if any(len(bytes(p)) > _MAX_PATH for p in beside):
            raise UserInputError(
                f"the path {path} is too long for a Unix socket", hint=f"Keep it below {_MAX_PATH - 5} bytes."
            )
        return cls(commands=path, handles=beside[0], lock=beside[1])

    @property
    def url(self) -> str:
        return f"ipc://{self.commands}"


@dataclass(frozen=True, kw_only=True)
class HmmConfig:
    """Raises UserInputError for values that cannot work."""

    endpoint: str
    """ipc://FOLDER/NAME; the folder is made with mode 0700 if it does not exist."""
    budgets: tuple[int, ...]
    """Bytes of each device, device number = index."""
    backend: str = "cpu"
    """Name of the memory backend."""
    exit_with_parent: int | None = None
    """Process id of the parent to end with; None outlives it."""
    ready_fd: int | None = None
    """A descriptor that gets one line once clients can connect, and is closed then."""

    def __post_init__(self) -> None:
        Endpoint.parse(self.endpoint)
        if not self.budgets:
            raise UserInputError("an HMM needs at least one device")
        for device, budget in enumerate(self.budgets):
            if not 0 < budget < 1 << 53:
                raise UserInputError(f"the budget of device {device} is {budget} bytes", hint="Give it some memory.")
