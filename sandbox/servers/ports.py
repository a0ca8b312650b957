"""Loopback ports: a free one, or a clear word about who is missing one."""

import socket

from sandbox.servers.problems import Problem

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago (another process may take it first: callers retry)."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def require_free(port: int, what: str) -> None:
    """Raises Problem when `port` on loopback is taken. `what` names who wants it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise Problem(
                f"Port {port}, wanted by {what}, is busy ({error.strerror}). Stop the program that listens there, "
                "or choose another port."
            ) from None
