"""Logs by byte offset: read from the runtime, redacted of known secrets, sent, resumed where control says.

Redaction and repair keep the length: a secret becomes as many `*` as it has bytes, a byte that is not UTF-8 becomes `?`. So the
offset of the text sent is the offset in the raw file, and nothing but that number need be remembered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from agent.control import Control, ControlError
from agent.placements import Placement, Placements
from agent.runtime import STREAMS, Runtime
from agent.store import Store

log = logging.getLogger("agent.logs")
CHUNK = 64 * 1024
REQUEST = 512 * 1024
SHORTEST_SECRET = 4


def redact(raw: bytes, secrets: Iterable[str], *, final: bool) -> bytes:
    """The part of `raw` that may be sent: valid UTF-8, of the length of what it stands for.

    While the stream is open (`final` false) a tail that may be the beginning of a secret or half a character is held back.
    """
    known = sorted({s.encode() for s in secrets if len(s) >= SHORTEST_SECRET}, key=len, reverse=True)
    for secret in known:
        if secret in raw:
            raw = raw.replace(secret, b"*" * len(secret))
    if not final:
        held = max(
            (k for secret in known for k in range(1, min(len(secret), len(raw) + 1)) if raw.endswith(secret[:k])),
            default=0,
        )
        raw = raw[: len(raw) - held]
    parts = []
    while raw:
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            parts.append(raw[: error.start])
            if not final and error.end == len(raw) and error.reason == "unexpected end of data":
                break
            parts.append(b"?" * (error.end - error.start))
            raw = raw[error.end :]
        else:
            parts.append(raw)
            break
    return b"".join(parts)


class LogShipper:
    """Sends what is new of every placement, a few hundred KiB a call, and remembers how far control has it."""

    def __init__(self, placements: Placements, runtime: Runtime, control: Control, store: Store) -> None:
        self.placements, self.runtime, self.control, self.store = placements, runtime, control, store
        self.offsets: dict[str, int] = {key: int(kept["offset"]) for key, kept in store.all("log").items()}
        self.unanswered: dict[str, int] = {}

    async def run(self) -> None:
        pause = 1.0
        while True:
            await asyncio.sleep(pause)
            try:
                more = await self.step()
                pause = 0.05 if more else 1.0
            except ControlError as error:
                log.debug("logs: %s", error)
                pause = min(30.0, pause * 2 + 1)
            except Exception:
                log.exception("logs")
                pause = 5.0

    async def step(self) -> bool:
        """One call to control, when there is something to send. True when there is more."""
        chunks: list[dict[str, Any]] = []
        size = 0
        more = False
        for item in list(self.placements.items.values()):
            if item.logs_done or item.phase in ("waiting", "starting") or (item.secrets is None and item.listed):
                continue
            ended = item.phase == "ended"
            rest = False
            for stream in STREAMS:
                chunk, full = await self._chunk(item, stream, final=ended)
                if chunk:
                    chunks.append(chunk)
                    size += len(chunk["data"])
                    rest = True
                more = more or full
            if ended and not rest:
                item.logs_done = True
                self.placements.news.set()
            if size >= REQUEST:
                more = True
                break
        if chunks:
            await self._send(chunks)
        return more

    async def _chunk(self, item: Placement, stream: str, *, final: bool) -> tuple[dict[str, Any] | None, bool]:
        offset = self.offsets.get(f"{item.id}:{stream}", 0)
        raw = await self.runtime.logs(item.id, stream, offset, CHUNK)
        full = len(raw) == CHUNK
        data = redact(raw, (item.secrets or {}).values(), final=final and not full)
        if not data:
            return None, False
        return {"placement": item.id, "stream": stream, "offset": offset, "data": data.decode()}, full

    async def _send(self, chunks: list[dict[str, Any]]) -> None:
        answer = await self.control.logs(chunks)
        answered = set()
        with self.store.batch():
            for row in answer.get("next", []):
                key = f"{row['placement']}:{row['stream']}"
                answered.add(key)
                self.unanswered.pop(key, None)
                self._advance(key, int(row["offset"]))
            for chunk in chunks:
                key = f"{chunk['placement']}:{chunk['stream']}"
                if key in answered:
                    continue
                # Control does not know this placement (any more): three times is an answer.
                self.unanswered[key] = self.unanswered.get(key, 0) + 1
                if self.unanswered[key] >= 3:
                    self._advance(key, chunk["offset"] + len(chunk["data"].encode()))

    def _advance(self, key: str, offset: int) -> None:
        self.offsets[key] = offset
        if self.placements.items.get(key.rpartition(":")[0]):
            self.store.put("log", key, {"offset": offset})
