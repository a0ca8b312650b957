"""Screening: nothing is signed, run or paid out by who must be clear and is not; a machine never rejects; nobody waits for ever."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.promises import Promises

Row = dict[str, Any]
BASIC, ALL = ("business", "sanctions"), ("business", "sanctions", "export")  # all GPUs here are export controlled
FREE_GPUS = 16
ANSWERED_WITHIN = timedelta(days=3)
PEOPLE = "screening desk"


class Screened:
    def __init__(self, promises: Promises) -> None:
        self.promises = promises
        self.contracts = self.jobs = self.payouts = self.events = 0
        self.moves: dict[tuple[int, str], list[tuple[datetime, str]]] = defaultdict(list)

    def look(self, now: datetime) -> list[str]:
        return [*self._story(), *self._signed(), *self._ran(), *self._paid(), *self._waits(now)]

    def _story(self) -> list[str]:
        """Only a person rejects, and a machine clears nobody whose name it found."""
        found = []
        for e in rows(
            "SELECT e.*, s.organization_id, s.kind, s.facts FROM marketplace_screeningevent e"
            f" JOIN marketplace_screening s ON s.id = e.screening_id WHERE e.id > {self.events} ORDER BY e.id"
        ):
            self.events = e["id"]
            self.moves[e["organization_id"], e["kind"]].append((e["at"], e["to_state"]))
            moved = e["from_state"] != e["to_state"]
            by_person = e["what"] == "decided" and e["actor"] == PEOPLE
            listed = "denied" in str(json.loads(e["facts"]) if isinstance(e["facts"], str) else e["facts"]).lower()
            if moved and e["to_state"] == "rejected" and not by_person:
                found.append(f"screening {e['screening_id']} was rejected by {e['actor']}: {e['reason']}")
            if moved and e["to_state"] == "clear" and listed and not by_person:
                found.append(
                    f"screening {e['screening_id']} of a listed name was cleared by {e['actor']}: {e['reason']}"
                )
            if moved and e["to_state"] in {"clear", "review", "rejected", "expired"}:
                self.promises.count(
                    "screening: decided by rule",
                    f"{e['to_state']} by {'a person' if by_person else 'the service or time'}",
                )
        return found

    def _stood(self, organization: int, kind: str, at: datetime) -> set[str]:
        """Where a check stood at that instant: each state that it had within it, the last one before it besides."""
        story = self.moves[organization, kind]
        before = [state for t, state in story if t < at]
        return {*(state for t, state in story if t == at), *before[-1:]} or {"pending"}

    def _signed(self) -> list[str]:
        found = []
        for c in rows(f"SELECT * FROM marketplace_contract WHERE id > {self.contracts} ORDER BY id"):
            self.contracts = c["id"]
            owner, at = c["organization_id"], c["created_at"]
            held = rows(
                "SELECT coalesce(sum(gpu_count), 0) AS n FROM marketplace_contract WHERE state IN ('active', 'pending_payment')"
                f" AND organization_id = {owner} AND id < {c['id']} AND (ends_at IS NULL OR ends_at > '{at.isoformat()}')"
            )[0]["n"]
            needs = ALL if c["kind"] in {"reserved", "flexible"} or held + c["gpu_count"] > FREE_GPUS else ()
            wrong = [kind for kind in needs if "clear" not in self._stood(owner, kind, at)]
            wrong += [kind for kind in ALL if self._stood(owner, kind, at) == {"rejected"}]
            self.promises.count(
                "screening: nothing signed that asks for it without it",
                "broken" if wrong else "kept",
                1 if needs else 0,
            )
            if wrong:
                found.append(
                    f"contract {ids.encode('ctr', c['id'])} ({c['kind']}) was signed at {at:%F %T}; not passed: {wrong}"
                )
        return found

    def _ran(self) -> list[str]:
        """Who is rejected submits nothing new."""
        found = []
        for j in rows(
            "SELECT j.id, j.created_at, c.organization_id FROM marketplace_job j JOIN marketplace_contract c ON c.id = j.contract_id"
            f" WHERE j.id > {self.jobs} ORDER BY j.id"
        ):
            self.jobs = j["id"]
            if any(self._stood(j["organization_id"], kind, j["created_at"]) == {"rejected"} for kind in ALL):
                found.append(
                    f"job {j['id']} was submitted at {j['created_at']:%F %T} by an organization that is rejected"
                )
        return found

    def _paid(self) -> list[str]:
        found = []
        for p in rows(f"SELECT * FROM billing_payout WHERE id > {self.payouts} ORDER BY id"):
            self.payouts = p["id"]
            wrong = [kind for kind in BASIC if "clear" not in self._stood(p["organization_id"], kind, p["created_at"])]
            self.promises.count("screening: nobody paid out without it", "broken" if wrong else "kept")
            if wrong:
                found.append(
                    f"payout {p['id']} of {p['created_at']:%F %T} is to an operator that has not passed {wrong}"
                )
        return found

    def _waits(self, now: datetime) -> list[str]:
        """Every question that could be asked is answered, and every answer that needs a person has one."""
        late = (now - ANSWERED_WITHIN).isoformat()
        states = Counter[str]()
        for row in rows("SELECT state FROM marketplace_screening"):
            states[row["state"]] += 1
        self.promises.tally["screening: checks as they stand"] = states
        return [
            f"screening {s['id']} ({s['kind']}) is {s['state']}, asked {s['asked_at']}, since {s['changed_at']}: nobody has answered"
            for s in rows(
                f"SELECT * FROM marketplace_screening WHERE (ask_at IS NOT NULL AND asked_at < '{late}')"
                f" OR (state = 'review' AND changed_at < '{late}' AND message = '')"
            )
        ]
