"""Affinity and anti-affinity: which hosts a request may use, given where the groups it is tied to stand.

A tie names a group of jobs (those of one organization that carry the labels asked for) and a level of the fabric. The
snapshot says on which hosts each group stands; what a plan places joins its groups at once, so that two jobs that must be
apart are not planned onto one host in the same cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from scheduler.core import gang
from scheduler.core.gang import Where
from scheduler.core.state import State
from scheduler.core.types import I64, Fleet, Level, Request, Tie, Topology

Mask = npt.NDArray[np.bool_]


class Ties:
    """The groups of one plan. `order`: row i of the state is host order[i] of the fleet (None: the same)."""

    def __init__(self, fleet: Fleet, state: State, order: I64 | None = None) -> None:
        self.fleet, self.state, self.order = fleet, state, order
        self.row_of: I64 | None = None
        if order is not None:
            self.row_of = np.empty_like(order)
            self.row_of[order] = np.arange(len(order))
        self.stands: dict[int, set[int]] = {}  # group -> rows on which this plan has put replicas
        self.domains: dict[Level, I64] = {}

    def domain(self, level: Level) -> I64:
        """Domain of each row at a level. Rows of one machine (its open part and its reserved ones) are one host here."""
        found = self.domains.get(level)
        if found is None:
            if level <= Level.HOST:
                ids = self.fleet.host_id if self.order is None else self.fleet.host_id[self.order]
                found = np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64)
            else:
                found = gang.domains(self.state, level)
            self.domains[level] = found
        return found

    def rows(self, hosts: Iterable[int]) -> I64:
        """State rows of hosts of the fleet."""
        wanted = np.fromiter(hosts, np.int64)
        return wanted if self.row_of is None else self.row_of[wanted]

    def where(self, r: Request) -> Where | None:
        """Where the request may go; None for anywhere."""
        if not (r.near or r.apart or r.members):
            return None
        allowed = np.ones(len(self.fleet), bool)
        for tie in r.near:
            rows = self._standing(tie)
            if len(rows) or tie.group not in r.joins:
                allowed &= self._shares(tie.level, rows)
        for tie in r.apart:
            rows = self._standing(tie)
            if len(rows):
                allowed &= ~self._shares(tie.level, rows)
        return Where(allowed, self.rows(r.members))

    def topology(self, r: Request) -> Topology:
        """The request's own, narrowed where it is the first of a group that must stand together."""
        levels = [t.level for t in r.near if t.group in r.joins and not len(self._standing(t))]
        t = r.topology
        if not levels or r.replicas == 1 or (t.required and Level.NONE < t.pack <= min(levels)):
            return t
        return replace(t, pack=min(levels), required=True)

    def placed(self, r: Request, rows: Iterable[int]) -> None:
        """The request's replicas stand on these rows from now on."""
        taken = set(rows)
        for group in r.joins:
            self.stands.setdefault(group, set()).update(taken)

    def _standing(self, tie: Tie) -> I64:
        here = self.stands.get(tie.group, ())
        return np.concatenate([self.rows(tie.rows), np.fromiter(here, np.int64, len(here))])

    def _shares(self, level: Level, rows: I64) -> Mask:
        of = self.domain(level)
        return np.isin(of, of[rows])
