"""A site as it really is, and its agent: benchmarks.fault_site's, running jobs for as long as their command says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from benchmarks.fault_site import Yard
from marketplace.models import Agent
from marketplace.services import agents


@dataclass
class Facility(Yard):
    name: str = ""
    public_id: str = ""

    def _shall(self, pk: int, p: dict[str, Any], now: datetime) -> None:
        new = pk not in self.work
        super()._shall(pk, p, now)
        if new:
            self.work[pk].seconds = int(p["command"][1])
            self.work[pk].code = int(p["env"].get("EXIT", "0"))

    def next_end(self, now: datetime) -> datetime | None:
        """When the next piece of work ends by itself."""
        ends = [w.over_at for w in self.work.values() if w.over_at is not None and not w.ended]
        return min((max(at, now + timedelta(seconds=1)) for at in ends), default=None)

    def told(self) -> bool:
        """Has it something to tell that the control plane has not heard: an end, a start, a drain?"""
        return any(w.ended or w.state in {"starting", "draining"} for w in self.work.values())

    def sync(self, now: datetime) -> None:
        """One call of the agent: what it sees goes up, what shall be comes down."""
        self.pass_time(now)
        if self.silent:
            return
        agent = Agent.objects.select_related("site").get(pk=self.agent_pk)
        report = self.report(now) | {"known_safety": agent.site.safety_generation}
        agents.observe(agent, report, now=now)
        self.take(agents.desired(agent, report, now=now), now)
