"""Recorded answers of mempool.space on loopback: `python -m sandbox.recorded FOLDER [--port P]`.

    /api/v1/mining/hashrate/3d        FOLDER/hashrate-3d.json
    /api/v1/mining/reward-stats/144   FOLDER/reward-stats-144.json
    /api/v1/prices                    FOLDER/prices.json

Answered byte for byte, whatever they say: `Recorded.instead` has other bytes for a file, as if theirs were broken today.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.site.httpd import Httpd, Request

FILES = {
    "/api/v1/mining/hashrate/3d": "hashrate-3d.json",
    "/api/v1/mining/reward-stats/144": "reward-stats-144.json",
    "/api/v1/prices": "prices.json",
}


class Recorded:
    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.instead = folder, dict[str, bytes]()
        self.httpd = Httpd(self.handle, port)

    async def handle(self, request: Request) -> tuple[int, bytes]:
        name = FILES[request.path]
        return 200, self.instead[name] if name in self.instead else (self.folder / name).read_bytes()


@contextmanager
def serving(folder: Path) -> Iterator[Recorded]:
    """In a thread of its own, for as long as the block lasts."""
    made = Recorded(folder)
    with made.httpd.beside():
        yield made


async def _serve(recorded: Recorded) -> None:
    await recorded.httpd.start()
    print(f"recorded: {recorded.httpd.url}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sandbox.recorded", description="recorded answers of mempool.space")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    asyncio.run(_serve(Recorded(asked.folder, asked.port)))
