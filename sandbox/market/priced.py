"""What was asked for and what is paid: who reserves has the cheapest price that his offer asked then of whoever stays so long, pays so
much at signing and bears so much curtailment; he pays that share at signing, no more and no less, and gives way for no more hours.

In our own words and SQL: what an offer asked at a version is its row of today with each later change taken back, as the trail says.
"""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, NamedTuple

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.promises import Promises

Row = dict[str, Any]
TOO_LITTLE_MINOR = 50  # cents: what a card is not charged for
ASKED = ("reserved_price", "flexible_price", "upfront_permille", "flexible_hours_per_month", "price_tiers")
HELD = "('reserved', 'flexible')"
RULE = "price by term, share at signing and curtailment"


class Offer(NamedTuple):
    """Millionths per GPU-hour, and what it asks: hours of the window, permille at signing, hours a month of curtailment."""

    price: int
    upfront: int
    borne: int
    hours: int


class Priced:
    def __init__(self, promises: Promises) -> None:
        self.promises = promises
        self.contracts = self.amendments = 0  # the newest that was looked at

    def look(self) -> list[str]:
        return [*self._signed(), *self._added()]

    def books(self) -> list[str]:
        return [*_at_signing(), *self._given_way()]

    # --- the price
    def _signed(self) -> list[str]:
        found = []
        for c in rows(
            "SELECT c.*, q.starts_at AS asked_from, q.ends_at AS asked_to, q.upfront_max_permille, q.flexible_hours_max"
            " FROM marketplace_contract c JOIN marketplace_quote q ON q.id = c.quote_id JOIN marketplace_listing l ON l.id = q.listing_id"
            f" WHERE c.kind IN {HELD} AND NOT l.is_resale AND c.id > {self.contracts} ORDER BY c.id"
        ):
            self.contracts = c["id"]
            name, terms = ids.encode("ctr", c["id"]), json.loads(c["terms"])
            (shelf,) = _shelves(c["listing_id"], version=c["listing_version"])
            best = _best(
                shelf, c["kind"], c["asked_from"], c["asked_to"], c["upfront_max_permille"], c["flexible_hours_max"]
            )
            signed = (c["price"], terms["upfront_permille"], c["flexible_hours_per_month"])
            fair = signed in {(offer.price, offer.upfront, offer.borne) for offer in best}
            self.promises.count(RULE, "kept" if fair else "broken")
            if fair and min(best).price != shelf[f"{c['kind']}_price"]:
                self.promises.count(RULE, "kept: by another price than the plain one")
            if not fair:
                found.append(
                    f"contract {name} is {c['kind']} for {signed[0]}, {signed[1]} permille at signing, {signed[2]} hours borne;"
                    f" version {c['listing_version']} of its offer asked {best or 'for more than its buyer would bear'}"
                )
            total = _minor(terms["gpu_count"], terms["starts_at"], terms["ends_at"], c["price"])
            due = _rounded(Fraction(total * terms["upfront_permille"], 1000))
            due = due if due >= TOO_LITTLE_MINOR else 0
            if c["upfront_minor"] != due:
                found.append(
                    f"contract {name} has {c['upfront_minor']} cents due at signing;"
                    f" {terms['upfront_permille']} permille of {total} are {due}"
                )
        return found

    def _added(self) -> list[str]:
        """More GPUs cost what the offer asks then for what is left, of who bears what he bears and pays nothing more at signing."""
        found = []
        for a in rows(
            "SELECT a.*, c.kind AS contract_kind, c.flexible_hours_per_month AS borne, c.listing_id FROM marketplace_amendment a"
            f" JOIN marketplace_contract c ON c.id = a.contract_id WHERE a.kind = 'resize' AND a.id > {self.amendments} ORDER BY a.id"
        ):
            self.amendments = a["id"]
            bears = a["borne"] if a["contract_kind"] == "flexible" else None
            asked = [  # of an offer that changes in that second, before or after
                offer.price
                for shelf in _shelves(a["listing_id"], at=a["created_at"])
                for offer in _best(shelf, a["contract_kind"], a["effective_at"], a["old_ends_at"], None, bears)
            ]
            self.promises.count("price of GPUs that join", "kept" if a["price"] in asked else "broken")
            if a["price"] not in asked:
                found.append(
                    f"amendment {ids.encode('amd', a['id'])} adds GPUs at {a['price']}, its offer asked {asked} then"
                )
        return found

    # --- the hours
    def _given_way(self) -> list[str]:
        """What a flexible contract left for in a UTC month took no more hours of it than it bears."""
        found = []
        spans: dict[tuple[int, datetime], set[tuple[datetime, datetime]]] = defaultdict(set)
        bears: dict[int, int] = {}
        for e in rows(
            "SELECT p.contract_id, c.flexible_hours_per_month, e.reason, min(e.at) AS at FROM marketplace_placementevent e"
            " JOIN marketplace_placement p ON p.id = e.placement_id JOIN marketplace_contract c ON c.id = p.contract_id"
            " WHERE c.kind = 'flexible' AND e.to_state = 'draining' AND e.reason LIKE 'curtailment %' GROUP BY 1, 2, 3"
        ):
            bears[e["contract_id"]] = e["flexible_hours_per_month"]
            month = e["at"].replace(day=1, hour=0, minute=0, second=0, microsecond=0)
            after = (month + timedelta(days=31)).replace(day=1)
            (call,) = rows(
                f"SELECT * FROM marketplace_curtailment WHERE id = {ids.decode('cur', e['reason'].split()[1])}"
            )
            end = min(t for t in (call["ends_at"], call["ended_at"], after) if t is not None)
            spans[e["contract_id"], month].add((max(month, call["starts_at"]), end))
        for (contract, month), calls in spans.items():
            taken, upto = timedelta(), month
            for begin, end in sorted(calls):
                taken += max(timedelta(), end - max(begin, upto))
                upto = max(upto, end)
            if taken > timedelta(hours=bears[contract]):
                found.append(
                    f"contract {ids.encode('ctr', contract)} bears {bears[contract]} hours of curtailment a month;"
                    f" what it left for in {month:%B} took {taken}"
                )
        return found


