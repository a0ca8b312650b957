"""One TCP line to a machine that answers JSON with a NUL: opened when asked, kept while the firmware leaves it open.

Plain sockets on the event loop: a stream's buffers and callbacks cost half as much again for one short answer, and a site
asks a hundred thousand times while twenty thousand machines go to sleep.
"""

from __future__ import annotations

import asyncio
import socket

MAX_ANSWER = 1024 * 1024


class Line:
    """Not for two callers at once. The caller sets the timeout, and calls `close` when it has no more to ask."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket: socket.socket | None = None
        self.single = False  # this firmware ends the connection after each answer, as cgminer does

    async def ask(self, request: bytes) -> bytes:
        """The answer as far as it came: whole, it ends with NUL. Raises OSError when nobody is there.

        A kept connection may have been closed meanwhile: then the request is sent once more on a fresh one. Every command of
        these firmwares may be given twice.
        """
        kept, single = self.socket is not None, self.single
        try:
            try:
                answer = await self._exchange(request)
            except ConnectionError:
                if not kept:
                    raise
                answer = b""
            if kept and not answer:
                self.close()
                self.single = True
                answer = await self._exchange(request)
        except BaseException:
            self.close()
            raise
        if single or not answer.endswith(b"\0") or self._ended():
            self.close()
        return answer

    def _ended(self) -> bool:
        """The firmware has closed behind its answer. It may still do so: then the next request finds out."""
        assert self.socket is not None
        try:
            self.single = not self.socket.recv(1)
        except BlockingIOError:
            return False
        return True

    async def _exchange(self, request: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        if self.socket is None:
            self.socket = socket.socket(self.family, socket.SOCK_STREAM)
            self.socket.setblocking(False)
            await loop.sock_connect(self.socket, self.address)
        await loop.sock_sendall(self.socket, request)
        data = b""
        while not data.endswith(b"\0") and len(data) < MAX_ANSWER:
            more = await loop.sock_recv(self.socket, 65_536)
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None
