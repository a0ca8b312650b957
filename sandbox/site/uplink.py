"""The site's line to the world: a TCP forwarder that can be cut, so that a test can take the control plane away."""

from __future__ import annotations

import asyncio
import contextlib

from sandbox.site.connections import Connections


class Uplink:
    """Forwards 127.0.0.1:`port` to `target` ("host:port"). With `cut` set, connections end and new ones are dropped."""

    def __init__(self, target: str, port: int = 0) -> None:
        host, _, number = target.rpartition(":")
        self.target, self.port = (host, int(number)), port
        self._cut = False
        self.connections = Connections()
        self._server: asyncio.Server | None = None

    @property
    def cut(self) -> bool:
        return self._cut

    @cut.setter
    def cut(self, value: bool) -> None:
        self._cut = value
        if value:
            self.connections.abort()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.cut = True
        await self.connections.end([self._server] if self._server else [])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.connections.held(writer):
            if self._cut:
                raise ConnectionResetError
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            async with self.connections.held(far_writer):
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.close()
            await writer.wait_closed()
