"""The P&L of a site by hour and kind (AI, hashing, demand response, energy): a projection that can be made anew at any time.

Energy and its cost come from the minutes, AI from running and committed GPUs, hashing from the work done at the minutes' hashprice
(what FPPS would pay), and what was *paid* from receipts: a pool's payout, or a grid's, spread over the hours of its time. The
arithmetic is `billing.core.energy`. Made anew, an hour says the same: nothing is added to what stood there.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connection, transaction

from billing.core import energy
from billing.core.energy import KINDS, Hour, Use
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, DeviceHour, Placement, ProfitHour, Receipt, Site
from marketplace.services import ai_revenue

HOUR = timedelta(hours=1)
FRESH = 3 * HOUR  # the clock makes these anew: placements end, receipts and revisions come in
TOPIC = "marketplace.profit"  # hours whose receipts have changed: {"site", "start", "end"}
COLUMNS = (
    "start", "kind", "revenue_microusd", "paid_microusd", "energy_mwh", "energy_microusd", "carbon_g", "margin_microusd",
    "seen_s",
)  # fmt: skip

_SUMS = """
SELECT date_trunc('hour', start AT TIME ZONE 'UTC') AS hour,
  sum(placements_mj), sum(idle_mj), sum(miners_mj), sum(cooling_hosts_mj), sum(cooling_miners_mj), sum(fixed_mj), sum(site_mj),
  sum(seen_ms), sum(ai * energy_uusd_mwh), sum(hashing * energy_uusd_mwh), sum((site_mj - ai - hashing) * energy_uusd_mwh),
  sum(ai * carbon_g_mwh), sum(hashing * carbon_g_mwh), sum((site_mj - ai - hashing) * carbon_g_mwh),
  bool_and(carbon_g_mwh IS NOT NULL),
  sum(hash_work::numeric * coalesce(hashprice_uusd, 0) * (1000000 - pool_fee_ppm))
FROM (SELECT *, (placements_mj + idle_mj + cooling_hosts_mj)::numeric AS ai, (miners_mj + cooling_miners_mj)::numeric AS hashing
      FROM marketplace_siteminute WHERE site_id = %s AND start >= %s AND start < %s) minute
