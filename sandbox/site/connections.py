"""The open connections of a loopback server, so that stopping it leaves no socket behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Connections:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def held(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Holds a connection while it is served; a broken line ends it quietly; it is closed at the end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            yield
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    def abort(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def end(self, servers: list[asyncio.Server]) -> None:
        """Closes the servers, then every connection, and waits until all are gone."""
        for server in servers:
            server.close()
        await asyncio.sleep(0.02)  # connections accepted in this very instant reach their handlers
        while self._tasks:
            self.abort()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.sleep(0)
        for server in servers:
            await server.wait_closed()
        await asyncio.sleep(0)  # transports close their sockets in the next turn of the loop
