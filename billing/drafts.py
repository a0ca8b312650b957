"""What an account owes for a window: recorded usage grouped by PostgreSQL, rated by the pure core. Writes nothing.

An account has one edge, `billed_through`. A draft bills from there to an instant, and everything older that came or changed
late, as marked adjustments. Lines are what is due to date less what earlier lines carry, so that no record is billed twice
or never, whenever it arrives.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from django.db import connection
from django.db.models import Min, Q
from django.db.models.functions import Least

from billing import commitments, held_lower, resales, usage
from billing.core import metering, rating, share
from billing.core.metering import Interval
from billing.core.rating import LineKind
from billing.draft_lines import DraftLine
from billing.models import BillingAccount, Meter, PriceVersion, UsageRecord
from marketplace.models import Contract, Fill
from marketplace.services.availability import HOLDING
from marketplace.services.commitments import NOT_IN_FORCE, Held, bought, held, term_end

log = logging.getLogger(__name__)

LATE_OVERLAP = timedelta(hours=1)  # longer than any transaction that writes usage


@dataclass(slots=True)
class Draft:
    """What an account owes for `[start, end)`: preview and close return the same."""

    account: BillingAccount
    start: datetime
    end: datetime
    lines: list[DraftLine] = field(default_factory=list)
    error: str = ""

    @property
    def total_minor(self) -> int:
        return sum(row.line.amount for row in self.lines)


@dataclass(frozen=True, slots=True)
class _Group:
    """Quantities of one (organization, month, contract, price version): before the window, and inside it."""

    organization: int
    month: Interval
    contract: int
    version: int
    before: int
    inside: int


def starts(
    accounts: Sequence[BillingAccount], through: datetime, *, pending: Sequence[usage.Row] = ()
) -> dict[int, datetime]:
    """Where each account's next window begins: its edge, or its first contract or usage."""
    begins = {a.pk: a.billed_through for a in accounts if a.billed_through is not None}
    fresh = {a.organization_id: a.pk for a in accounts if a.billed_through is None}
    if fresh:
        firsts: dict[int, list[datetime]] = defaultdict(list)
        contracts = Contract.objects.filter(organization_id__in=fresh).values_list("organization_id").order_by()
        for organization_id, start in contracts.annotate(first=Min(Least("starts_at", "ended_at"))):
            firsts[organization_id].append(start)
        used = UsageRecord.objects.filter(organization_id__in=fresh).values_list("organization_id").order_by()
        for organization_id, second in used.annotate(first=Min("start_s")):
            firsts[organization_id].append(metering.instant(second))
        for row in pending:
            firsts[row.organization_id].append(metering.instant(row.start_s))
        for organization_id, pk in fresh.items():
            first = min(firsts[organization_id], default=through)
            begins[pk] = metering.instant(metering.floor_second(min(first, through)))
    return begins


def rate(
    accounts: Sequence[BillingAccount],
    begins: dict[int, datetime],
    through: datetime,
    *,
    pending: Sequence[usage.Row] = (),
) -> list[Draft]:
    """A draft per account, in their order; one that cannot be rated carries its error.

    `pending` are usage records that are not written yet (a preview's running seconds).
    """
    drafts = {a.organization_id: Draft(a, begins[a.pk], through) for a in accounts}
    if not drafts:
        return []
    edge = metering.floor_second(through)
    months = _months(list(drafts.values()), edge)
    groups = _grouped(months, drafts, edge) + _pending(pending, months, drafts, edge)
    contracts = _contracts(drafts, {group.contract for group in groups}, edge)
    prepaid = commitments.prepaid(contracts.values())
    billed = _billed(contracts.values(), months)
    versions = _versions(contracts.values())
    first = min((month.start for spans in months.values() for month in spans), default=edge)
    commits = held(contracts.values(), metering.instant(first), metering.instant(rating.month_of(edge).end))
    sales = bought(contracts.values())
    credited = resales.due(drafts)
    lowered = held_lower.spells(months, edge, pending=pending)
    owned: dict[int, list[Contract]] = defaultdict(list)
    for contract in contracts.values():
        owned[contract.organization_id].append(contract)
    used: dict[int, list[_Group]] = defaultdict(list)
    for group in groups:
        used[group.organization].append(group)
    for organization_id, draft in drafts.items():
        try:
            mine = owned[organization_id]
            _rate_account(
                draft,
                mine,
                months[organization_id],
                used[organization_id],
                billed,
                versions,
                commits,
                sales,
                lowered,
            )
            _draw_down(draft, mine, prepaid, versions)
            draft.lines += [_credit(draft, each) for each in credited.get(organization_id, ())]
        except Exception as error:
            log.exception("billing account %s cannot be rated", draft.account.pk)
            draft.lines, draft.error = [], f"{type(error).__name__}: {error}"
    return list(drafts.values())