GROUP BY 1
"""


def hours(site: Site, start: datetime, end: datetime) -> dict[datetime, Hour]:
    """What the minutes of each hour in `[start, end)` sum to."""
    with connection.cursor() as cursor:
        cursor.execute(_SUMS, [site.pk, start, end])
        rows = cursor.fetchall()
    return {at.replace(tzinfo=UTC): _hour([int(v or 0) for v in values], bool(values[14])) for at, *values in rows}


def _hour(v: Sequence[int], carbon_known: bool) -> Hour:
    """A row of `_SUMS` after its time."""
    carbon = (v[11], v[12], v[13]) if carbon_known else None
    return Hour(Use(*v[:7]), seen_ms=v[7], cost=(v[8], v[9], v[10]), carbon=carbon, hashing=v[15])


@transaction.atomic
def rebuild(site: Site, start: datetime, end: datetime) -> int:
    """Makes the hours of `[start, end)` anew, and those of every receipt that lies partly in it; returns how many."""
    acquire((Lock.PROFIT, site.pk))
    start, end = _floor(start), _floor(end - timedelta(microseconds=1)) + HOUR
    receipts = list(Receipt.objects.filter(site=site, start__lt=end, end__gt=start).order_by("pk"))
    start = min([start, *(_floor(r.start) for r in receipts)])
    end = max([end, *(_floor(r.end - timedelta(microseconds=1)) + HOUR for r in receipts)])
    receipts = list(Receipt.objects.filter(site=site, start__lt=end, end__gt=start).order_by("pk"))
    wide = hours(site, min([start, *(_floor(r.start) for r in receipts)]), max([end, *(r.end for r in receipts)]))
    paid = _paid(receipts, {at: hour.hashing for at, hour in wide.items()})
    flows = ai_revenue.flows(Placement.objects.filter(site=site), Contract.objects.filter(site=site), start, end)
    rows = []
    for at in _each(start, end):
        hour = wide.get(at, Hour(Use()))
        earned = ai_revenue.earned(flows, at, at + HOUR)
        usd = earned.pop("USD", 0)
        if at not in wide and not usd and not earned and not paid.get(at):
            continue
        for kind, line in energy.lines(hour, usd, paid.get(at, {})).items():
            rows.append(
                ProfitHour(
                    site=site, start=at, kind=kind, revenue_microusd=line.revenue_uusd, paid_microusd=line.paid_uusd,
                    foreign=earned if kind == energy.AI else {}, energy_mj=line.energy_mj, energy_microusd=line.energy_uusd,
                    carbon_mg=line.carbon_mg, seen_ms=hour.seen_ms,
                )
            )  # fmt: skip
    ProfitHour.objects.filter(site=site, start__gte=start, start__lt=end).exclude(
        start__in={row.start for row in rows}
    ).delete()
    told = ("revenue_microusd", "paid_microusd", "foreign", "energy_mj", "energy_microusd", "carbon_mg", "seen_ms")
    ProfitHour.objects.bulk_create(
        rows, update_conflicts=True, unique_fields=["site", "start", "kind"], update_fields=told, batch_size=1000
    )
    return len(rows) // len(KINDS)


def _paid(receipts: list[Receipt], work: Mapping[datetime, int]) -> dict[datetime, dict[str, int]]:
    """What receipts say of each hour: a pool's by the worth of the work done in it, a grid's by the time."""
    found: dict[datetime, dict[str, int]] = defaultdict(dict)
    for receipt in receipts:
        parts = energy.hours_of(int(receipt.start.timestamp()), int(receipt.end.timestamp()))
        each = [datetime.fromtimestamp(at, UTC) for at, _ in parts]
        seconds = [s for _, s in parts]
        weights = [work.get(at, 0) * s for at, s in zip(each, seconds, strict=True)]
        if receipt.kind != Receipt.Kind.HASHING:
            weights = [0] * len(each)
        for at, micro in zip(each, energy.spread(receipt.amount_microusd, weights, seconds), strict=True):
            found[at][receipt.kind] = found[at].get(receipt.kind, 0) + micro
    return found


def _floor(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _each(start: datetime, end: datetime) -> Iterator[datetime]:
    while start < end:
        yield start
        start += HOUR


def clock(*, now: datetime) -> int:
    """The last hours of every site that is on record; returns how many were made anew."""
    sites = Site.objects.filter(sampled_at__gte=now - FRESH).order_by("pk")
    return sum(rebuild(site, now - FRESH, now) for site in sites)


# --- read
def table(site: Site, start: datetime, end: datetime) -> list[dict[str, Any]]:
    """The rows of `[start, end)` as COLUMNS, hours ascending, kinds in their order."""
    order = {kind: i for i, kind in enumerate(KINDS)}
    rows = ProfitHour.objects.filter(site=site, start__gte=start, start__lt=end)
    return [_told(row) for row in sorted(rows, key=lambda row: (row.start, order[row.kind]))]


def _told(row: ProfitHour) -> dict[str, Any]:
    return {
        "start": row.start, "kind": row.kind, "revenue_microusd": row.revenue_microusd, "paid_microusd": row.paid_microusd,
        "energy_mwh": row.energy_mj // energy.MJ_PER_MILLIWH, "energy_microusd": row.energy_microusd,
        "carbon_g": None if row.carbon_mg is None else row.carbon_mg // 1000,
        "margin_microusd": row.revenue_microusd - row.energy_microusd, "seen_s": row.seen_ms // 1000,
    }  # fmt: skip


def summed(kind: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of a kind's lines; `paid_microusd` is None where nothing was paid for any."""
    paid = [line["paid_microusd"] for line in lines if line["paid_microusd"] is not None]
    names = ("revenue_microusd", "energy_mwh", "energy_microusd", "margin_microusd")
    sums = {name: sum(line[name] for line in lines) for name in names}
    return {"kind": kind, "paid_microusd": sum(paid) if paid else None, **sums}


def as_csv(site: Site, start: datetime, end: datetime) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "start": row["start"].isoformat()} for row in table(site, start, end))
    return out.getvalue()


def by_device(site: Site, of: str, start: datetime, end: datetime) -> dict[int, int]:
    """Millijoules of each placement, idle host or miner in the hours of `[start, end)`, by its key."""
    found: dict[int, int] = defaultdict(int)
    rows = DeviceHour.objects.filter(site=site, of=of, start__gte=_floor(start), start__lt=end).values_list("ids", "mj")
    for ids, mj in rows:
        for pk, value in zip(ids, mj, strict=True):
            found[pk] += value
    return dict(found)


def uneven(site: Site, start: datetime, end: datetime) -> list[str]:
    """The books' check: devices against minutes, and kinds against the site, of each hour. Empty where all is even."""
    problems = []
    for at, hour in sorted(hours(site, _floor(start), end).items()):
        devices = dict.fromkeys(DeviceHour.Of.values, 0)
        for of, mj in DeviceHour.objects.filter(site=site, start=at).values_list("of", "mj"):
            devices[of] += sum(mj)
        for of, minutes in (("placement", hour.use.placements), ("host", hour.use.idle), ("miner", hour.use.miners)):
            if devices[of] != minutes:
                problems.append(f"{at:%F %R} {of}: devices {devices[of]} mJ, minutes {minutes} mJ")
        told = sum(ProfitHour.objects.filter(site=site, start=at).values_list("energy_mj", flat=True))
        if told != hour.use.site:
            problems.append(f"{at:%F %R}: kinds {told} mJ, site {hour.use.site} mJ")
    return problems