# --- what an offer asked
def _shelves(listing: int, *, version: int | None = None, at: datetime | None = None) -> list[Row]:
    """The offer as it was at that version, or at each moment of that second."""
    (row,) = rows(f"SELECT version, {', '.join(ASKED)} FROM marketplace_listing WHERE id = {listing}")
    row["price_tiers"] = json.loads(row["price_tiers"])
    trail = rows(
        f"SELECT at, before FROM marketplace_auditevent WHERE subject = '{ids.encode('lst', listing)}' AND before IS NOT NULL"
        " ORDER BY id DESC"
    )
    found = []
    for change in [*trail, None]:
        if version is None or row["version"] == version:
            found.append(row)
        if change is None or (at is not None and change["at"] < at):
            break
        if at is not None and change["at"] > at:
            found.clear()
        before = json.loads(change["before"])
        row = {**row, **{name: before[name] for name in ASKED if name in before}, "version": row["version"] - 1}
    return found


def _best(shelf: Row, kind: str, begin: datetime, end: datetime, upfront: int | None, borne: int | None) -> list[Offer]:
    """The cheapest, all of them, that ask no more than this; who says nothing of the two is asked for what the plain price asks."""
    plain = Offer(shelf[f"{kind}_price"], shelf["upfront_permille"], shelf["flexible_hours_per_month"], 0)
    offers = [plain] + [
        Offer(t["price"], t["upfront_permille"], t["flexible_hours_per_month"], t["min_term_hours"])
        for t in shelf["price_tiers"]
        if t["kind"] == kind
    ]
    if kind == "reserved":
        offers = [offer._replace(borne=0) for offer in offers]
    hours = (end - begin.replace(second=0, microsecond=0)) // timedelta(hours=1)  # the minute in which it begins counts
    may = [
        offer
        for offer in offers
        if offer.hours <= hours
        and offer.upfront <= (plain.upfront if upfront is None else upfront)
        and (kind == "reserved" or offer.borne <= (plain.borne if borne is None else borne))
    ]
    least = min((offer.price for offer in may), default=0)
    return [offer for offer in may if offer.price == least]


# --- what is due at signing
def _at_signing() -> list[str]:
    """What is in force was paid for by one invoice of what was due; where nothing was due there is none."""
    return [
        f"contract {ids.encode('ctr', c['id'])} ({c['state']}) has {c['upfront_minor']} cents due at signing; paid for it: {c['paid']}"
        for c in rows(
            "SELECT c.id, c.state, c.upfront_minor,"
            " coalesce(sum(l.amount_minor) FILTER (WHERE i.state = 'paid' OR i.due_minor = 0), 0) AS paid"
            " FROM marketplace_contract c LEFT JOIN billing_invoiceline l ON l.contract_id = c.id AND l.kind = 'upfront'"
            " LEFT JOIN billing_invoice i ON i.id = l.invoice_id AND i.state <> 'void'"
            f" WHERE c.kind IN {HELD} AND c.state NOT IN ('pending_payment', 'cancelled') GROUP BY c.id"
        )
        if c["paid"] != c["upfront_minor"]
    ]


def _minor(gpus: int, begin: str, end: str, price: int) -> int:
    """Cents of a commitment."""
    seconds = int(datetime.fromisoformat(end).timestamp()) - int(datetime.fromisoformat(begin).timestamp())
    return _rounded(Fraction(gpus * seconds * price, 3600 * 10_000))


def _rounded(exact: Fraction) -> int:
    """Half away from zero, of what is not negative."""
    return int(exact + Fraction(1, 2))
