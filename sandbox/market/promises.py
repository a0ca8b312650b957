"""What was promised, and what became of it: made, kept, compensated by its rule, not kept for a fault outside, or broken.

The rules stand here once more, in our own words and SQL: none of the code that keeps them is called.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.faults import Faults

Row = dict[str, Any]
HELD = "('reserved', 'flexible')"
CLAIM_WITHIN = timedelta(
    minutes=10
)  # of the hour that was promised: sleeps are proved, spot leaves with its checkpoint
TICK = timedelta(minutes=3)  # the beat of the run is at most so late
KEPT = timedelta(days=1)  # so long after its window an offer is still looked at
OWN = ("cancelled", "the contract ended", "a replica ended")
# Why work that is firm may be asked to go.
FIRM = (*OWN, "host drained", "drained:", "not_started", "moved", "host", "site", "a replica", "lease")
CLAIMED = "preempted: a reservation begins on these GPUs"
FROZEN = (
    "terms",
    "fee_permille",
    "kind",
    "currency",
    "eviction_notice_s",
    "flexible_notice_s",
    "emergency_notice_s",
    "overage_price",
)
PRICE_NOTICE = timedelta(days=30)
STAYS_DUE, STAYS_DUE_AT_LEAST = 4, timedelta(hours=24)
DUNNING = {"notify": 3, "suspend": 14, "default": 28}


class Promises:
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.tally: dict[str, Counter[str]] = defaultdict(Counter)
        self.contracts: dict[int, Row] = {}
        self.claims: set[int] = set()
        self.drains = 0
        self.leaves: dict[int, datetime] = {}
        self.said: set[str] = set()

    def look(self, now: datetime) -> list[str]:
        contracts = {c["id"]: c for c in rows("SELECT * FROM marketplace_contract ORDER BY id")}
        for host in rows("SELECT id, leaves_at FROM marketplace_host WHERE leaves_at IS NOT NULL"):
            self.leaves[host["id"]] = host["leaves_at"]
        found = [
            *self._terms(contracts, now),
            *self._clock(contracts, now),
            *self._held(contracts, now),
            *self._claims(contracts, now),
            *self._drained(contracts),
            *self._dunning(),
        ]
        self.contracts = contracts
        return found

    def count(self, promise: str, fate: str, times: int = 1) -> None:
        self.tally[promise][fate] += times

    # --- what was signed stays
    def _terms(self, contracts: dict[int, Row], now: datetime) -> list[str]:
        found = []
        agreed: dict[int, list[Row]] = defaultdict(list)
        for a in rows("SELECT * FROM marketplace_amendment WHERE state = 'accepted' ORDER BY effective_at"):
            agreed[a["contract_id"]].append(a)
        for pk, c in contracts.items():
            old = self.contracts.get(pk)
            name = ids.encode("ctr", pk)
            if old is None:
                self.count("terms frozen", "made")
                continue
            changed = [field for field in FROZEN if c[field] != old[field]]
            found += [f"contract {name}: {field} was {old[field]} and is {c[field]}" for field in changed]
            if c["price"] != old["price"]:
                found += self._consent(name, c, old, agreed[pk], now)
            grown = sum(a["added_gpus"] for a in agreed[pk] if a["kind"] == "resize")
            signed = json.loads(c["terms"])["gpu_count"]
            if c["gpu_count"] != signed + grown:
                found.append(f"contract {name} has {c['gpu_count']} GPUs; {signed} signed, {grown} added")
            if c["terminated_at"] and not old["terminated_at"]:
                found += self._termination(name, c, old)
        return found

    def _consent(self, name: str, c: Row, old: Row, agreed: list[Row], now: datetime) -> list[str]:
        asked = [a for a in agreed if a["kind"] == "price" and a["price"] == c["price"] and a["effective_at"] <= now]
        if not asked:
            return [f"contract {name}: its price went from {old['price']} to {c['price']} with nobody's consent"]
        last = asked[-1]
        if c["price"] > old["price"]:
            self.count("price rise with notice and consent", "kept")
            if last["effective_at"] - last["created_at"] < PRICE_NOTICE or last["decided_by"] == last["proposed_by"]:
                return [f"contract {name}: a rise to {c['price']} without 30 days or without its customer's consent"]
        return []

    def _termination(self, name: str, c: Row, old: Row) -> list[str]:
        """A quarter of what is left stays due, at least a day; by use at once. A price that was not accepted ends it on its day."""
        at, end = c["terminated_at"], old["ends_at"]
        if c["kind"] not in {"reserved", "flexible"} or c["state"] == "cancelled" or end is None:
            return []
        begin = max(c["starts_at"], at)
        due = begin + max((end - begin) / STAYS_DUE, STAYS_DUE_AT_LEAST)
        late = timedelta(seconds=due.second, microseconds=due.microsecond)
        due = min(due if not late else due - late + timedelta(minutes=1), end)
        self.count("early termination by its rule", "made")
        if c["ends_at"] != due and c["ends_at"] != max(due, c["starts_at"] + timedelta(seconds=1)):
            return [
                f"contract {name} was terminated at {at:%F %T}: it ends {c['ends_at']:%F %T}, by its rule {due:%F %T}"
            ]
        self.count("early termination by its rule", "kept")
        return []

    # --- what the clock owes
    def _clock(self, contracts: dict[int, Row], now: datetime) -> list[str]:
        found = []
        for pk, c in contracts.items():
            name, live = ids.encode("ctr", pk), c["state"] == "active"
            if live and c["ends_at"] and c["ends_at"] < now - TICK:
                found.append(f"contract {name} was over at {c['ends_at']:%F %T} and is still active")
            if c["state"] == "pending_payment" and c["pay_by"] < now - TICK:
                found.append(f"contract {name} waits for a payment that was due at {c['pay_by']:%F %T}")
            if live and c["kind"] in {"reserved", "flexible"} and c["starts_at"] < now - TICK and c["began_at"] is None:
                found.append(f"contract {name} began at {c['starts_at']:%F %T}, and nobody was told")
            if c["began_at"] and not self.contracts.get(pk, {}).get("began_at"):
                late = c["began_at"] - c["starts_at"]
                self.count("window begins at its hour", "kept" if late <= TICK else "broken")
        stuck = rows(
            "SELECT DISTINCT l.contract_id FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
            " JOIN marketplace_contract c ON c.id = l.contract_id WHERE l.kind = 'upfront' AND ("
            f" (c.state = 'cancelled' AND i.state = 'open' AND c.ended_at < '{(now - timedelta(days=1)).isoformat()}')"
            " OR (c.state IN ('active', 'ended') AND i.state NOT IN ('paid') AND i.due_minor > 0))"
        )
        return found + [f"contract {r['contract_id']}: its invoice at signing does not stand as it does" for r in stuck]

    # --- capacity
    def _held(self, contracts: dict[int, Row], now: datetime) -> list[str]:
        """At every instant to its end a contract that holds has its GPUs firmly, less what it offers or has sold then; no more, no less."""
        own: dict[int, list[tuple[datetime, datetime, int]]] = defaultdict(list)
        for b in rows(
            "SELECT r.contract_id, r.starts_at, r.ends_at, coalesce(sum(cardinality(b.gpu_indices)), 0) AS gpus"
            " FROM marketplace_reservation r JOIN marketplace_contract c ON c.id = r.contract_id"
            " LEFT JOIN marketplace_reservationblock b ON b.reservation_id = r.id WHERE r.state = 'firm' AND r.maintenance_id IS NULL"
            f" AND c.state IN ('active', 'pending_payment') AND c.kind IN {HELD} GROUP BY r.id"
        ):
            own[b["contract_id"]].append((b["starts_at"], b["ends_at"], b["gpus"]))
        away = self.sold_on(now)
        found = []
        for pk, c in contracts.items():
            if c["state"] not in {"active", "pending_payment"} or c["kind"] not in HELD or c["ends_at"] <= now:
                continue
            marks = {t for a, b, _ in (*own[pk], *away[pk]) for t in (a, b)} | {now, c["starts_at"]}
            for at in sorted(t for t in marks if max(now, c["starts_at"]) <= t < c["ends_at"]):
                gpus = sum(n for a, b, n in own[pk] if a <= at < b)
                sold = sum(n for a, b, n in away[pk] if a <= at < b)
                if gpus + sold != c["gpu_count"]:
                    found.append(
                        f"contract {ids.encode('ctr', pk)} ({c['state']}) holds {c['gpu_count']} GPUs until {c['ends_at']:%F %R}; reserved"
                        f" for it at {at:%F %T}: {gpus}, offered or sold on: {sold}"
                    )
                    break
        return found

    def sold_on(self, now: datetime) -> dict[int, list[tuple[datetime, datetime, int]]]:
        """Per contract (from, until, GPUs) that are set aside for others, or theirs."""
        found: dict[int, list[tuple[datetime, datetime, int]]] = defaultdict(list)
        for r in rows(
            "SELECT r.contract_id, r.state, r.gpu_count, a.claims_at, r.ends_at, (SELECT coalesce(sum(f.gpu_count), 0)"
            " FROM marketplace_fill f WHERE f.resale_id = r.id AND f.undone_at IS NULL) AS sold FROM marketplace_resale r"
            f" JOIN marketplace_reservation a ON a.id = r.reservation_id WHERE r.ends_at > '{(now - KEPT).isoformat()}'"
        ):
            gpus = r["gpu_count"] if r["state"] == "open" else r["sold"]
            found[r["contract_id"]].append((r["claims_at"], r["ends_at"], gpus))
        return found

    def _claims(self, contracts: dict[int, Row], now: datetime) -> list[str]:
        """Who comes for all that was reserved has it within minutes of the hour."""
        found = []
        late = (now - CLAIM_WITHIN).isoformat()
        for j in rows(
            "SELECT j.*, (SELECT min(p.created_at) FROM marketplace_placement p WHERE p.job_id = j.id) AS placed_at"
            f" FROM marketplace_job j WHERE j.name = 'claim' AND j.created_at < '{late}' ORDER BY j.id"
        ):
            if j["id"] in self.claims:
                continue
            self.claims.add(j["id"])
            self.count("reserved capacity at the hour", "made")
            in_time = j["placed_at"] is not None and j["placed_at"] <= j["created_at"] + CLAIM_WITHIN
            if in_time or j["state"] == "cancelled":
                self.count("reserved capacity at the hour", "kept")
            elif why := self._excuse(contracts[j["contract_id"]], j):
                self.count("reserved capacity at the hour", f"not kept: {why}")
            else:
                self.count("reserved capacity at the hour", "broken")
                found.append(
                    f"contract {ids.encode('ctr', j['contract_id'])} reserved {contracts[j['contract_id']]['gpu_count']} GPUs; claimed at"
                    f" {j['created_at']:%F %T} in vain: {j['state']} {j['state_reason']}; {_why(j['id'])}"
                )
        return found

    def _excuse(self, c: Row, job: Row) -> str:
        """What may stand between a promise and its hour: a fault, a call of the grid, its own debts, its own jobs."""
        at = job["created_at"]
        blocks = rows(
            "SELECT h.name, h.state, h.site_id FROM marketplace_reservationblock b JOIN marketplace_host h ON h.id = b.host_id"
            f" JOIN marketplace_reservation r ON r.id = b.reservation_id WHERE r.contract_id = {c['id']}"
        )
        if self.faults.excused(c["site_id"], {b["name"] for b in blocks}, at) or any(
            b["state"] == "lost" for b in blocks
        ):
            return "a host or site failed"
        if any(b["state"] in {"draining", "maintenance"} for b in blocks):
            return "its host is in maintenance"
        calls = c["kind"] == "flexible" and rows(  # who reserved keeps what he has through every call
            f"SELECT 1 FROM marketplace_curtailment WHERE site_id = {c['site_id']} AND state IN ('active', 'restoring', 'completed')"
            f" AND starts_at <= '{(at + CLAIM_WITHIN).isoformat()}' AND ends_at > '{at.isoformat()}'"
        )
        if calls:
            return "the grid held the site down"
        standing = rows(f"SELECT state FROM marketplace_billingstanding WHERE organization_id = {c['organization_id']}")
        if standing and standing[0]["state"] != "good":
            return "its bills are unpaid"
        if any(a <= at + CLAIM_WITHIN and at < b and n for a, b, n in self.sold_on(at)[c["id"]]):
            return "it had sold some of it on"
        used = rows(
            "SELECT coalesce(sum(cardinality(gpu_indices)), 0) AS n FROM marketplace_placement WHERE contract_id ="
            f" {c['id']} AND job_id <> {job['id']} AND created_at <= '{(at + CLAIM_WITHIN).isoformat()}'"
            f" AND (finished_at IS NULL OR finished_at > '{at.isoformat()}')"
        )
        return "its own jobs had it" if used[0]["n"] + job["replicas"] > c["gpu_count"] else ""

    # --- who is asked to leave
    def _drained(self, contracts: dict[int, Row]) -> list[str]:
        found = []
        events = rows(
            "SELECT e.id, e.at, e.reason, p.id AS placement, p.contract_id, p.host_id, p.site_id FROM marketplace_placementevent e"
            f" JOIN marketplace_placement p ON p.id = e.placement_id WHERE e.to_state = 'draining' AND e.id > {self.drains} ORDER BY e.id"
        )
        calls = {ids.encode("cur", c["id"]): c for c in rows("SELECT * FROM marketplace_curtailment")} if events else {}
        for e in events:
            self.drains = e["id"]
            c, why = contracts[e["contract_id"]], e["reason"]
            curtailed = why.startswith("curtailment ")
            if curtailed and c["kind"] == "flexible":
                call = calls[why.split()[1]]
                early = e["at"] < call["created_at"] + timedelta(seconds=c["flexible_notice_s"])
                self.count("flexible: notice of a call", "broken" if early else "kept")
                if early:
                    found.append(
                        f"placement {e['placement']} left {e['at']:%F %T} for {why}, announced {call['created_at']:%F %T}"
                    )
            elif c["kind"] in {"on_demand", "reserved"}:
                agreed = curtailed and _named(c, calls[why.split()[1]], e["at"])
                self.count("firm: asked to go only for cause", "broken" if curtailed and not agreed else "kept")
                if not agreed and (curtailed or not (why.startswith(FIRM) or self._beside(e))):
                    found.append(f"placement {e['placement']} of a {c['kind']} contract was asked to go: {why!r}")
            if why.startswith("drained:") and "mnt_" not in why and (told := self.leaves.get(e["host_id"])):
                self.count("maintenance: not before its hour", "broken" if e["at"] < told else "kept")
                if e["at"] < told:
                    found.append(
                        f"placement {e['placement']} left for maintenance at {e['at']:%F %T}, announced for {told:%F %T}"
                    )
        return found

    def _beside(self, e: Row) -> bool:
        """Did it, or a replica that left with it, stand on GPUs that its contract does not hold then, when somebody's window began there?
        What goes beyond a reservation, and what its holder has sold on, is nobody's promise to him.
        """
        if not e["reason"].startswith(CLAIMED):
            return False
        stood = rows(
            "SELECT p.gpu_indices, (SELECT coalesce(array_agg(i), '{}') FROM marketplace_reservation r"
            " JOIN marketplace_reservationblock b ON b.reservation_id = r.id, unnest(b.gpu_indices) i WHERE r.contract_id = p.contract_id"
            f" AND b.host_id = p.host_id AND r.claims_at <= '{e['at'].isoformat()}' AND r.ends_at > '{e['at'].isoformat()}'"
            " AND r.state = 'firm') AS own FROM marketplace_placement p JOIN marketplace_placementevent o ON o.placement_id = p.id"
            f" WHERE p.job_id = (SELECT job_id FROM marketplace_placement WHERE id = {e['placement']})"
            f" AND o.to_state = 'draining' AND o.at = '{e['at'].isoformat()}'"
        )
        return any(set(p["gpu_indices"]) - set(p["own"]) for p in stood)

    def _dunning(self) -> list[str]:
        found = []
        for s in rows(
            "SELECT d.id, d.action, d.taken_at, i.finalized_at, i.number FROM billing_dunningstep d"
            " JOIN billing_invoice i ON i.id = d.invoice_id ORDER BY d.id"
        ):
            key = f"dunning {s['id']}"
            if key in self.said:
                continue
            self.said.add(key)
            early = s["taken_at"] < s["finalized_at"] + timedelta(days=DUNNING[s["action"]])
            self.count("dunning: not before its day", "broken" if early else "kept")
            if early:
                found.append(
                    f"invoice {s['number']}: {s['action']} at {s['taken_at']:%F %T}, issued {s['finalized_at']:%F %T}"
                )
        return found


def _named(c: Row, call: Row, at: datetime) -> bool:
    """An emergency, of a kind that the contract names, and its notice was over."""
    notice = c["emergency_notice_s"]
    return call["emergency"] and notice is not None and at >= call["created_at"] + timedelta(seconds=notice)


def _why(job: int) -> str:
    said = rows(f"SELECT at, reason, binding FROM scheduler_decision WHERE job_id = {job} ORDER BY at DESC LIMIT 1")
    return f"last decision {said[0]}" if said else "no cycle has looked at it"
