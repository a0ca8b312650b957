"""What is credited of GPUs that calls of the grid held lower: recorded seconds of use, each by the share of power withheld (ADR 23).

Due to date, like every line: what was credited before comes off, so that it is credited once, however often it is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from billing import usage
from billing.core import metering, rating
from billing.core.metering import Interval
from billing.models import Meter, UsageRecord
from marketplace.models import HeldLower, Placement


@dataclass(frozen=True, slots=True)
class Spell:
    """`milli` milli-GPUs of a contract are credited every second of `span`, whose use has the price version `version`."""

    contract: int
    version: int
    span: Interval
    milli: int
    call: str


@dataclass(slots=True)
class _Used:
    """The last word on an interval of use. `end_s`: where its quantity is used up."""

    revision: int
    contract: int
    version: int
    rate: int
    end_s: int


def spells(
    months: Mapping[int, Sequence[Interval]], edge: int, *, pending: Iterable[usage.Row] = ()
) -> dict[int, list[Spell]]:
    """By contract, of the organizations' months (by id) up to the second `edge`, in order of time. `pending`: usage that is not written
    yet. Two statements, and one where no GPU was held lower in that time.
    """
    if not months:
        return {}
    first = min(month.start for spans in months.values() for month in spans)
    rows = HeldLower.objects.filter(starts_at__lt=metering.instant(edge)).exclude(ends_at__lte=metering.instant(first))
    held: dict[int, list[HeldLower]] = defaultdict(list)
    for row in rows.select_related("curtailment").order_by("starts_at", "pk"):
        held[row.host_id].append(row)
    if not held:
        return {}
    hosts = dict(
        Placement.objects.filter(organization__in=months, host__in=held, running_at__isnull=False).values_list(
            "pk", "host_id"
        )
    )
    found: dict[int, list[Spell]] = defaultdict(list)
    for (placement, start_s), use in sorted(_used(hosts, pending).items()):
        for row in held[hosts[placement]]:
            end = edge if row.ends_at is None else metering.floor_second(row.ends_at)
            begin = max(start_s, metering.floor_second(row.starts_at), first)
            if begin < (end := min(end, use.end_s, edge)):
                milli = rating.withheld(use.rate, row.gpu_w, row.full_w)
                call = row.curtailment.public_id
                found[use.contract].append(Spell(use.contract, use.version, Interval(begin, end), milli, call))
    for mine in found.values():
        mine.sort(key=lambda spell: (spell.span, spell.version, spell.milli))
    return found


def _used(placements: Iterable[int], pending: Iterable[usage.Row]) -> dict[tuple[int, int], _Used]:
    """By placement and start."""
    found: dict[tuple[int, int], _Used] = {}
    wanted = set(placements)
    records = UsageRecord.objects.filter(placement__in=wanted, meter=Meter.GPU)
    known: Iterable[UsageRecord | usage.Row] = records.order_by("placement_id", "start_s", "revision")
    for row in (*known, *(r for r in pending if r.placement_id in wanted)):
        key, last = (row.placement_id, row.start_s), row.start_s + row.quantity // row.rate
        if key not in found or found[key].revision <= row.revision:
            found[key] = _Used(row.revision, row.contract_id, row.price_version_id, row.rate, last)
    return found


def by_version(mine: Iterable[Spell], window: Interval) -> dict[int, int]:
    """Milli-GPU-seconds inside `window` by the price version of the use."""
    found: dict[int, int] = defaultdict(int)
    for spell in mine:
        seconds = min(spell.span.end, window.end) - max(spell.span.start, window.start)
        if seconds > 0:
            found[spell.version] += seconds * spell.milli
    return found


def missed(mine: Iterable[Spell]) -> list[rating.Missed]:
    """As GPUs that a commitment does without."""
    return [rating.Missed(spell.milli, spell.span) for spell in mine]


def calls(mine: Iterable[Spell], window: Interval) -> list[str]:
    """Public ids of the calls that touch `window`, the earliest first."""
    return list(dict.fromkeys(s.call for s in mine if s.span.start < window.end and s.span.end > window.start))