def _months(drafts: Sequence[Draft], edge: int) -> dict[int, list[Interval]]:
    """The UTC months to look at per organization: those of the window, and earlier ones with late usage."""
    first = {d.account.organization_id: metering.floor_second(d.start) for d in drafts}
    late = Q()
    for draft in drafts:
        if draft.account.usage_cutoff is not None:
            late |= Q(
                organization_id=draft.account.organization_id,
                received_at__gte=draft.account.usage_cutoff - LATE_OVERLAP,
                start_s__lt=rating.month_of(metering.floor_second(draft.start)).start,
            )
    if late:
        rows = UsageRecord.objects.filter(late).values_list("organization_id").order_by()
        for organization_id, second in rows.annotate(first=Min("start_s")):
            first[organization_id] = min(first[organization_id], second)
    return {
        organization_id: list(rating.month_windows(Interval(rating.month_of(start).start, edge)))
        for organization_id, start in first.items()
    }


# What a record adds up to an instant t: all of it after its end, nothing before its start, and in between `rate` a
# second until its quantity is used up (billing.core.metering.quantity_in). A revision adds its quantity less the previous.
_UPTO = (
    "CASE WHEN u.end_s <= {t} THEN u.quantity - u.previous WHEN u.start_s >= {t} THEN 0"
    " ELSE LEAST(u.quantity, u.rate * ({t} - u.start_s)) - LEAST(u.previous, u.rate * ({t} - u.start_s)) END"
)
_GROUPED = f"""
SELECT w.organization_id, w.month_s, w.month_end_s, u.contract_id, u.price_version_id,
       SUM({_UPTO.format(t="w.from_s")}), SUM({_UPTO.format(t="w.through_s")})
  FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
       AS w(organization_id, month_s, month_end_s, from_s, through_s)
  JOIN billing_usagerecord u ON u.organization_id = w.organization_id
   AND u.start_s >= w.month_s AND u.start_s < w.through_s AND u.meter = {Meter.GPU.value}
 GROUP BY 1, 2, 3, 4, 5
"""  # noqa: S608 - constants only


def _grouped(months: dict[int, list[Interval]], drafts: dict[int, Draft], edge: int) -> list[_Group]:
    windows = [
        (
            organization_id,
            month.start,
            month.end,
            min(month.end, max(month.start, metering.floor_second(drafts[organization_id].start))),
            min(month.end, edge),
        )
        for organization_id, spans in months.items()
        for month in spans
    ]
    with connection.cursor() as cursor:
        cursor.execute(_GROUPED, [list(column) for column in zip(*windows, strict=True)])
        return [
            _Group(organization, Interval(start, end), contract, version, int(before), int(through) - int(before))
            for organization, start, end, contract, version, before, through in cursor.fetchall()
        ]


def _pending(
    rows: Iterable[usage.Row], months: dict[int, list[Interval]], drafts: dict[int, Draft], edge: int
) -> list[_Group]:
    """The same sums over records that are not written yet."""
    found: list[_Group] = []
    for row in rows:
        span = Interval(row.start_s, row.end_s)
        after, prior = (
            metering.Reading(row.placement_id, "gpu", span, row.revision, row.rate, quantity)
            for quantity in (row.quantity, row.previous)
        )
        for month in months[row.organization_id]:
            start = metering.floor_second(drafts[row.organization_id].start)
            mark = min(month.end, max(month.start, start))
            parts = [
                metering.quantity_in(after, window) - metering.quantity_in(prior, window)
                for window in (Interval(month.start, mark), Interval(mark, min(month.end, edge)))
            ]
            if any(parts):
                found.append(
                    _Group(row.organization_id, month, row.contract_id, row.price_version_id, parts[0], parts[1])
                )
    return found


