"""What a site's GPUs earn their operator, by the clock: running time at its price and commitments by time, less the platform's fee.

Before rating: what the next invoices and payouts will say, known at once. A flow is money at an even rate for a time; its sums over
any cut of that time are exact.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from fractions import Fraction
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet

from marketplace.models import Amendment, Contract, HeldLower, Placement, SpotInterval, SpotResult
from marketplace.models.spot import INTERVAL
from marketplace.services import held_lower

_UNIT = 3600 * 1000 * 1000  # milli-GPU-seconds x millionths an hour x per mille kept


class Flow(NamedTuple):
    """`rate`: milli-GPUs x millionths per GPU-hour x the operator's per mille, by the second from `begins` to `ends`."""

    begins: datetime
    ends: datetime
    rate: int
    currency: str


def earned(flows: Iterable[Flow], start: datetime, end: datetime) -> dict[str, int]:
    """{currency: millionths of its major unit} in `[start, end)`, rounded down once."""
    found: dict[str, Fraction] = defaultdict(Fraction)
    for flow in flows:
        microseconds = (min(flow.ends, end) - max(flow.begins, start)) // _MICROSECOND
        if microseconds > 0:
            found[flow.currency] += Fraction(microseconds * flow.rate, 1_000_000)
    return {currency: int(value / _UNIT) for currency, value in found.items()}


_MICROSECOND = datetime.resolution


def flows(placements: QuerySet[Placement], contracts: QuerySet[Contract], start: datetime, end: datetime) -> list[Flow]:
    """Of these placements and contracts, what flows at some time in `[start, end)`. Whoever asks narrows them to what it may see."""
    return [*_running(placements, start, end), *_committed(contracts, start, end), *_withheld(placements, start, end)]


def _running(placements: QuerySet[Placement], start: datetime, end: datetime) -> list[Flow]:
    ran = list(
        placements.filter(running_at__lt=end, contract__kind__in=("on_demand", "spot"))
        .filter(Q(release_requested_at=None) | Q(release_requested_at__gt=start))
        .filter(Q(finished_at=None) | Q(finished_at__gt=start))
        .select_related("contract")
    )
    spot = [p for p in ran if p.contract.kind == "spot"]
    prices = _spot_prices({p.contract.listing_id for p in spot}, {p.contract_id for p in spot}, start, end)
    found: list[Flow] = []
    for p in ran:
        assert p.running_at is not None
        begins, ends = max(p.running_at, start), min(p.release_requested_at or p.finished_at or end, end)
        kept = p.milli_gpus * (1000 - p.contract.fee_permille)
        pieces: Sequence[tuple[datetime, datetime, int]] = [(begins, ends, p.contract.price)]
        if p.contract.kind == "spot":
            pieces = prices.cut(p.contract, begins, ends)
        found += [Flow(a, b, kept * price, p.contract.currency) for a, b, price in pieces if a < b]
    return found


def _committed(contracts: QuerySet[Contract], start: datetime, end: datetime) -> list[Flow]:
    holding = (
        contracts.filter(kind__in=("reserved", "flexible"), starts_at__lt=end)
        .exclude(state__in=("pending_payment", "cancelled"))
        .filter(Q(ended_at=None) | Q(ended_at__gt=start), Q(ends_at=None) | Q(ends_at__gt=start))
    )
    found = []
    for c in holding:
        ends = min(at for at in (c.ends_at, c.ended_at, end) if at is not None)
        found.append(Flow(c.starts_at, ends, c.gpu_count * 1000 * c.price * (1000 - c.fee_permille), c.currency))
    joined = Amendment.objects.filter(contract__in=holding, kind="resize", state="accepted").select_related("contract")
    for row in joined:  # counted above as if they had been there all along, at the first price
        of = row.contract
        over = min(at for at in (of.ends_at, of.ended_at, end) if at is not None)
        each = row.added_gpus * 1000 * (1000 - of.fee_permille)
        found.append(Flow(row.effective_at, over, each * row.price, of.currency))
        found.append(Flow(of.starts_at, over, -each * of.price, of.currency))
    return found


def _withheld(placements: QuerySet[Placement], start: datetime, end: datetime) -> list[Flow]:
    """What is credited of GPUs that calls held lower: flows below zero."""
    rows = HeldLower.objects.filter(host__in=placements.values("host"), starts_at__lt=end)
    spells = held_lower.spells(list(rows.filter(Q(ends_at=None) | Q(ends_at__gt=start))), placements, until=end)
    found = []
    for spell, begins, ends, price in priced(spells):
        of = spell.placement.contract
        if max(begins, start) < ends:
            kept = spell.milli * (1000 - of.fee_permille)
            found.append(Flow(max(begins, start), ends, -kept * price, of.currency))
    return found


def priced(spells: Sequence[held_lower.Spell]) -> Iterator[tuple[held_lower.Spell, datetime, datetime, int]]:
    """(spell, from, to, price per GPU-hour then): by the intervals of a spot contract, else at the contract's price."""
    spot = [s.placement.contract for s in spells if s.placement.contract.kind == "spot"]
    if spot:
        span = min(s.begins for s in spells), max(s.ends for s in spells)
        prices = _spot_prices({c.listing_id for c in spot}, {c.pk for c in spot}, *span)
    for spell in spells:
        of = spell.placement.contract
        if of.kind == "spot":
            yield from ((spell, *piece) for piece in prices.cut(of, spell.begins, spell.ends))
        else:
            yield spell, spell.begins, spell.ends, of.price


class _SpotPrices(NamedTuple):
    intervals: dict[int, list[tuple[datetime, int]]]  # by listing: start, price; ascending
    results: dict[tuple[int, datetime], int]  # by contract and start: what it pays there

    def cut(self, contract: Contract, begins: datetime, ends: datetime) -> list[tuple[datetime, datetime, int]]:
        """`[begins, ends)` by the intervals of the contract's listing; before the first of them its own price stands."""
        of = self.intervals.get(contract.listing_id, [])
        limit = contract.limit_price if contract.limit_price is not None else contract.price
        marks: list[tuple[datetime, int]] = [(begins, contract.price)]
        for at, price in of:
            if at >= ends:
                break
            pays = self.results.get((contract.pk, at), min(price, limit))
            if at <= begins:
                marks = [(begins, pays)]
            else:
                marks.append((at, pays))
        return [(a, b, price) for (a, price), (b, _) in zip(marks, [*marks[1:], (ends, 0)], strict=True)]


def _spot_prices(listings: set[int], contracts: set[int], start: datetime, end: datetime) -> _SpotPrices:
    intervals: dict[int, list[tuple[datetime, int]]] = defaultdict(list)
    if not listings:
        return _SpotPrices(intervals, {})
    window: dict[str, Any] = {"start__gt": start - INTERVAL, "start__lt": end}
    rows = SpotInterval.objects.filter(listing_id__in=listings, **window).order_by("listing_id", "start")
    for listing, at, price in rows.values_list("listing_id", "start", "price"):
        intervals[listing].append((at, price))
    results = SpotResult.objects.filter(contract_id__in=contracts, **window).values_list(
        "contract_id", "start", "price"
    )
    return _SpotPrices(intervals, {(contract, at): price for contract, at, price in results})
