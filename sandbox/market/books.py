"""Money, by sums of our own: seconds billed once and all of them, lines, shares, the ledger, and what Stripe says it holds."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Any

from benchmarks.auditor import rows
from billing import reconcile
from marketplace import ids
from sandbox.market.doors import Stripe
from sandbox.market.eased import HeldLower
from sandbox.market.held import Held
from sandbox.market.promises import OWN, Promises
from sandbox.market.resold import Resold

Row = dict[str, Any]
SOLD = "('usage', 'commitment', 'overage')"


class Books:
    def __init__(self, stripe: Stripe, promises: Promises) -> None:
        self.stripe, self.promises = stripe, promises
        self.held, self.resold, self.eased = Held(promises), Resold(promises), HeldLower(promises)
        self.placements: set[int] = set()

    def look(self, *, last: bool = False) -> list[str]:
        """All that must hold at any moment; with `last`, when everything is closed, also that nothing was forgotten."""
        if last:
            self.placements.clear()
        return [
            *(f"billing counts {n} under {name!r}" for name, n in reconcile.invariants().items() if n),
            *_ledger(),
            *_lines(),
            *self._seconds(last=last),
            *_invoiced(last=last),
            *self.held.look(),
            *self.eased.books(),
            *self.resold.books(last=last),
            *_prepaid(last=last),
            *_spot(),
            *self._mirror(),
        ]

    # --- seconds
    def _seconds(self, *, last: bool) -> list[str]:
        """Each ended placement's records are its timeline: no second twice, none left out, none that was promised free."""
        found = []
        ended = rows(
            "SELECT p.*, c.kind, c.eviction_notice_s, j.checkpoint_grace_s FROM marketplace_placement p"
            " JOIN marketplace_contract c ON c.id = p.contract_id JOIN marketplace_job j ON j.id = p.job_id"
            " WHERE p.finished_at IS NOT NULL AND p.running_at IS NOT NULL"
            + ("" if last else " AND p.metered_through = p.finished_at")
            + " ORDER BY p.id"
        )
        new = [p for p in ended if p["id"] not in self.placements]
        if not new:
            return []
        pks = ",".join(str(p["id"]) for p in new)
        events: dict[int, list[Row]] = defaultdict(list)
        for e in rows(f"SELECT * FROM marketplace_placementevent WHERE placement_id IN ({pks}) ORDER BY id"):
            events[e["placement_id"]].append(e)
        billed: dict[int, int] = defaultdict(int)
        spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for u in rows(
            "SELECT DISTINCT ON (placement_id, start_s, end_s) placement_id, start_s, end_s, quantity FROM billing_usagerecord"
            f" WHERE placement_id IN ({pks}) ORDER BY placement_id, start_s, end_s, revision DESC"
        ):
            billed[u["placement_id"]] += u["quantity"]
            spans[u["placement_id"]].append((u["start_s"], u["end_s"]))
        jobs = ",".join(str(p["job_id"]) for p in new)
        told: dict[int, list[datetime]] = defaultdict(list)
        for n in rows(f"SELECT job_id, told_at FROM marketplace_spotnotice WHERE job_id IN ({jobs}) ORDER BY told_at"):
            told[n["job_id"]].append(n["told_at"])
        for p in new:
            self.placements.add(p["id"])
            found += self._placement(p, events[p["id"]], told[p["job_id"]], billed[p["id"]], sorted(spans[p["id"]]))
        return found

    def _placement(
        self, p: Row, events: list[Row], told: list[datetime], billed: int, spans: list[tuple[int, int]]
    ) -> list[str]:
        name = ids.encode("plc", p["id"])
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            return [f"placement {name}: two records bill one second: {spans}"]
        milli = len(p["gpu_indices"]) * p["gpu_milli"]
        end = min(t for t in (p["release_requested_at"], p["finished_at"]) if t is not None)
        begin = int(p["running_at"].timestamp())
        free = self._notice(p, events, told)
        full = max(0, int(end.timestamp()) - begin)
        due = max(0, min(full, int((end - free).timestamp()) - begin) if free else full)
        if not milli:
            due = 0
        plain = not any(
            e["to_state"] in {"parked", "unreachable"} or "waits for its gang" in e["reason"] for e in events
        )
        if billed != milli * due if plain else not 0 <= billed <= milli * due:
            said = f"ran {due} s on {milli} milli-GPU from {p['running_at']:%F %T} ({p['state']}, {p['reason']!r})"
            return [f"placement {name} {said}: {billed / max(milli, 1):g} s are billed"]
        self.promises.count("every running second billed once", "kept", due)
        return []

    def _notice(self, p: Row, events: list[Row], told: list[datetime]) -> timedelta:
        """Seconds of an eviction's notice that were not given: they are free."""
        first = next((e for e in events if e["to_state"] == "draining"), None)
        if p["kind"] != "spot" or p["release_requested_at"] is None or first is None or first["reason"].startswith(OWN):
            return timedelta()
        leave = p["release_requested_at"]
        known = [t for t in told if p["created_at"] <= t <= leave]
        given = leave - min(known, default=leave) + timedelta(seconds=p["checkpoint_grace_s"])
        missing = max(timedelta(), timedelta(seconds=p["eviction_notice_s"]) - given)
        self.promises.count("spot: notice of eviction", "compensated" if missing else "kept")
        return missing

    # --- Stripe
    def _mirror(self) -> list[str]:
        """Stripe's invoices, charges and transfers are ours, to the cent."""
        ours = {i["stripe_invoice"]: i for i in rows("SELECT * FROM billing_invoice WHERE stripe_invoice IS NOT NULL")}
        found = []
        for remote in self.stripe.objects("invoice"):
            invoice = ours.get(remote["id"])
            if remote["status"] == "draft" or (invoice is None and remote["status"] == "void"):
                continue
            if invoice is None:
                found.append(
                    f"Stripe has {remote['id']} of {remote['total']}, {remote['status']}; we have no such invoice"
                )
            elif remote["total"] != invoice["due_minor"]:
                found.append(f"invoice {invoice['number']} is {invoice['due_minor']}, at Stripe {remote['total']}")
            elif invoice["state"] == "paid" and remote["status"] != "paid":
                found.append(f"invoice {invoice['number']} is paid here, {remote['status']} at Stripe")
        taken = sum(i["amount"] for i in self.stripe.objects("payment_intent") if i["status"] == "succeeded")
        paid = sum(i["due_minor"] for i in ours.values() if i["state"] == "paid")
        if taken < paid:
            found.append(f"invoices of {paid} are paid here; Stripe took {taken}")
        sent = rows("SELECT coalesce(sum(amount_minor), 0) AS n FROM billing_payout WHERE state = 'sent'")[0]["n"]
        moved = sum(t["amount"] - t.get("amount_reversed", 0) for t in self.stripe.objects("transfer"))
        if sent > moved or moved > taken:
            found.append(f"{sent} paid out by our books, {moved} transferred at Stripe, {taken} collected")
        return found


