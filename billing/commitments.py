"""What reserved and flexible contracts owe for holding their GPUs, at their versions of prices, and what was paid for that at signing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from django.db import connection

from billing.core import metering, rating
from billing.core.metering import Interval
from billing.core.rating import LineKind
from billing.models import InvoiceLine, PriceVersion
from marketplace.models import Contract
from marketplace.services import commitments
from marketplace.services.commitments import Held

NAMED = 3  # calls of the grid on a line


def prepaid(contracts: Iterable[Contract]) -> dict[int, int]:
    """What was paid at signing and is not drawn down yet, minor units by contract; nothing of what is still to be collected."""
    asked = [contract.pk for contract in contracts if contract.upfront_minor]
    if not asked:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT l.contract_id, SUM(l.amount_minor) FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
            " WHERE l.contract_id = ANY(%s) AND l.kind = ANY(%s) AND (i.state IN ('open', 'paid', 'uncollectible')"
            " AND (l.kind <> 'upfront' OR i.state = 'paid' OR i.due_minor = 0)) GROUP BY 1 HAVING SUM(l.amount_minor) > 0",
            [asked, list(InvoiceLine.HELD)],
        )
        return {contract: int(amount) for contract, amount in cursor.fetchall()}


def lines(
    contract: Contract,
    window: Interval,
    billed: Mapping[tuple[int, int, str, int], int],
    versions: Sequence[PriceVersion],
    held: Held,
    currency: str,
    *,
    used: int,
    withheld: Sequence[rating.Missed] = (),
) -> tuple[tuple[rating.Line, ...], str]:
    """The commitment, overage and credit of `window`, inside one month, and what the commitment leaves out and why, in words;
    `used`: milli-GPU-seconds of that month to the window's end.

    `withheld`: of its GPUs' power. `billed`: quantities on earlier invoices by (contract, month, kind, price version).
    """
    month = rating.month_of(window.start)
    later = {v.valid_from_s: v for v in versions if v.kind == PriceVersion.Kind.ADDED}
    commitment = commitments.commitment(
        contract, month, held,
        rate=_priced(next(v for v in versions if v.kind == PriceVersion.Kind.RATE)),
        overage=_priced(next(v for v in versions if v.kind == PriceVersion.Kind.OVERAGE)),
        added=lambda row: _priced(later[metering.floor_second(row.effective_at)]),
        withheld=withheld,
    )  # fmt: skip

    def earlier(price: rating.Price, kind: LineKind) -> int:
        return billed.get((contract.pk, month.start, kind.value, price.version), 0)

    prices = [_priced(v) for v in versions if v.kind in {PriceVersion.Kind.RATE, PriceVersion.Kind.ADDED}]
    found = rating.rate_commitment(
        commitment,
        window,
        currency,
        used=used,
        billed={
            commitment.overage: earlier(commitment.overage, LineKind.OVERAGE),
            **{price: earlier(price, LineKind.COMMITMENT) for price in prices},
        },
        credited={price: earlier(price, LineKind.CREDIT) for price in prices},
        held_lower={price: earlier(price, LineKind.HELD_LOWER) for price in prices},
    )
    return found, _gave_way(held, commitment, window)


def _priced(version: PriceVersion) -> rating.Price:
    return rating.Price(version.pk, version.millionths)


def _gave_way(held: Held, commitment: rating.Commitment, window: Interval) -> str:
    """`, less 20.000 for the grid: cur_...`: what the window's calls took off the commitment. Empty where they took nothing."""
    free = rating.committed_quantity(replace(commitment, curtailed=()), window) - rating.committed_quantity(
        commitment, window
    )
    if not free:
        return ""
    start, end = metering.instant(window.start), metering.instant(window.end)
    calls = (call.public_id for call in held.calls if call.starts_at < end and call.ends_at > start)
    return f", less {free / 3_600_000:,.3f} for the grid: {named(calls)}"


def named(calls: Iterable[str]) -> str:
    """`cur_..., cur_... and 2 more`: calls of the grid on a line."""
    names = list(calls)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
