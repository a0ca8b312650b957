"""What contracts that hold GPUs owe for it: their windows, what they sold on, what the grid took, what could not be had, what goes beyond.

In our own words: nothing of billing is called. Amounts are milli-GPU-seconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.promises import Promises

Row = dict[str, Any]
Span = tuple[int, int]  # whole seconds, half open
Part = tuple[int, int, int]  # GPUs, from, to
FAR = 1 << 40


class Held:
    """All that hold, of accounts that are open; `promises` counts what was made good."""

    def __init__(self, promises: Promises) -> None:
        self.promises = promises

    def look(self) -> list[str]:
        found = []
        billed: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)  # by price
        for row in rows(
            "SELECT l.contract_id, l.kind, l.price_millionths AS price, sum(l.quantity) AS quantity FROM billing_invoiceline l"
            " JOIN billing_invoice i ON i.id = l.invoice_id WHERE i.state <> 'void' AND l.kind IN ('commitment', 'overage', 'credit')"
            " GROUP BY 1, 2, 3 HAVING sum(l.quantity) <> 0"
        ):
            billed[row["contract_id"], row["kind"]][row["price"]] = int(row["quantity"])
        for owes in owing():
            c, missed = owes.c, owes.rows
            pk, name = c["id"], ids.encode("ctr", c["id"])
            for kind, due, why in (
                ("commitment", sum(owes.committed().values()), "committed"),
                ("credit", -owes.missed(), "for what could not be had"),
                ("overage", owes.beyond(), "beyond the GPUs that it holds"),
            ):
                sum_billed = sum(billed[pk, kind].values())
                if sum_billed != due:
                    found.append(
                        f"contract {name} ({c['kind']}, {c['state']}) is billed {sum_billed / 3_600_000:g} GPU-hours"
                        f" {why} to {owes.edge}, by its terms {due / 3_600_000:g} (curtailed: {owes.calls}; sold on: {owes.sold};"
                        f" missing: {[(m['gpus'], str(m['starts_at']), str(m['ends_at'])) for m in missed]})"
                    )
            if billed[pk, "commitment"] != owes.committed():
                found.append(
                    f"contract {name} is billed its commitment at {billed[pk, 'commitment']}, by what was agreed {owes.committed()}"
                    " (milli-GPU-seconds by price)"
                )
            if billed[pk, "overage"].keys() - {c["overage_price"]}:
                found.append(
                    f"contract {name} is billed {billed[pk, 'overage']} beyond what it holds, agreed at {c['overage_price']}"
                )
            if owes.calls:
                free = sum(gpus * (b - a) - gpus * _length(_without((a, b), owes.calls)) for gpus, a, b in owes.due())
                self.promises.tally["flexible: GPU-hours of curtailment credited"][name] = free // 3_600
            if owes.missed():
                self.promises.tally["missing: GPU-hours not charged"][name] = owes.missed() // 3_600_000
        return found


def owing() -> list[Owes]:
    """What all that hold owe, of accounts that are open and were billed since they began."""
    held = rows(
        "SELECT c.*, a.billed_through FROM marketplace_contract c JOIN billing_billingaccount a"
        " ON a.organization_id = c.organization_id WHERE c.kind IN ('reserved', 'flexible')"
        " AND c.state NOT IN ('pending_payment', 'cancelled') AND a.billed_through > c.starts_at AND a.state = 'open'"
    )
    added = _by("SELECT * FROM marketplace_amendment WHERE kind = 'resize' AND state = 'accepted'")
    sold = _by(
        "SELECT f.*, r.contract_id AS contract FROM marketplace_fill f JOIN marketplace_resale r ON r.id = f.resale_id"
        " WHERE f.undone_at IS NULL", "contract",
    )  # fmt: skip
    missed = _by(
        "SELECT s.*, m.noticed_until FROM marketplace_shortfall s"
        " LEFT JOIN marketplace_maintenance m ON m.id = s.maintenance_id ORDER BY s.starts_at"
    )
    return [Owes(c, added[c["id"]], sold[c["id"]], missed[c["id"]]) for c in held]


class Owes:
    """One contract, up to its account's edge."""

    def __init__(self, c: Row, added: list[Row], sold: list[Row], missed: list[Row]) -> None:
        self.c, self.rows = c, missed
        self.through = _second(c["billed_through"])
        ends = [c["ends_at"]] if c["state"] == "defaulted" else [c["ends_at"], c["ended_at"]]
        term = min(_second(t) for t in ends if t is not None)
        self.edge = min(term, self.through)
        first = c["gpu_count"] - sum(a["added_gpus"] for a in added)
        self.sold = [
            (f["gpu_count"], _second(f["starts_at"]), min(_second(f["ends_at"]), term if c["state"] == "defaulted" else FAR))
            for f in sold
        ]  # fmt: skip
        self.parts: list[Part] = [
            (first, _second(c["starts_at"]), term),
            *((a["added_gpus"], _second(a["effective_at"]), term) for a in added),
            *((gpus, max(a, term), b) for gpus, a, b in self.sold if b > max(a, term)),  # stays due after an early end
        ]
        self.prices = [c["price"], *(a["price"] for a in added)]
        self.prices += [c["price"]] * (len(self.parts) - len(self.prices))
        self.calls = _curtailed(c) if c["kind"] == "flexible" or c["emergency_notice_s"] is not None else []

    def due(self) -> list[Part]:
        """What is due by now, curtailed seconds not yet taken out."""
        return [(gpus, a, min(b, self.through)) for gpus, a, b in self.parts if a < min(b, self.through)]

    def committed(self) -> dict[int, int]:
        """By price."""
        found: dict[int, int] = defaultdict(int)
        for (gpus, a, b), price in zip(self.parts, self.prices, strict=True):
            found[price] += 1000 * gpus * _length(_without((a, max(a, min(b, self.through))), self.calls))
        return {price: quantity for price, quantity in found.items() if quantity}

    def missed(self, month: Span = (0, FAR), *, whole: bool = False) -> int:
        """What could not be had and is not charged, of `month`; `whole`: also what is not billed yet."""
        free = self.free()
        through = FAR if whole else self.through
        spans = [*self.calls, month, *((a, b) for _, a, b in (*free, *self.parts))]
        marks = sorted({t for span in spans for t in span} | {through})
        total = 0
        for a, b in pairwise(marks):
            if a < month[0] or b > min(month[1], through) or any(s <= a < e for s, e in self.calls):
                continue
            away = sum(gpus for gpus, s, e in free if s <= a < e)
            total += 1000 * (b - a) * min(away, sum(gpus for gpus, s, e in self.parts if s <= a < e))
        return total

    def free(self) -> list[Part]:
        """Absences that its frozen terms do not bear: without due notice, or beyond the hours of their month."""
        allowed = 3600 * ((json.loads(self.c["terms"]).get("maintenance") or {}).get("hours_per_month", 0))
        told: dict[Span, list[Part]] = defaultdict(list)
        free: list[Part] = []
        for row in self.rows:
            a, b = _second(row["starts_at"]), _second(row["ends_at"])
            until = min(max(a, _second(row["noticed_until"])) if row["noticed_until"] else a, b)
            free += [(row["gpus"], until, b)] if until < b else []
            for month in months(a, until):
                told[month].append((row["gpus"], max(a, month[0]), min(until, month[1])))
        for spans in told.values():
            left = allowed
            marks = sorted({t for _, a, b in spans for t in (a, b)})
            for a, b in pairwise(marks):
                here = [gpus for gpus, s, e in spans if s <= a < e]
                if not here:
                    continue
                borne = min(left, b - a)
                left -= borne
                free += [(gpus, a + borne, b) for gpus in here if a + borne < b]
        return free

    def beyond(self) -> int:
        """What it used beyond what it held, month by month: what others had of it, and what was away, it did not hold."""
        used: dict[Span, int] = defaultdict(int)
        for u in rows(
            "SELECT DISTINCT ON (placement_id, start_s, end_s) start_s, end_s, rate, quantity FROM billing_usagerecord"
            f" WHERE contract_id = {self.c['id']} ORDER BY placement_id, start_s, end_s, revision DESC"
        ):
            for month in months(u["start_s"], u["end_s"]):
                until = min(month[1], self.through)
                used[month] += _upto(u, until) - _upto(u, month[0])
        total = 0
        for month, quantity in used.items():
            held = sum(1000 * gpus * _length([_clip((a, b), month)]) for gpus, a, b in self.parts)
            theirs = sum(1000 * gpus * _length([_clip((a, b), month)]) for gpus, a, b in self.sold)
            total += max(0, quantity - held + theirs + self.missed(month, whole=True))
        return total


