"""Who does not answer, by PDU: many at once are one fault of the network, and not so many faults of machines.

A machine falls silent; before anybody is told, its neighbours are asked. If N of the PDU's machines are silent by then, one event
says so; else each has its own. While the fault lasts its machines are probed, and their neighbours as soon as one is back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from agent.events import Events
from agent.miners.miner import Miner

# Kinds that the network between us and the machine explains; the others are words of the machine itself.
LINE = frozenset({"unreachable", "timeout"})
LEAST, SHARE = 3, 0.2  # N: a fifth of the PDU's machines, and three at least


class Segment:
    """The machines below one PDU. `ask` gives a machine a turn at once; `wait_s` is how long its answer may take."""

    def __init__(
        self, pdu: str, miners: Sequence[Miner], events: Events, *, ask: Callable[[Miner], None], wait_s: float
    ) -> None:
        self.pdu, self.miners, self.events, self.ask, self.wait_s = pdu, miners, events, ask, wait_s
        self.enough = max(LEAST, math.ceil(SHARE * len(miners)))
        self.suspects: dict[Miner, str] = {}  # silent, and nobody has been told: what was said last
        self.told: set[Miner] = set()
        self.judge_at: float | None = None
        self.fault = False

    def broke(self, miner: Miner, text: str, now: float) -> None:
        """`miner` has just been given up."""
        if miner.problem not in LINE:
            self._tell(miner, text)
            return
        self.suspects[miner] = text
        if self.fault or self.judge_at is not None:
            return
        self.judge_at = now + self.wait_s
        for other in self.miners:
            if not other.failures:
                self.ask(other)

    def answered(self, miner: Miner, now: float) -> None:
        """A machine that had been given up answers again. After a fault of the network so may all the others."""
        self.suspects.pop(miner, None)
        if miner in self.told:
            self.told.discard(miner)
            self.events.add("miner_answers_again", miner.name)
        if not self.fault:
            return
        for other in self.miners:
            if other.broken:
                self.ask(other)
        if 2 * len(self._silent()) < self.enough:
            self.fault, self.judge_at = False, now + self.wait_s
            self.events.add("pdu_network_back", self.pdu, silent=len(self.suspects))

    def judge(self, now: float) -> None:
        """Says what the neighbours' answers have shown, once they are due."""
        if self.judge_at is None or now < self.judge_at:
            return
        self.judge_at = None
        silent = self._silent()
        if len(silent) >= self.enough:
            self.fault = True
            names = sorted(m.name for m in silent)[:50]
            self.events.add("pdu_network_fault", self.pdu, silent=len(silent), machines=len(self.miners), names=names)
            return
        for miner, text in self.suspects.items():
            self._tell(miner, text)
        self.suspects.clear()

    def _tell(self, miner: Miner, text: str) -> None:
        self.told.add(miner)
        self.events.add("miner_not_answering", miner.name, problem=miner.problem, text=text)

    def _silent(self) -> list[Miner]:
        return [m for m in self.miners if m.failures and m.problem in LINE]