def _ledger() -> list[str]:
    sums = rows(
        "SELECT a.currency, sum(p.amount_minor) AS total FROM billing_posting p JOIN billing_ledgeraccount a ON a.id = p.account_id"
        " GROUP BY 1 HAVING sum(p.amount_minor) <> 0"
    )
    owed = rows(
        "SELECT a.organization_id, sum(p.amount_minor) AS n, (SELECT coalesce(sum(l.operator_minor), 0) FROM billing_invoiceline l"
        "  JOIN billing_invoice i ON i.id = l.invoice_id LEFT JOIN billing_payoutline b ON b.invoice_line_id = l.id"
        "  LEFT JOIN billing_payout o ON o.id = b.payout_id WHERE l.operator_id = a.organization_id AND i.state = 'paid'"
        "  AND (o.id IS NULL OR o.state <> 'sent')) AS due FROM billing_posting p"
        " JOIN billing_ledgeraccount a ON a.id = p.account_id WHERE a.code = 'operator_payable' GROUP BY 1"
    )
    return [
        *(f"the ledger sums to {s['total']} {s['currency']}" for s in sums),
        *(
            f"operator {o['organization_id']} is owed {-o['n']} by the ledger, {o['due']} by its lines"
            for o in owed
            if -o["n"] != o["due"]
        ),
    ]


