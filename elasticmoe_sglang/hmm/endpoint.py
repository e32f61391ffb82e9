"""Claiming an endpoint: the private folder, the lock that tells a living HMM from stale files, the two sockets."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

import zmq

from elasticmoe_sglang.errors import HmmError, UserInputError
from elasticmoe_sglang.hmm.config import Endpoint
from elasticmoe_sglang.wire.envelope import MAX_MESSAGE_BYTES
from elasticmoe_sglang.wire.seqpacket import listen

_HARD_LIMIT = 16 * MAX_MESSAGE_BYTES
"""libzmq drops a peer that sends more, unread. Between the two limits the peer gets a typed answer instead."""


class EndpointClaim:
    """Holds an endpoint's lock and sockets; `close` removes the files again."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises UserInputError for a folder others may enter, HmmError when a living HMM serves here."""
        self.endpoint = endpoint
        _prepare_folder(endpoint.commands.parent)
        self._lock = _take_lock(endpoint)
        self._context = zmq.Context()
        try:
            self.router = self._bind_router()
            self.listener = self._bind_listener()
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Stops serving. Answers already given are still delivered, for up to 200 ms."""
        self.listener.close()
        self._context.destroy(linger=200)
        for path in (self.endpoint.handles, self.endpoint.commands, self.endpoint.lock):
            path.unlink(missing_ok=True)
        os.close(self._lock)

    def _bind_router(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.MAXMSGSIZE, _HARD_LIMIT)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        _remove_stale(self.endpoint.commands)
        router.bind(self.endpoint.url)
        self.endpoint.commands.chmod(0o600)
        return router

    def _bind_listener(self) -> socket.socket:
        _remove_stale(self.endpoint.handles)
        return listen(str(self.endpoint.handles))


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(f"the folder {folder} cannot be made: {error.strerror}") from error
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserInputError(
            f"the folder {folder} is open to others (mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid})",
            hint=f"Use a folder of your own: chmod 700 {folder}",
        )


def _take_lock(endpoint: Endpoint) -> int:
    while True:
        fd = os.open(endpoint.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise HmmError(
                f"an HMM already serves at {endpoint.url}", hint="Use it (--hmm-endpoint), stop it, or choose another."
            ) from None
        try:
            if os.stat(endpoint.lock).st_ino == os.fstat(fd).st_ino:
                return fd
        except FileNotFoundError:
            pass  # its last holder removed the file between our open and our lock: what we hold locks nothing
        os.close(fd)


def _remove_stale(path: Path) -> None:
    """Removes the socket of an HMM that was killed; the lock says that none is alive."""
    if not path.exists():
        return
    if not path.is_socket():
        raise UserInputError(f"{path} is in the way and is no socket", hint="Remove it or choose another endpoint.")
    path.unlink()
