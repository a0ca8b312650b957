"""GPUs that calls of the grid hold lower: that a row says so wherever it is so, and what each row gives back of each contract's price.

In our own words: nothing of billing is called. The records of use cut with the rows of their hosts are PostgreSQL's to find; a contract
that holds GPUs is a stack of them, the dearest at the bottom: what could not be had takes the first, what ran on less power the next.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import Any

from benchmarks.auditor import rows
from marketplace import ids
from sandbox.market.held import Owes, Span, months, owing
from sandbox.market.promises import Promises
from sandbox.market.site import Facility

CREDITED = "GPUs held lower: lines of invoices that credit it"
HOURS = "GPUs held lower: GPU-hours credited"
Key = tuple[int, int, int]  # contract, first second of the month, price

# Each record's last word as the last close knew it, while its GPUs were held lower: from when, until when, and to how much.
_CUT = """
SELECT u.contract_id, c.kind, v.millionths AS price, u.rate, h.gpu_w, h.full_w,
  greatest(u.start_s, floor(extract(epoch FROM h.starts_at)))::bigint AS begin_s,
  least(u.start_s + u.quantity / u.rate, floor(extract(epoch FROM h.ends_at)),
    extract(epoch FROM a.billed_through))::bigint AS over_s
FROM (
  SELECT DISTINCT ON (r.placement_id, r.start_s) r.* FROM billing_usagerecord r
  JOIN billing_billingaccount o ON o.organization_id = r.organization_id
  WHERE r.meter = 1 AND r.received_at <= o.usage_cutoff AND r.placement_id IN (
    SELECT p.id FROM marketplace_placement p WHERE p.host_id IN (SELECT host_id FROM marketplace_heldlower)
  ) ORDER BY r.placement_id, r.start_s, r.revision DESC
) u
JOIN billing_billingaccount a ON a.organization_id = u.organization_id AND a.state = 'open'
JOIN marketplace_placement p ON p.id = u.placement_id JOIN marketplace_heldlower h ON h.host_id = p.host_id
JOIN marketplace_contract c ON c.id = u.contract_id JOIN billing_priceversion v ON v.id = u.price_version_id
ORDER BY u.contract_id, begin_s, u.placement_id
"""
_LINES = """
SELECT l.*, i.number, v.millionths FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id
JOIN billing_billingaccount a ON a.id = i.account_id AND a.state = 'open' JOIN billing_priceversion v ON v.id = l.price_version_id
WHERE i.state <> 'void' AND l.kind = 'held_lower' ORDER BY l.id
"""


class HeldLower:
    """`promises` counts the lines, and what they give back."""

    def __init__(self, promises: Promises) -> None:
        self.promises = promises

    def look(self, sites: Iterable[Facility]) -> list[str]:
        """Work that runs on less than its GPUs' power, by the machines themselves, is on a row that still stands."""
        standing = {
            (h["site_id"], h["name"])
            for h in rows(
                "SELECT m.site_id, m.name FROM marketplace_heldlower h JOIN marketplace_host m ON m.id = h.host_id"
                " WHERE h.ends_at IS NULL"
            )
        }
        found = []
        for site in sites:
            for work in site.work.values():
                machine = site.machines[work.host]
                lowest = min((machine.limits[i] for i in work.gpus), default=machine.max_w)
                if work.state == "running" and machine.cap_control and lowest < machine.max_w:
                    self.promises.tally["GPUs held lower: seen at a site, and a row says so"]["kept"] += 1
                    if (site.pk, machine.name) not in standing:
                        found.append(
                            f"placement {ids.encode('plc', work.pk)} runs on {machine.name} at {lowest} of {machine.max_w} W a GPU;"
                            " no row says that a call holds it lower"
                        )
        return found

    def books(self) -> list[str]:
        """Each contract is credited, month by month and price by price, what its rows come to, and nothing else."""
        due = self._due()
        lines: dict[Key, list[dict[str, Any]]] = defaultdict(list)
        for line in rows(_LINES):
            lines[line["contract_id"], line["month_s"], line["price_millionths"]].append(line)
        found = []
        for key in sorted({*due, *lines}):
            contract, month, price = key
            given, mine = -sum(line["quantity"] for line in lines[key]), due.get(key, 0)
            name = ids.encode("ctr", contract)
            if given != mine:
                found.append(
                    f"contract {name} is credited {given} milli-GPU-seconds at {price} in the month from {month} for GPUs held lower,"
                    f" by the watts they had {mine}" + (": no line says so" if mine and not lines[key] else "")
                )
            for line in lines[key]:
                cents = _cents(line["quantity"], line["millionths"])
                if (price, cents) != (line["millionths"], line["amount_minor"]):
                    found.append(
                        f"line {line['id']} of invoice {line['number']} credits {line['amount_minor']} cents at {price} for GPUs"
                        f" held lower; {line['quantity']} milli-GPU-seconds at {line['millionths']} are {cents}"
                    )
        self.promises.tally[CREDITED]["kept"] = sum(map(len, lines.values()))
        for contract in {contract for contract, _, _ in due}:
            quantity = sum(n for key, n in due.items() if key[0] == contract)
            self.promises.tally[HOURS][ids.encode("ctr", contract)] = quantity // 3_600_000
        return found

    def _due(self) -> dict[Key, int]:
        """Milli-GPU-seconds: by use as each second was priced, of commitments from the dearest GPUs down."""
        due: dict[Key, int] = defaultdict(int)
        held: dict[int, list[tuple[int, Span]]] = defaultdict(list)
        for cut in rows(_CUT):
            span = (cut["begin_s"], cut["over_s"])
            if span[0] >= span[1]:
                continue
            milli = _withheld(cut["rate"], cut["gpu_w"], cut["full_w"])
            if cut["kind"] in {"reserved", "flexible"}:
                held[cut["contract_id"]].append((milli, span))
                continue
            for month in months(*span):
                seconds = min(span[1], month[1]) - max(span[0], month[0])
                due[cut["contract_id"], month[0], cut["price"]] += milli * seconds
        if held:
            for owes in owing():
                for (first_s, price), quantity in _of_commitment(owes, held[owes.c["id"]]).items():
                    due[owes.c["id"], first_s, price] += quantity
        return {key: quantity for key, quantity in due.items() if quantity}