def _lines() -> list[str]:
    """Quantity times price, rounded once; the shares are the line; the lines are the total."""
    found = []
    totals: dict[int, int] = defaultdict(int)
    for line in rows(
        "SELECT l.*, i.total_minor, i.number FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
    ):
        totals[line["invoice_id"]] += line["amount_minor"]
        if line["kind"] in {"upfront", "drawdown", "resale"}:  # sums of what other lines say
            continue
        exact = Fraction(line["quantity"] * line["price_millionths"], 1000 * 3600 * 10_000)
        cents = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
        if cents != line["amount_minor"]:
            found.append(
                f"line {line['id']} of invoice {line['number']}: {float(exact)} cents are billed as {line['amount_minor']}"
            )
        if line["operator_minor"] + line["platform_minor"] + line["seller_minor"] != line["amount_minor"]:
            found.append(f"line {line['id']} of invoice {line['number']}: the shares are not the line")
    return found + [
        f"invoice {invoice['number']}: its lines come to {totals[invoice['id']]}, its total is {invoice['total_minor']}"
        for invoice in rows("SELECT id, number, total_minor FROM billing_invoice")
        if totals[invoice["id"]] != invoice["total_minor"]
    ]


def _invoiced(*, last: bool) -> list[str]:
    """By use: no contract's lines bill more than was recorded, and at the end no less."""
    contracts = rows(
        "SELECT c.id, (SELECT coalesce(sum(u.quantity - u.previous), 0) FROM billing_usagerecord u WHERE u.contract_id = c.id) AS used,"
        " (SELECT coalesce(sum(l.quantity), 0) FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
        f"  WHERE l.contract_id = c.id AND i.state <> 'void' AND l.kind IN {SOLD}) AS sold"
        " FROM marketplace_contract c WHERE c.kind IN ('on_demand', 'spot')"
    )
    return [
        f"contract {ids.encode('ctr', c['id'])} used {c['used']} milli-GPU-seconds, its invoices bill {c['sold']}"
        for c in contracts
        if c["sold"] > c["used"] or (last and c["sold"] != c["used"])
    ]


def _prepaid(*, last: bool) -> list[str]:
    """What was paid at signing is drawn down, never below nothing, and at the end nothing of what is over is left."""
    return [
        f"contract {ids.encode('ctr', c['id'])} ({c['state']}) has {c['n']} cents of what was paid at signing left"
        for c in rows(
            "SELECT c.id, c.state, a.billed_through >= least(c.ends_at, c.ended_at) AS over, sum(l.amount_minor) AS n"
            " FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id JOIN marketplace_contract c ON c.id = l.contract_id"
            " JOIN billing_billingaccount a ON a.organization_id = c.organization_id"
            " WHERE (l.kind = 'upfront' AND i.state = 'paid') OR (l.kind = 'drawdown' AND i.state <> 'void') GROUP BY 1, 2, 3"
        )
        if c["n"] < 0 or (last and c["n"] > 0 and c["over"] and c["state"] in {"ended", "terminated"})
    ]


def _spot() -> list[str]:
    """Never under its floor, in no interval and on no line."""
    low = rows(
        "SELECT s.id, s.price, s.floor, l.spot_floor FROM marketplace_spotinterval s JOIN marketplace_listing l ON l.id = s.listing_id"
        " WHERE s.price < l.spot_floor OR (s.price < s.floor AND NOT s.carried)"
    )
    cheap = rows(
        "SELECT l.id, l.price_millionths, g.spot_floor FROM billing_invoiceline l JOIN marketplace_contract c ON c.id = l.contract_id"
        " JOIN marketplace_listing g ON g.id = c.listing_id WHERE c.kind = 'spot' AND l.price_millionths < g.spot_floor"
    )
    return [
        *(f"spot interval {r['id']} costs {r['price']}, its floor is {max(r['floor'], r['spot_floor'])}" for r in low),
        *(f"line {r['id']} bills spot at {r['price_millionths']}, under the floor of {r['spot_floor']}" for r in cheap),
    ]