def _curtailed(c: Row) -> list[Span]:
    """When calls of the grid held the contract back: calls that drained one of its placements, to their end."""
    why = rows(
        "SELECT DISTINCT e.reason FROM marketplace_placementevent e JOIN marketplace_placement p ON p.id = e.placement_id"
        f" WHERE p.contract_id = {c['id']} AND e.to_state = 'draining' AND e.reason LIKE 'curtailment %'"
    )
    calls = [ids.decode("cur", row["reason"].split()[1]) for row in why]
    if not calls:
        return []
    return sorted(
        (_second(call["starts_at"]), _second(min(t for t in (call["ends_at"], call["ended_at"]) if t is not None)))
        for call in rows(f"SELECT * FROM marketplace_curtailment WHERE id IN ({','.join(map(str, calls))})")
    )


def _by(sql: str, column: str = "contract_id") -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows(sql):
        found[row[column]].append(row)
    return found


def _without(span: Span, calls: Iterable[Span]) -> list[Span]:
    """What is left of `span`."""
    left, at = [], span[0]
    for a, b in sorted(calls):
        if a > at:
            left.append((at, min(a, span[1])))
        at = max(at, b)
    return [*left, (at, span[1])]


def _length(spans: Iterable[Span]) -> int:
    return sum(max(0, b - a) for a, b in spans)


def _clip(span: Span, month: Span) -> Span:
    return max(span[0], month[0]), min(span[1], month[1])


def _upto(u: Row, t: int) -> int:
    """What a record bills up to `t`: its rate each second, until its quantity is used up."""
    if t >= u["end_s"]:
        return int(u["quantity"])
    return int(min(u["quantity"], u["rate"] * max(0, t - u["start_s"])))


def months(a: int, b: int) -> list[Span]:
    """The UTC months that [a, b) touches."""
    found = []
    while a < b:
        at = datetime.fromtimestamp(a, UTC)
        first = datetime(at.year, at.month, 1, tzinfo=UTC)
        after = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
        found.append((_second(first), _second(after)))
        a = found[-1][1]
    return found


def _second(at: datetime) -> int:
    return int(at.timestamp())
