"""What reserved and flexible contracts hold and owe by the second, as rows say it: what joined, what was sold on, what calls of the grid
took, what could not be had. Billing rates it at versions of prices; the P&L of a site counts it by the clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from billing.core import metering, rating
from billing.core.metering import Interval
from marketplace.models import Amendment, Contract, Curtailment, Fill, PlacementEvent, Shortfall
from marketplace.services.availability import HOLDING
from marketplace.services.sheds import REASON

NOT_IN_FORCE = (Contract.State.PENDING_PAYMENT, Contract.State.CANCELLED)
_TOOK = ("active", "restoring", "completed", "failed")  # states of a call that may have taken work


@dataclass(frozen=True, slots=True)
class Held:
    """Of one contract: GPUs that `joined` later, what was `sold` on, what it `missed`, and `calls` of the grid that took work of it."""

    joined: Sequence[Amendment] = ()
    sold: Sequence[Fill] = ()
    missed: Sequence[Shortfall] = ()
    calls: Sequence[Curtailment] = ()


def held(contracts: Iterable[Contract], start: datetime, end: datetime) -> dict[int, Held]:
    """By contract, of those that hold capacity: all of it, and the calls that touch `[start, end)`. Five queries."""
    rows = [contract for contract in contracts if contract.kind in HOLDING]
    pks = [contract.pk for contract in rows]
    joined: dict[int, list[Amendment]] = defaultdict(list)
    resizes = Amendment.objects.filter(contract__in=pks, kind=Amendment.Kind.RESIZE, state="accepted")
    for amendment in resizes.order_by("effective_at", "pk"):
        joined[amendment.contract_id].append(amendment)
    sold: dict[int, list[Fill]] = defaultdict(list)
    fills = Fill.objects.filter(resale__contract__in=pks, undone_at=None).select_related("resale")
    for fill in fills.order_by("starts_at", "pk"):
        assert fill.resale is not None
        sold[fill.resale.contract_id].append(fill)
    missed: dict[int, list[Shortfall]] = defaultdict(list)
    shortfalls = Shortfall.objects.filter(contract__in=pks).select_related("maintenance")
    for shortfall in shortfalls.order_by("starts_at", "pk"):
        missed[shortfall.contract_id].append(shortfall)
    calls = _calls(rows, start, end)
    return {pk: Held(joined[pk], sold[pk], missed[pk], calls[pk]) for pk in pks}


def bought(contracts: Iterable[Contract]) -> dict[int, Fill]:
    """The sale behind each contract that came of a resale."""
    rows = Fill.objects.filter(contract__in=[c.pk for c in contracts], resale__isnull=False)
    return {row.contract_id: row for row in rows.select_related("resale__contract")}


def gives_way(contract: Contract) -> bool:
    """May calls of the grid take jobs of it?"""
    return contract.kind == "flexible" or contract.emergency_notice_s is not None


def _calls(contracts: Iterable[Contract], start: datetime, end: datetime) -> dict[int, list[Curtailment]]:
    """By contract, the calls that drained one of its placements, the earliest first. Another call of the same hours took nothing
    from it (ADR 21).
    """
    found: dict[int, list[Curtailment]] = defaultdict(list)
    sites = {contract.pk: contract.site_id for contract in contracts if gives_way(contract)}
    touching = Curtailment.objects.filter(site__in=set(sites.values()), starts_at__lt=end, ends_at__gt=start)
    calls = {
        REASON + call.public_id: call for call in touching.filter(state__in=_TOOK).order_by("starts_at", "pk")
    } if sites else {}  # fmt: skip
    if not calls:
        return found
    drained = PlacementEvent.objects.filter(
        to_state="draining", reason__in=list(calls), placement__contract__in=list(sites)
    )
    took: dict[str, list[int]] = defaultdict(list)
    for contract, reason in drained.order_by().values_list("placement__contract_id", "reason").distinct():
        took[reason].append(contract)
    for reason, call in calls.items():
        for contract in took[reason]:
            found[contract].append(call)
    return found


def commitment(
    contract: Contract,
    month: Interval,
    held: Held,
    *,
    rate: rating.Price,
    overage: rating.Price,
    added: Callable[[Amendment], rating.Price],
    withheld: Sequence[rating.Missed] = (),
) -> rating.Commitment:
    """What the contract holds in a month, at these prices: of its first GPUs, beyond the reservation, and of GPUs that joined.
    `withheld`: of its GPUs' power.
    """
    end = term_end(contract, month.end)

    def term(begins: datetime) -> Interval:
        start = metering.floor_second(begins)
        return Interval(start, max(start, end))

    return rating.Commitment(
        contract=contract.pk,
        meter="gpu",
        milli_gpus=(contract.gpu_count - sum(row.added_gpus for row in held.joined)) * 1000,
        term=term(contract.starts_at),
        price=rate,
        overage=overage,
        curtailed=metering.clip([metering.interval(call.starts_at, call.over_at) for call in held.calls], month),
        sold=tuple(
            rating.Added(row.gpu_count * 1000, metering.interval(row.starts_at, owed_until(contract, row)), rate)
            for row in held.sold
            if row.starts_at < owed_until(contract, row)
        ),
        added=tuple(rating.Added(row.added_gpus * 1000, term(row.effective_at), added(row)) for row in held.joined),
        missed=not_charged(contract, held.missed, month),
        withheld=tuple(withheld),
    )


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


def owed_until(seller: Contract, sold: Fill) -> datetime:
    """Until when its seller owes for what he sold: its window, but no longer than his contract where he was ended for not paying."""
    if seller.state == Contract.State.DEFAULTED and seller.ends_at is not None:
        return min(sold.ends_at, seller.ends_at)
    return sold.ends_at


def term_end(contract: Contract, otherwise: int) -> int:
    """The second in which a commitment ends: agreed, or by its rule; a defaulted one is due to there though it is gone before."""
    ends = [contract.ends_at] if contract.state == Contract.State.DEFAULTED else [contract.ends_at, contract.ended_at]
    known = [metering.floor_second(moment) for moment in ends if moment is not None]
    return min(known, default=otherwise)
