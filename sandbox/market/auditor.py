"""What must hold, looked at after each step: the safety of cells (benchmarks.auditor), states, promises, books."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.auditor import Auditor as Safety
from benchmarks.auditor import rows
from sandbox.market.books import Books
from sandbox.market.clock import Clock
from sandbox.market.customers import Customer
from sandbox.market.faults import Faults
from sandbox.market.house import House
from sandbox.market.maintained import Maintained
from sandbox.market.priced import Priced
from sandbox.market.promises import Promises
from sandbox.market.screened import Screened
from sandbox.market.states import States

if TYPE_CHECKING:
    from sandbox.market.market import Outcome


STRIPE_WAS_TOLD = ("armed on purpose", "failed: Unavailable: ")


class Auditor:
    def __init__(self, clock: Clock, house: House, faults: Faults, customers: Sequence[Customer]) -> None:
        self.clock, self.house, self.customers = clock, house, customers
        self.safety, self.states = Safety(), States()
        self.promises = Promises(faults)
        self.maintained, self.screened = Maintained(self.promises), Screened(self.promises)
        self.priced = Priced(self.promises)
        self.books = Books(house.stripe, self.promises)
        self.samples: list[tuple[int, int, int]] = []  # GPUs that run, are held, are there

    def look(self, *, whole: bool) -> list[str]:
        """What is wrong now. What sites really draw, and promises, each time; all rows when `whole`."""
        now = self.clock.now
        found = [words for site in self.house.sites for words in site.over_cap(now)]
        found += [
            *self.promises.look(now),
            *self.maintained.look(now),
            *self.screened.look(now),
            *self.books.resold.look(now),
            *self.books.eased.look(self.house.sites),
            *self.priced.look(),
        ]
        self._sample()
        if whole:
            found += [*self._safe(), *self.states.look(), *self.books.look(), *self.priced.books()]
        return found

    def _safe(self) -> list[str]:
        """What the fault harness's auditor finds; a message that waits because Stripe was told to answer badly is none of it."""
        return [
            words for words in self.safety.audit(self.clock.now) if not any(said in words for said in STRIPE_WAS_TOLD)
        ]

    def close(self) -> list[str]:
        """When all is over and closed: nothing may be left."""
        parked = rows("SELECT topic, last_error FROM marketplace_outboxmessage WHERE parked_at IS NOT NULL")
        cases = rows("SELECT kind, subject, detail FROM billing_billingcase WHERE closed_at IS NULL")
        return [
            *self.books.look(last=True),
            *self.priced.books(),
            *(f"message {m['topic']} was given up: {m['last_error'][:300]}" for m in parked),
            *(f"billing waits for a person: {c['kind']} {c['subject']}: {c['detail'][:300]}" for c in cases),
        ]

    def _sample(self) -> None:
        (row,) = rows(
            "SELECT (SELECT coalesce(sum(cardinality(gpu_indices) * gpu_milli), 0) FROM marketplace_placement WHERE state = 'running')"
            " / 1000 AS runs, (SELECT coalesce(sum(c.gpu_count), 0) FROM marketplace_contract c WHERE c.state = 'active' AND"
            f" c.kind IN ('reserved', 'flexible') AND c.starts_at <= '{self.clock.now.isoformat()}') AS held,"
            " (SELECT sum(gpu_count) FROM marketplace_host) AS there"
        )
        self.samples.append((int(row["runs"]), int(row["held"]), int(row["there"])))

    def said(self) -> str:
        runs, held, there = self.samples[-1]
        live = rows("SELECT state, count(*) AS n FROM marketplace_contract GROUP BY 1 ORDER BY 1")
        return f"{runs} of {there} GPUs run, {held} reserved; contracts " + ", ".join(
            f"{r['n']} {r['state']}" for r in live
        )

    def fill(self, outcome: Outcome) -> None:
        """The figures of the report."""
        outcome.promises = self.promises.tally
        outcome.counts["moves of states"] = self.states.moves
        n, there = max(1, len(self.samples)), max(1, self.samples[-1][2] if self.samples else 1)
        outcome.occupancy = {
            "running": sum(s[0] for s in self.samples) / n / there, "reserved": sum(s[1] for s in self.samples) / n / there,
        }  # fmt: skip
        for name, sql in FIGURES.items():
            value: Any = rows(sql)[0]["n"]
            outcome.money[name] = int(value or 0)


FIGURES = {
    "invoiced": "SELECT sum(total_minor) AS n FROM billing_invoice WHERE state <> 'void' AND state <> 'draft'",
    "collected": "SELECT sum(due_minor) AS n FROM billing_invoice WHERE state = 'paid'",
    "open": "SELECT sum(due_minor) AS n FROM billing_invoice WHERE state = 'open'",
    "operators' share": "SELECT sum(operator_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
    " WHERE i.state NOT IN ('void', 'draft')",
    "our fee": "SELECT sum(platform_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
    " WHERE i.state NOT IN ('void', 'draft')",
    "credited for maintenance": "SELECT -sum(amount_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
    " WHERE l.kind = 'credit' AND i.state NOT IN ('void', 'draft')",
    "credited for GPUs held lower": "SELECT -sum(amount_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i"
    " ON i.id = l.invoice_id WHERE l.kind = 'held_lower' AND i.state NOT IN ('void', 'draft')",
    "credited to sellers of resales": "SELECT -sum(amount_minor) AS n FROM billing_invoiceline l JOIN billing_invoice i"
    " ON i.id = l.invoice_id WHERE l.kind = 'resale' AND i.state NOT IN ('void', 'draft')",
    "paid out": "SELECT sum(amount_minor) AS n FROM billing_payout WHERE state = 'sent'",
    "hashing, earned (microusd)": "SELECT sum(hashing_microusd) AS n FROM marketplace_siteminute",
}
