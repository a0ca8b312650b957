"""The machines on the wire."""

from __future__ import annotations

import asyncio
import json
import socket

import numpy as np

from sandbox.miners.fleet import Fleet


class Line(asyncio.Protocol):
    """One connection to one miner."""

    def __init__(self, server: FleetServer) -> None:
        self.server, self.fleet = server, server.fleet
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.lines.add(self)
        self.server.accepted += 1
        self.i = self.fleet.by_address.get(transport.get_extra_info("sockname")[0], -1)
        if self._nobody():
            # Abort: the client sees a reset, as close to a refusal as an accepted connection comes.
            transport.abort()

    def _nobody(self) -> bool:
        fleet, energised, i = self.fleet, self.server.energised, self.i
        if i < 0 or not fleet.powered[i] or (energised is not None and not energised[i]):
            return True
        return fleet.fault[i] == "refuse" or fleet.boot_left[i] > 0

    def connection_lost(self, _error: Exception | None) -> None:
        self.server.lines.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._nobody():
            self.transport.abort()
            return
        if self.fleet.fault[self.i] == "hang":
            return  # until the client gives up
        self.data += data
        try:
            request = json.loads(self.data)
        except ValueError:
            if len(self.data) > 65_536:
                self.transport.abort()
            return  # the rest is on its way
        self.data = b""
        if not isinstance(request, dict):
            self.transport.abort()
            return
        answer = self.fleet.answer(self.i, str(request.get("command", "")), str(request.get("parameter", "")))
        body = json.dumps(answer).encode()
        if self.fleet.fault[self.i] == "truncated":
            self.transport.write(body[: len(body) // 2])
            self.transport.close()
            return
        self.transport.write(body + b"\0")
        if not self.server.keeps_open:
            self.transport.close()


class FleetServer:
    """Serves a fleet on `port`: one socket bound to the loopback device, or one per address where that is refused or not
    wanted (`shared=False`: addresses of others on the same port stay free).
    """

    def __init__(self, fleet: Fleet, port: int, *, keeps_open: bool = False, shared: bool = True) -> None:
        self.fleet, self.port, self.keeps_open, self.shared = fleet, port, keeps_open, shared
        self.servers: list[asyncio.Server] = []
        self.energised: np.ndarray | None = None
        self.lines: set[Line] = set()
        self.accepted = 0

    async def start(self) -> None:
        """Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        sock = self._on_loopback() if self.shared else None
        if sock is None:
            # Without the device binding 0.0.0.0 would be reachable from outside: bind each loopback address instead.
            for address in self.fleet.by_address:
                self.servers.append(await loop.create_server(lambda: Line(self), address, self.port))
            return
        try:
            sock.bind(("0.0.0.0", self.port))
        except OSError:
            sock.close()
            raise
        self.servers.append(await loop.create_server(lambda: Line(self), sock=sock, backlog=4096))
        self.port = sock.getsockname()[1]

    @staticmethod
    def _on_loopback() -> socket.socket | None:
        """A socket that only the loopback device reaches; None where the kernel does not bind to devices."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        except (OSError, AttributeError):
            sock.close()
            return None
        return sock

    async def stop(self) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.02)  # connections accepted in this very instant reach their lines
        for line in list(self.lines):
            line.transport.abort()
        for server in self.servers:
            await server.wait_closed()
        await asyncio.sleep(0)  # transports close their sockets in the next turn of the loop