def _contracts(drafts: dict[int, Draft], named: set[int], edge: int) -> dict[int, Contract]:
    """Contracts with usage (`named`), those that hold capacity whether used or not, and those with money paid at signing."""
    held = Q(organization_id__in=drafts, kind__in=HOLDING, starts_at__lt=metering.instant(edge)) & ~Q(
        state__in=NOT_IN_FORCE
    )
    paid = Q(organization_id__in=drafts, upfront_minor__gt=0)
    rows = Contract.objects.filter(Q(pk__in=named) | held | paid)
    return {contract.pk: contract for contract in rows.select_related("gpu_model", "site")}


Billed = dict[tuple[int, int, str, int], int]


def _billed(contracts: Iterable[Contract], months: dict[int, list[Interval]]) -> Billed:
    """Quantities on the lines of earlier invoices by (contract, month, kind, price version)."""
    pks = [contract.pk for contract in contracts]
    starts = sorted({month.start for spans in months.values() for month in spans})
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT l.contract_id, l.month_s, l.kind, l.price_version_id, SUM(l.quantity) FROM billing_invoiceline l"
            " JOIN billing_invoice i ON i.id = l.invoice_id WHERE l.contract_id = ANY(%s) AND l.month_s = ANY(%s)"
            " AND i.state <> 'void' GROUP BY 1, 2, 3, 4",
            [pks, starts],
        )
        return {(c, month, kind, version): int(quantity) for c, month, kind, version, quantity in cursor.fetchall()}


def _versions(contracts: Iterable[Contract]) -> dict[int, list[PriceVersion]]:
    """Price versions per contract, by kind and start; a held contract that was never used gets its first here."""
    known: dict[int, list[PriceVersion]] = defaultdict(list)
    rows = list(contracts)
    usage.keep_agreed_prices([contract.pk for contract in rows if contract.kind in HOLDING])
    for version in PriceVersion.objects.filter(contract__in=rows).order_by("kind", "valid_from_s"):
        known[version.contract_id].append(version)
    for contract in rows:
        kinds = (PriceVersion.Kind.RATE, PriceVersion.Kind.OVERAGE) if contract.kind in HOLDING else ()
        for kind in kinds:
            if not any(version.kind == kind for version in known[contract.pk]):
                known[contract.pk] += usage.price_versions(contract, kind)
    return known


def _rate_account(
    draft: Draft,
    contracts: Sequence[Contract],
    months: Sequence[Interval],
    groups: Iterable[_Group],
    billed: Billed,
    versions: dict[int, list[PriceVersion]],
    commits: dict[int, Held],
    sales: dict[int, Fill],
    lowered: dict[int, list[held_lower.Spell]],
) -> None:
    currency = draft.account.currency
    start, edge = metering.floor_second(draft.start), metering.floor_second(draft.end)
    used: dict[tuple[int, int], list[_Group]] = defaultdict(list)
    for group in groups:
        used[group.contract, group.month.start].append(group)
    for contract in sorted(contracts, key=lambda contract: contract.pk):
        if contract.currency != currency:
            raise ValueError(f"{contract.public_id} is priced in {contract.currency}, the account bills in {currency}")
        prices = {v.pk: rating.Price(v.pk, v.millionths) for v in versions[contract.pk]}
        for month in months:
            span = Interval(max(month.start, start), min(month.end, edge))
            late = span.end <= span.start
            window = Interval(month.start, min(month.end, edge)) if late else span
            here, spells = used[contract.pk, month.start], lowered.get(contract.pk, [])
            calls = f": {commitments.named(held_lower.calls(spells, window))}"
            if contract.kind in HOLDING:
                if contract.state in NOT_IN_FORCE or metering.floor_second(contract.starts_at) >= edge:
                    continue
                used_here = sum(group.before + group.inside for group in here)
                lines, note = commitments.lines(
                    contract, window, billed, versions[contract.pk], commits[contract.pk], currency,
                    used=used_here, withheld=held_lower.missed(spells),
                )  # fmt: skip
                _add(
                    draft,
                    contract,
                    month,
                    lines,
                    adjustment=late,
                    bought=sales.get(contract.pk),
                    notes={LineKind.COMMITMENT: "" if late else note, LineKind.HELD_LOWER: calls},
                )
                continue
            fresh, changed = [], []
            for group in _merged(here):
                key = (contract.pk, month.start, LineKind.USAGE.value, group.version)
                price = prices[group.version]
                delta = group.before - billed.get(key, 0)
                changed.append(rating.UsageGroup(contract.pk, "gpu", price, Interval(month.start, window.end), delta))
                fresh.append(rating.UsageGroup(contract.pk, "gpu", price, window, group.inside))
            _add(draft, contract, month, rating.rate_usage(fresh, currency), adjustment=False)
            _add(draft, contract, month, rating.rate_usage(changed, currency), adjustment=True)
            eased = []
            for version, quantity in held_lower.by_version(spells, Interval(month.start, window.end)).items():
                delta = -quantity - billed.get((contract.pk, month.start, LineKind.HELD_LOWER.value, version), 0)
                eased.append(rating.UsageGroup(contract.pk, "gpu", prices[version], window, delta))
            rows = rating.rate_usage(eased, currency, kind=LineKind.HELD_LOWER)
            _add(draft, contract, month, rows, adjustment=late, notes={LineKind.HELD_LOWER: calls})


