"""What reserved and flexible contracts owe for holding their GPUs, and what was paid for that at signing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from django.db import connection

from billing.core import metering, rating
from billing.core.metering import Interval
from billing.core.rating import LineKind
from billing.models import InvoiceLine, PriceVersion
from marketplace.models import Amendment, Contract, Curtailment, Fill, Shortfall
from marketplace.services import sheds

HELD_KINDS = ("reserved", "flexible")
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


def joined(contracts: Iterable[Contract]) -> dict[int, list[Amendment]]:
    """GPUs that joined commitments later, per contract."""
    found: dict[int, list[Amendment]] = defaultdict(list)
    held = [contract.pk for contract in contracts if contract.kind in HELD_KINDS]
    rows = Amendment.objects.filter(contract__in=held, kind=Amendment.Kind.RESIZE, state="accepted")
    for row in rows.order_by("effective_at", "pk"):
        found[row.contract_id].append(row)
    return found


def shortfalls(contracts: Iterable[Contract]) -> dict[int, list[Shortfall]]:
    """What could not be had of commitments, per contract."""
    found: dict[int, list[Shortfall]] = defaultdict(list)
    held = [contract.pk for contract in contracts if contract.kind in HELD_KINDS]
    rows = Shortfall.objects.filter(contract__in=held).select_related("maintenance")
    for row in rows.order_by("starts_at", "pk"):
        found[row.contract_id].append(row)
    return found


def not_charged(contract: Contract, rows: Iterable[Shortfall], month: Interval) -> tuple[rating.Missed, ...]:
    """What of the shortfalls in a month the contract does not owe: all without due notice, which a host that failed never gives, and
    what goes beyond the hours a month that its frozen terms bear (services.terms).
    """
    agreed = contract.terms.get("maintenance") or {}
    noticed: list[tuple[Interval, int]] = []
    free: list[rating.Missed] = []
    for row in rows:
        noticed_until = row.maintenance.noticed_until if row.maintenance else None
        through = min(noticed_until or row.starts_at, row.ends_at)
        for start, end, told in ((row.starts_at, through, True), (max(row.starts_at, through), row.ends_at, False)):
            for span in metering.clip((metering.interval(start, end),) if start < end else (), month):
                if told:
                    noticed.append((span, row.gpus * 1000))
                else:
                    free.append(rating.Missed(row.gpus * 1000, span))
    over = rating.beyond((span for span, _ in noticed), 3600 * agreed.get("hours_per_month", 0))
    free += [rating.Missed(milli, piece) for span, milli in noticed for piece in metering.clip(over, span)]
    return tuple(free)


def _commitment(
    contract: Contract, month: Interval, versions: Sequence[PriceVersion], joined: Sequence[Amendment],
    missed: Sequence[Shortfall], sold: Sequence[Fill],
    withheld: Sequence[rating.Missed],
) -> rating.Commitment:  # fmt: skip
    """What the contract holds in a month, as it is priced."""
    rate = next(v for v in versions if v.kind == PriceVersion.Kind.RATE)
    overage = next(v for v in versions if v.kind == PriceVersion.Kind.OVERAGE)
    later = {v.valid_from_s: v for v in versions if v.kind == PriceVersion.Kind.ADDED}
    end = term_end(contract, month.end)

    def term(begins: datetime) -> Interval:
        start = metering.floor_second(begins)
        return Interval(start, max(start, end))

    return rating.Commitment(
        contract=contract.pk,
        meter="gpu",
        milli_gpus=(contract.gpu_count - sum(row.added_gpus for row in joined)) * 1000,
        term=term(contract.starts_at),
        price=_priced(rate),
        overage=_priced(overage),
        curtailed=curtailed(contract, month),
        sold=tuple(
            rating.Added(
                row.gpu_count * 1000, metering.interval(row.starts_at, _sold_until(contract, row)), _priced(rate)
            )
            for row in sold
            if row.starts_at < _sold_until(contract, row)
        ),
        added=tuple(
            rating.Added(
                row.added_gpus * 1000, term(row.effective_at), _priced(later[metering.floor_second(row.effective_at)])
            )
            for row in joined
        ),
        missed=not_charged(contract, missed, month),
        withheld=tuple(withheld),
    )


def lines(
    contract: Contract,
    window: Interval,
    billed: Mapping[tuple[int, int, str, int], int],
    versions: Sequence[PriceVersion],
    joined: Sequence[Amendment],
    missed: Sequence[Shortfall],
    currency: str,
    *,
    used: int,
    sold: Sequence[Fill] = (),
    withheld: Sequence[rating.Missed] = (),
) -> tuple[tuple[rating.Line, ...], str]:
    """The commitment, overage and credit of `window`, inside one month, and what the commitment leaves out and why, in words;
    `used`: milli-GPU-seconds of that month to the window's end.

    `sold`: what was sold on of it; `withheld`: of its GPUs' power. `billed`: quantities on earlier invoices by (contract, month, kind,
    price version).
    """
    month = rating.month_of(window.start)
    commitment = _commitment(contract, month, versions, joined, missed, sold, withheld)

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
    return found, _gave_way(contract, commitment, window)


def _priced(version: PriceVersion) -> rating.Price:
    return rating.Price(version.pk, version.millionths)


def _gave_way(contract: Contract, commitment: rating.Commitment, window: Interval) -> str:
    """`, less 20.000 for the grid: cur_...`: what the window's calls took off the commitment. Empty where they took nothing."""
    free = rating.committed_quantity(replace(commitment, curtailed=()), window) - rating.committed_quantity(
        commitment, window
    )
    if not free:
        return ""
    return f", less {free / 3_600_000:,.3f} for the grid: {named(call.public_id for call in _calls(contract, window))}"


def named(calls: Iterable[str]) -> str:
    """`cur_..., cur_... and 2 more`: calls of the grid on a line."""
    names = list(calls)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _sold_until(contract: Contract, sold: Fill) -> datetime:
    """Until when its seller owes for what he sold: its window, but no longer than his contract where he was ended for not paying."""
    if contract.state == Contract.State.DEFAULTED and contract.ends_at is not None:
        return min(sold.ends_at, contract.ends_at)
    return sold.ends_at


def term_end(contract: Contract, otherwise: int) -> int:
    """The second in which a commitment ends: agreed, or by its rule; a defaulted one is due to there though it is gone before."""
    ends = [contract.ends_at] if contract.state == Contract.State.DEFAULTED else [contract.ends_at, contract.ended_at]
    known = [metering.floor_second(moment) for moment in ends if moment is not None]
    return min(known, default=otherwise)


def gives_way(contract: Contract) -> bool:
    """May calls of the grid take jobs of it?"""
    return contract.kind == "flexible" or contract.emergency_notice_s is not None


def curtailed(contract: Contract, window: Interval) -> tuple[Interval, ...]:
    """Seconds in which calls held the contract's jobs back, from their start to their end: those calls that drained one of them.
    Another call of the same hours took nothing from it (ADR 21).
    """
    spans = [metering.interval(call.starts_at, call.over_at) for call in _calls(contract, window)]
    return metering.clip(spans, window)


def _calls(contract: Contract, window: Interval) -> list[Curtailment]:
    """Calls that took work of the contract and touch the window, the earliest first."""
    if not gives_way(contract):
        return []
    calls = Curtailment.objects.filter(
        pk__in=sheds.calls_of(contract),
        state__in=("active", "restoring", "completed", "failed"),
        starts_at__lt=metering.instant(window.end),
        ends_at__gt=metering.instant(window.start),
    )
    return list(calls.order_by("starts_at", "pk"))