def _of_commitment(owes: Owes, spells: list[tuple[int, Span]]) -> dict[tuple[int, int], int]:
    """By month and price, up to the account's edge."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    free = owes.free()
    spans = [*(s for _, s in spells), *((a, b) for _, a, b in (*free, *owes.parts)), *owes.calls]
    marks = {t for span in spans for t in span} | {owes.through}
    for _, span in spells:
        marks |= {t for month in months(*span) for t in month}
    for a, b in pairwise(sorted(marks)):
        less = sum(milli for milli, (s, e) in spells if s <= a < e)
        if not less or b > owes.through or any(s <= a < e for s, e in owes.calls):
            continue
        from_ = sum(1000 * gpus for gpus, s, e in free if s <= a < e)
        low = 0
        for price, gpus in sorted(
            ((price, gpus) for (gpus, s, e), price in zip(owes.parts, owes.prices, strict=True) if s <= a < e),
            reverse=True,
        ):
            high = low + 1000 * gpus
            taken = max(0, min(high, from_ + less) - max(low, from_))
            found[months(a, b)[0][0], price] += taken * (b - a)
            low = high
    return found


def _withheld(milli: int, gpu_w: int, full_w: int) -> int:
    """Of so many milli-GPUs, those that the watts they do not have stand for: by thousandths of a GPU's power, each begun one whole."""
    thousandths = math.ceil(Fraction(1000 * (full_w - gpu_w), full_w))
    return math.ceil(Fraction(milli * thousandths, 1000))


def _cents(quantity: int, price: int) -> int:
    """What milli-GPU-seconds at a price in millionths of a dollar an hour come to, rounded once, halves away from zero."""
    exact = Fraction(quantity * price, 1000 * 3600 * 10_000)
    return int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