def _merged(groups: Iterable[_Group]) -> list[_Group]:
    """One group per price version: recorded and pending sums together."""
    sums: dict[int, _Group] = {}
    for group in groups:
        other = sums.get(group.version, replace(group, before=0, inside=0))
        sums[group.version] = replace(group, before=group.before + other.before, inside=group.inside + other.inside)
    return [sums[version] for version in sorted(sums)]


def _draw_down(
    draft: Draft, contracts: Iterable[Contract], prepaid: dict[int, int], versions: dict[int, list[PriceVersion]]
) -> None:
    """What was paid at signing pays first; when the contract is over, what is left of it goes back."""
    edge = metering.floor_second(draft.end)
    for contract in sorted(contracts, key=lambda contract: contract.pk):
        left = prepaid.get(contract.pk, 0)
        if not left:
            continue
        lines = [row.line for row in draft.lines if row.contract.pk == contract.pk]
        due = sum(
            line.amount for line in lines if line.kind in {LineKind.COMMITMENT, LineKind.CREDIT, LineKind.HELD_LOWER}
        )
        over = contract.state == Contract.State.CANCELLED or edge >= term_end(contract, edge + 1)
        amount = rating.drawn(left, due, over=over)
        if not amount:
            continue
        rate = next(v for v in versions[contract.pk] if v.kind == PriceVersion.Kind.RATE)
        price = rating.Price(rate.pk, rate.millionths)
        span = Interval(metering.floor_second(draft.start), edge)
        line = rating.Line(contract.pk, LineKind.DRAWDOWN, "gpu", price, span, 0, -amount)
        draft.lines.append(DraftLine(line, contract, rating.month_of(edge - 1).start, False, 0, 0))


def _credit(draft: Draft, due: resales.Credit) -> DraftLine:
    """What others paid for capacity that the account's organization sold on, less the fee: a line below zero."""
    contract = due.resale.contract
    rate = usage.price_versions(contract)[0]
    span = Interval(metering.floor_second(draft.start), metering.floor_second(draft.end))
    price = rating.Price(rate.pk, due.resale.price)
    line = rating.Line(contract.pk, LineKind.RESALE, "gpu", price, span, due.quantity, -due.minor)
    return DraftLine(line, contract, rating.month_of(span.end - 1).start, False, 0, 0, -due.minor, due.resale)


def _add(
    draft: Draft,
    contract: Contract,
    month: Interval,
    lines: Iterable[rating.Line],
    *,
    adjustment: bool,
    bought: Fill | None = None,
    notes: Mapping[LineKind, str] | None = None,
) -> None:
    """`notes`: of the first line of a kind."""
    unsaid = dict(notes or {})
    for line in filter(lambda line: line.quantity, lines):
        seller, resale, said = 0, None, unsaid.pop(line.kind, "")
        parts = share.split(line.amount, contract.fee_permille)
        operator, platform = parts.operator, parts.platform
        if line.kind == LineKind.COMMITMENT and bought is not None:
            of = resales.split(line, bought, contract)
            operator, platform, seller, resale = of.operator, of.platform, of.seller, bought.resale
        row = DraftLine(line, contract, month.start, adjustment, operator, platform, seller, resale, said)
        draft.lines.append(row)
