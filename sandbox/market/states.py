"""Every state legal: each event goes on where the one before stopped, over a move that the table of its noun allows."""

from __future__ import annotations

from typing import Any

from benchmarks.auditor import rows
from billing.models import Invoice
from marketplace.models import (
    Amendment,
    Contract,
    Curtailment,
    Job,
    Listing,
    Maintenance,
    Placement,
    Resale,
    Screening,
    StandingBid,
)
from marketplace.services import replicas

STORIED: tuple[tuple[Any, str], ...] = ((Contract, "contract"), (Job, "job"), (Placement, "placement"))
# Nouns without a story of their own: what we saw last, and now, must be connected by legal moves.
WATCHED: tuple[Any, ...] = (Listing, Curtailment, Amendment, Invoice, Maintenance, Resale, StandingBid, Screening)


class States:
    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.now: dict[tuple[str, int], str] = {}
        self.seen: dict[tuple[str, int], str] = {}
        self.moves = 0

    def look(self) -> list[str]:
        found = []
        for model, name in STORIED:
            found += self._story(model, name)
            table = model._meta.db_table
            for row in rows(f"SELECT id, state FROM {table}"):
                said = self.now.get((name, row["id"]))
                if said != row["state"]:
                    found.append(f"{name} {row['id']} is {row['state']}; its events end with {said}")
        for model in WATCHED:
            found += self._watch(model)
        return found

    def _story(self, model: Any, name: str) -> list[str]:
        found = []
        since = self.last.get(name, 0)
        events = rows(
            f"SELECT id, {name}_id AS of, from_state, to_state FROM marketplace_{name}event WHERE id > {since} ORDER BY id"
        )
        for e in events:  # a placement whose gang waits for a replica is running, and marked so that nobody pays for it
            e |= {key: "running" for key in ("from_state", "to_state") if e[key] == replicas.HELD}
        for e in events:
            self.last[name] = e["id"]
            key = (name, e["of"])
            before = self.now.get(key, "")
            legal = (
                e["from_state"] == e["to_state"]
                or not e["from_state"]
                or e["to_state"] in model.TRANSITIONS[e["from_state"]]
            )
            if e["from_state"] != before or not legal:
                found.append(
                    f"{name} {e['of']} was {before or 'new'} and went from {e['from_state']} to {e['to_state']}"
                )
            self.now[key] = e["to_state"]
            self.moves += 1
        return found

    def _watch(self, model: Any) -> list[str]:
        found = []
        name = model._meta.model_name
        for row in rows(f"SELECT id, state FROM {model._meta.db_table}"):
            key = (name, row["id"])
            before = self.seen.get(key)
            if before is not None and before != row["state"]:
                self.moves += 1
                if row["state"] not in _after(model, before):
                    found.append(f"{name} {row['id']} was {before} and is {row['state']}: no legal moves lead there")
            self.seen[key] = row["state"]
        return found


def _after(model: Any, state: str) -> set[str]:
    """Every state that legal moves lead to from `state`."""
    reached: set[str] = set()
    new = {state}
    while new:
        new = {after for each in new for after in model.TRANSITIONS[each]} - reached
        reached |= new
    return reached
