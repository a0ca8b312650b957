"""Turns at machines, most urgent first, over a bounded number of lines at once: what is due of machines on their way to another
mode (commands, and the readings that prove them) before what is due of the others, whose reading can wait.

A site has one fan-out for every thousand machines, whole PDUs together: where a PDU's network is dead, its timeouts hold the
lines of its own fan-out and nobody else's.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import resource
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from agent.miners.miner import Miner

MOST = 1000  # machines of a fan-out
AT_ONCE = 400  # lines of all fan-outs: one loop answers some thousand a second, and who waits for it must not look like a timeout
LEAST = 4
SPARE_FILES = 256  # for all else that the agent holds open


def by_pdu(miners: Iterable[Miner]) -> dict[str, list[Miner]]:
    found: dict[str, list[Miner]] = {}
    for miner in miners:
        found.setdefault(miner.pdu, []).append(miner)
    return found


def shards(miners: Iterable[Miner], most: int = MOST) -> list[list[Miner]]:
    """Machines in parts of at most `most`, PDUs whole where they fit and in their order."""
    parts: list[list[Miner]] = []
    for rows in by_pdu(miners).values():
        for start in range(0, len(rows), most):
            piece = rows[start : start + most]
            if parts and len(parts[-1]) + len(piece) <= most:
                parts[-1].extend(piece)
            else:
                parts.append(piece)
    return parts


def lanes(wanted: int, fanouts: int) -> int:
    """Lines of each fan-out: as many as wanted, or as the loop and the open files allow (their limit is raised as far as it may be)."""
    wanted = min(wanted, max(LEAST, AT_ONCE // max(1, fanouts)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted * fanouts + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - SPARE_FILES) // max(1, fanouts)))


class FanOut:
    def __init__(self, miners: Sequence[Miner], lines: int, turn: Callable[[Miner], Awaitable[None]]) -> None:
        self.miners, self.turn = miners, turn
        self.gate = asyncio.Semaphore(lines)
        self.news = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.count = itertools.count()
        # Entries are never changed: one that is not its machine's `due` any more is passed over.
        self.urgent: list[tuple[float, int, Miner]] = []
        self.polls: list[tuple[float, int, Miner]] = []
        for miner in miners:
            self._push(miner)

    def _push(self, miner: Miner) -> None:
        heap = self.urgent if not miner.due or miner.awaited(time.monotonic()) else self.polls
        heapq.heappush(heap, (miner.due, next(self.count), miner))

    def ask(self, miner: Miner, at: float = 0.0) -> None:
        """A turn at `at` (monotonic seconds) or sooner; 0 comes before all that is due."""
        if at >= miner.due and not miner.busy:
            return
        miner.due = min(miner.due, at)
        if not miner.busy:
            self._push(miner)
        self.news.set()

    async def run(self) -> None:
        try:
            while True:
                # A free line first: who is the most urgent is seen when there is one.
                await self.gate.acquire()
                miner = await self._next()
                miner.busy = True
                task = asyncio.create_task(self._take(miner))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _next(self) -> Miner:
        while True:
            self.news.clear()
            now = time.monotonic()
            for heap in (self.urgent, self.polls):
                while heap and heap[0][0] <= now:
                    due, _, miner = heapq.heappop(heap)
                    if due == miner.due and not miner.busy:
                        return miner
            first = min((heap[0][0] for heap in (self.urgent, self.polls) if heap), default=None)
            try:
                async with asyncio.timeout(None if first is None else first - now):
                    await self.news.wait()
            except TimeoutError:
                pass

    async def _take(self, miner: Miner) -> None:
        try:
            await self.turn(miner)
        finally:
            miner.busy = False
            self.gate.release()
            self._push(miner)
            self.news.set()
