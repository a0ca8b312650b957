"""Planned maintenance: announced in time or paid for, taken at its hour, nothing sold over it, given back at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.promises import TICK, Promises

Row = dict[str, Any]
NOTICE, LEAD = timedelta(days=7), timedelta(minutes=16)
HELD = "('reserved', 'flexible')"


class Maintained:
    def __init__(self, promises: Promises) -> None:
        self.promises = promises
        self.windows: dict[int, list[tuple[datetime, datetime, datetime]]] = defaultdict(list)  # (seen at, from, until)
        self.begun: set[int] = set()
        self.drains = 0

    def look(self, now: datetime) -> list[str]:
        works = {w["id"]: w for w in rows("SELECT * FROM marketplace_maintenance WHERE state <> 'draft' ORDER BY id")}
        live = {pk: w for pk, w in works.items() if w["state"] in {"announced", "in_progress"}}
        found = [
            *self._clock(works, now),
            *self._drained(works),
            *self._came_back(),
            *self._short(now),
            *self._sold_over(live),
        ]
        for pk, w in live.items():
            self.windows[pk].append((now, w["starts_at"], w["ends_at"]))
        return found

    def _clock(self, works: dict[int, Row], now: datetime) -> list[str]:
        """It begins and ends with its window; a firm contract there was told a week ahead, or it is an emergency."""
        found = []
        for pk, w in works.items():
            name = ids.encode("mnt", pk)
            if w["state"] == "announced" and w["starts_at"] < now - TICK:
                found.append(f"{name} should have begun at {w['starts_at']:%F %T}")
            if w["state"] == "in_progress" and w["ends_at"] < now - TICK:
                found.append(f"{name} should have been over at {w['ends_at']:%F %T}")
            if w["state"] not in {"in_progress", "completed"} or pk in self.begun:
                continue
            self.begun.add(pk)
            for c in self._firm(pk):
                told = [n["at"] for n in rows(
                    f"SELECT at FROM marketplace_maintenancenotice WHERE maintenance_id = {pk} AND contract_id = {c['id']} ORDER BY at"
                )]  # fmt: skip
                knew = c["created_at"] >= w["announced_at"]
                if w["emergency"]:
                    fate = "compensated: an emergency, its time is not charged"
                elif told and (told[0] <= w["starts_at"] - NOTICE or knew or self._came_with_it(c["id"], w, told[0])):
                    fate = "kept"
                else:
                    fate = "broken"
                    found.append(
                        f"{name}, announced {w['announced_at']:%F %T}, began at {w['starts_at']:%F %T} on contract"
                        f" {ids.encode('ctr', c['id'])}, signed {c['created_at']:%F %T}, told {[f'{at:%F %T}' for at in told]}"
                    )
                self.promises.count("maintenance: a week's notice to who holds GPUs there", fate)
        return found

    @staticmethod
    def _came_with_it(pk: int, w: Row, told: datetime) -> bool:
        """Its buyer was told; he did not pay, and the seller, who has it again, was told there and then."""
        undone = rows(
            "SELECT f.undone_at AS at FROM marketplace_fill f JOIN marketplace_resale r ON r.id = f.resale_id"
            f" WHERE r.contract_id = {pk} AND f.undone_at >= '{w['announced_at'].isoformat()}'"
        )
        return any(u["at"] <= told <= u["at"] + TICK for u in undone)

    def _firm(self, pk: int) -> list[Row]:
        """Contracts that hold GPUs on its hosts when it begins."""
        return rows(
            "SELECT DISTINCT c.id, c.created_at FROM marketplace_contract c JOIN marketplace_reservation r ON r.contract_id = c.id"
            " AND r.state = 'firm' AND r.maintenance_id IS NULL JOIN marketplace_reservationblock b ON b.reservation_id = r.id"
            " JOIN marketplace_maintenancehost h ON h.host_id = b.host_id"
            " JOIN marketplace_maintenance m ON m.id = h.maintenance_id"
            f" WHERE m.id = {pk} AND c.state = 'active' AND r.starts_at < m.ends_at AND r.ends_at > m.starts_at"
        )

    def _drained(self, works: dict[int, Row]) -> list[str]:
        """Nobody is asked to leave before its hosts must be empty."""
        found = []
        for e in rows(
            "SELECT e.id, e.at, e.reason, e.placement_id FROM marketplace_placementevent e"
            f" WHERE e.to_state = 'draining' AND e.id > {self.drains} AND e.reason LIKE 'drained: mnt\\_%' ORDER BY e.id"
        ):
            self.drains = e["id"]
            w = works[ids.decode("mnt", e["reason"].split()[1].rstrip(":")) or 0]
            early = e["at"] < w["starts_at"] - LEAD
            self.promises.count("maintenance: not before its hour", "broken" if early else "kept")
            if early:
                found.append(
                    f"placement {e['placement_id']} left at {e['at']:%F %T} for {w['id']}, which begins {w['starts_at']:%F %T}"
                )
        return found

    def _came_back(self) -> list[str]:
        """What is over has given back its hosts, and none of them is still out for it."""
        return [
            f"host {h['name']} is {h['state']} for {ids.encode('mnt', h['of'])}, which is {h['over']}"
            for h in rows(
                "SELECT h.name, h.state, m.id AS of, m.state AS over FROM marketplace_maintenancehost t"
                " JOIN marketplace_maintenance m ON m.id = t.maintenance_id AND m.state IN ('completed', 'cancelled')"
                " JOIN marketplace_host h ON h.id = t.host_id WHERE t.taken_at IS NOT NULL AND t.given_back_at IS NULL"
            )
        ]

    def _short(self, now: datetime) -> list[str]:
        """What is written down as missing now is what a count of GPUs comes to: own ones that are away, less those that stand in."""
        at = f"'{now.isoformat()}'"
        away, stands_in = Counter[int](), Counter[int]()
        for b in rows(
            "SELECT r.contract_id, r.maintenance_id, cardinality(b.gpu_indices) AS gpus,"
            " EXISTS (SELECT 1 FROM marketplace_maintenancehost t"
            " JOIN marketplace_maintenance m ON m.id = t.maintenance_id AND m.state IN ('announced', 'in_progress')"
            " WHERE t.host_id = b.host_id AND t.taken_at IS NOT NULL AND t.given_back_at IS NULL) AS taken"
            " FROM marketplace_reservationblock b JOIN marketplace_reservation r ON r.id = b.reservation_id"
            " JOIN marketplace_contract c ON c.id = r.contract_id WHERE r.state = 'firm'"
            f" AND r.starts_at <= {at} AND r.ends_at > {at} AND c.kind IN {HELD} AND c.state = 'active'"
        ):
            away[b["contract_id"]] += b["gpus"] * b["taken"]
            stands_in[b["contract_id"]] += b["gpus"] * (b["maintenance_id"] is not None)
        said = Counter(
            {
                row["contract_id"]: row["n"]
                for row in rows(
                    "SELECT contract_id, sum(gpus) AS n FROM marketplace_shortfall"
                    f" WHERE maintenance_id IS NOT NULL AND starts_at <= {at} AND ends_at > {at} GROUP BY 1"
                )
            }
        )
        found = []
        for pk in away.keys() | said.keys():
            missing = max(0, away[pk] - stands_in[pk])
            if missing != said[pk]:
                found.append(
                    f"contract {ids.encode('ctr', pk)} misses {missing} GPUs for maintenance ({away[pk]} away, {stands_in[pk]} stand in);"
                    f" {said[pk]} are written down"
                )
            elif away[pk]:
                self.promises.count("maintenance: what it takes is replaced or written down", "kept")
        return found

    def _sold_over(self, live: dict[int, Row]) -> list[str]:
        """Nobody is promised GPUs over work that was announced when he signed."""
        found = []
        for pk, w in live.items():
            for c in rows(
                "SELECT DISTINCT c.id, c.created_at, r.starts_at, r.ends_at FROM marketplace_contract c"
                " JOIN marketplace_reservation r ON r.contract_id = c.id AND r.state = 'firm' AND r.maintenance_id IS NULL"
                " JOIN marketplace_reservationblock b ON b.reservation_id = r.id"
                f" JOIN marketplace_maintenancehost h ON h.host_id = b.host_id AND h.maintenance_id = {pk} AND h.given_back_at IS NULL"
                f" WHERE r.starts_at < '{w['ends_at'].isoformat()}' AND r.ends_at > '{w['starts_at'].isoformat()}'"
                f" AND c.created_at > '{w['announced_at'].isoformat()}' AND NOT EXISTS (SELECT 1 FROM marketplace_fill f"
                "  WHERE f.contract_id = c.id AND f.resale_id IS NOT NULL)"
            ):
                known = [(a, b) for seen, a, b in self.windows[pk] if seen <= c["created_at"]]
                if known and known[-1][0] < c["ends_at"] and c["starts_at"] < known[-1][1]:
                    found.append(
                        f"contract {ids.encode('ctr', c['id'])} of {c['created_at']:%F %T} holds GPUs over {ids.encode('mnt', pk)},"
                        f" announced {w['announced_at']:%F %T}"
                    )
        return found
