"""What a site's GPUs earn their operator, by the clock: running time at its price and commitments as owed, less the platform's fee.

Before rating: what the next invoices and payouts will say, known at once. A flow is money at an even rate for a time; its sums over
any cut of that time are exact.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet

from billing.core import metering, rating
from marketplace.models import Amendment, Contract, Fill, HeldLower, Placement, SpotInterval, SpotResult
from marketplace.models.spot import INTERVAL
from marketplace.services import commitments, held_lower
from marketplace.services.availability import HOLDING
from marketplace.services.commitments import NOT_IN_FORCE

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
    rows = HeldLower.objects.filter(host__in=placements.values("host"), starts_at__lt=end)
    spells = held_lower.spells(list(rows.filter(Q(ends_at=None) | Q(ends_at__gt=start))), placements, until=end)
    lowered: dict[int, list[rating.Missed]] = defaultdict(list)
    by_use = []
    for spell in spells:
        if spell.placement.contract.kind in HOLDING:
            missed = rating.Missed(spell.milli, metering.interval(spell.begins, spell.ends))
            lowered[spell.placement.contract_id].append(missed)
        else:
            by_use.append(spell)
    return [*_running(placements, start, end), *_committed(contracts, lowered, start, end), *_withheld(by_use, start)]


def _running(placements: QuerySet[Placement], start: datetime, end: datetime) -> list[Flow]:
    ran = list(
        placements.filter(running_at__lt=end, contract__kind__in=("on_demand", "spot"))
        .filter(Q(release_requested_at=None) | Q(release_requested_at__gt=start))
        .filter(Q(finished_at=None) | Q(finished_at__gt=start))
        .select_related("contract")
    )
    spot = [p for p in ran if p.contract.kind == "spot"]
    prices = _spot_prices({p.contract.listing_id for p in spot}, {p.contract_id for p in spot}, start, end)
    changes = _price_changes({p.contract_id for p in ran}, start)
    found: list[Flow] = []
    for p in ran:
        assert p.running_at is not None
        begins, ends = max(p.running_at, start), min(p.release_requested_at or p.finished_at or end, end)
        kept = p.milli_gpus * (1000 - p.contract.fee_permille)
        if p.contract.kind == "spot":
            pieces = prices.cut(p.contract, begins, ends)
        else:
            pieces = _by_price(changes.get(p.contract_id, ()), p.contract.price, begins, ends)
        found += [Flow(a, b, kept * price, p.contract.currency) for a, b, price in pieces if a < b]
    return found


def _price_changes(contracts: set[int], start: datetime) -> dict[int, list[Amendment]]:
    """Agreed prices that begin after `start`, by contract, the earliest first."""
    found: dict[int, list[Amendment]] = defaultdict(list)
    rows = Amendment.objects.filter(contract__in=contracts, kind=Amendment.Kind.PRICE, state="accepted")
    for row in rows.filter(effective_at__gt=start).order_by("effective_at", "pk"):
        found[row.contract_id].append(row)
    return found


def _by_price(
    changes: Sequence[Amendment], price: int, begins: datetime, ends: datetime
) -> list[tuple[datetime, datetime, int]]:
    """`[begins, ends)` cut where the price changes; `price`: where it never does."""
    pieces = []
    for change in changes:
        until = min(max(begins, change.effective_at), ends)
        pieces.append((begins, until, change.old_price if change.old_price is not None else price))
        begins = until
    last = changes[-1].price if changes else None
    return [*pieces, (begins, ends, price if last is None else last)]


def _committed(
    contracts: QuerySet[Contract], lowered: Mapping[int, Sequence[rating.Missed]], start: datetime, end: datetime
) -> list[Flow]:
    """Of commitments what is owed, by the rules of their invoices: less what calls took, what was missed, and `lowered` by contract. Of a
    window that was sold on its seller pays for as long as he owes for it; what its buyer pays is the seller's.
    """
    holding = list(
        contracts.filter(kind__in=HOLDING, starts_at__lt=end)
        .exclude(state__in=NOT_IN_FORCE)
        .filter(
            Q(ended_at=None) | Q(ended_at__gt=start) | Q(state=Contract.State.DEFAULTED) | Q(pk__in=_selling(start)),
            Q(ends_at=None) | Q(ends_at__gt=start) | Q(pk__in=_selling(start)),
        )
    )
    rows, sales = commitments.held(holding, start, end), commitments.bought(holding)
    found = []
    for c in holding:
        begins = start
        if fill := sales.get(c.pk):
            assert fill.resale is not None
            begins = max(start, commitments.owed_until(fill.resale.contract, fill))
        for window in rating.month_windows(metering.interval(begins, max(begins, end))):
            owes = commitments.commitment(
                c, rating.month_of(window.start), rows[c.pk], rate=rating.Price(0, c.price), overage=rating.Price(0, 0),
                added=lambda row: rating.Price(row.pk, row.price or 0), withheld=lowered.get(c.pk, ()),
            )  # fmt: skip
            found += [_flow(c, part) for part in rating.owed(owes, window)]
    return found


def _selling(start: datetime) -> QuerySet[Fill, int | None]:
    """Contracts of which a sold window goes on after `start`, whatever became of them."""
    fills = Fill.objects.filter(resale__isnull=False, undone_at=None, ends_at__gt=start)
    return fills.values_list("resale__contract_id", flat=True)


def _flow(contract: Contract, part: rating.Added) -> Flow:
    rate = part.milli_gpus * part.price.millionths * (1000 - contract.fee_permille)
    return Flow(metering.instant(part.term.start), metering.instant(part.term.end), rate, contract.currency)


def _withheld(spells: Sequence[held_lower.Spell], start: datetime) -> list[Flow]:
    """What is credited of running GPUs that calls held lower: flows below zero."""
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
