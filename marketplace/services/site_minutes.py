"""What a site does, minute by minute and device by device: watts by use, and energy in exact millijoules (`billing.core.energy`).

Source of the chart, of the Wh of every placement, host and miner, and of the P&L. Each turn of the power loop accounts for the time
since the last one at the watts of now. Prices are those in force when a minute begins, kept with it: money is a function of what
stands here, and can be worked out again.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta

from django.db import connection, transaction

from billing.core import energy
from billing.core.energy import Use
from marketplace.models import DeviceHour, Placement, Site
from marketplace.services.feeds import Rates
from marketplace.services.power import FRESH, Ledger

MAX_STEP = timedelta(seconds=60)  # a longer silence is not accounted as if we had seen it
_USE = {"reserved": "firm_w", "flexible": "flexible_w", "on_demand": "firm_w", "spot": "spot_w"}
_HOUR_MS, _MINUTE_MS = 3_600_000, 60_000
Of = DeviceHour.Of


@dataclass
class Drawn:
    """Watts now: measured ones (booked ones where a host has no reading), by use and by device; and GH/s."""

    by_use: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    devices: dict[str, dict[int, int]] = field(default_factory=lambda: {of: {} for of in Of.values})
    ghs: int = 0

    def of(self, kind: str) -> int:
        return sum(self.devices[kind].values())


def watts(ledger: Ledger, *, now: datetime) -> Drawn:
    """A host's watts are those of its placements, by their part of the GPUs in use. A miner counts while its reading is fresh."""
    found = Drawn()
    placed: dict[int, dict[int, int]] = defaultdict(dict)
    use: dict[int, str] = {}
    live = Placement.objects.filter(site=ledger.site_id, state__in=Placement.AT_SITE).values_list(
        "id", "host_id", "contract__kind", "gpu_indices", "gpu_milli"
    )
    for pk, host_id, kind, gpus, milli in live:
        placed[host_id][pk] = max(1, len(gpus) * milli)
        use[pk] = _USE[kind]
    for pk, host in ledger.hosts.items():
        drawn = host.reserved_w if host.measured_w is None else host.measured_w
        if pk not in placed:
            found.devices[Of.HOST][pk] = drawn
            found.by_use["idle_gpu_w"] += drawn
        for placement, share in energy.shares(drawn, placed[pk]).items():
            found.devices[Of.PLACEMENT][placement] = share
            found.by_use[use[placement]] += share
    for pk, miner in ledger.miners.items():
        fresh = miner.measured_at is None or now - miner.measured_at <= FRESH
        if fresh and miner.measured_w is not None:
            found.devices[Of.MINER][pk] = miner.measured_w
            found.by_use["hashing_w"] += miner.measured_w
            found.ghs += miner.measured_ghs or 0
    return found


def record(site: Site, ledger: Ledger, rates: Rates, *, now: datetime) -> None:
    """Add the time since the last sample to its minutes and hours, at the watts and rates of now. All of it or nothing; never
    twice.
    """
    if site.sampled_at is not None and now <= site.sampled_at:
        return
    begins = max(site.sampled_at or now, now - MAX_STEP)
    with transaction.atomic():
        if not Site.objects.filter(pk=site.pk, sampled_at=site.sampled_at).update(sampled_at=now):
            return  # another turn of the loop has accounted for this time
        seen = watts(ledger, now=now)
        root = next((node for node in ledger.nodes.values() if node.parent_id is None), None)
        fresh = root is not None and root.measured_at is not None and now - root.measured_at <= FRESH
        metered = root.measured_w if root is not None and fresh else None
        fixed = root.fixed_w if root else 0
        start, end, prices = _ms(begins), _ms(now), _prices(rates)
        for minute, ms in energy.spans(start, end, _MINUTE_MS) or [(end // _MINUTE_MS * _MINUTE_MS, 0)]:
            used = _use(site, seen, ms, fixed_w=fixed, metered_w=metered)
            cap = root.cap_w if root else site.contract_power_w
            _add_minute(site, _at(minute), ms, seen, used, {"metered_w": metered, "cap_w": cap, **prices})
        for hour, ms in energy.spans(start, end, _HOUR_MS):
            _add_hour(site, _at(hour), ms, seen)


_PARTS = ("placements", "idle", "miners", "cooling_hosts", "cooling_miners", "fixed", "site")  # of Use, in its order
_GROWS = ("seen_ms", *(f"{part}_mj" for part in _PARTS), "hash_work")
_LAST = (
    "firm_w", "flexible_w", "spot_w", "idle_gpu_w", "hashing_w", "overhead_w", "metered_w", "cap_w", "hashing_ghs",
)  # fmt: skip
_ONCE = ("energy_uusd_mwh", "pool_fee_ppm", "hashprice_uusd", "carbon_g_mwh")
_COLUMNS = ("site_id", "start", *_GROWS, *_LAST, *_ONCE)
# Prices stay as the minute began with them; what was not known then is filled in by whoever knows it first.
_ON_CONFLICT = ", ".join(
    [
        *(f"{c} = m.{c} + EXCLUDED.{c}" for c in _GROWS),
        *(f"{c} = EXCLUDED.{c}" for c in _LAST),
        *(f"{c} = coalesce(m.{c}, EXCLUDED.{c})" for c in _ONCE),
    ]
)
_ADD = (  # columns of ours alone
    f"INSERT INTO marketplace_siteminute AS m ({', '.join(_COLUMNS)}, hashing_mwh, ai_mwh, hashing_microusd, energy_microusd)"  # noqa: S608
    f" VALUES ({', '.join(['%s'] * len(_COLUMNS))}, 0, 0, 0, 0) ON CONFLICT (site_id, start) DO UPDATE SET {_ON_CONFLICT}"
)
# What is told of a minute: whole milliwatt-hours and micro-USD of all that the minute holds, rounded down once.
_TELL = f"""
UPDATE marketplace_siteminute SET
  hashing_mwh = miners_mj / {energy.MJ_PER_MILLIWH}, ai_mwh = (placements_mj + idle_mj) / {energy.MJ_PER_MILLIWH},
  hashing_microusd = div(hash_work::numeric * coalesce(hashprice_uusd, 0) * (1000000 - pool_fee_ppm),
                         {energy.WORK_PER_PH_DAY * energy.MILLION}),
  energy_microusd = floor(site_mj::numeric * energy_uusd_mwh / {energy.MJ_PER_MWH})
WHERE site_id = %s AND start = %s
"""  # noqa: S608 - numbers of ours


def _prices(rates: Rates) -> dict[str, int | None]:
    return {
        "energy_uusd_mwh": rates.energy.uusd_mwh,
        "hashprice_uusd": rates.hashing.hashprice_uusd if rates.hashing else None,
        "pool_fee_ppm": rates.pool_fee_ppm,
        "carbon_g_mwh": rates.carbon_g_mwh,
    }


def _add_minute(site: Site, start: datetime, ms: int, seen: Drawn, used: Use, kept: Mapping[str, int | None]) -> None:
    cooling = _use(site, seen, 1)  # as watts
    values = {
        "site_id": site.pk, "start": start, "seen_ms": ms, "hash_work": seen.ghs * ms, "hashing_ghs": seen.ghs,
        **{f"{part}_mj": mj for part, mj in zip(_PARTS, astuple(used), strict=True)},
        **{use: seen.by_use.get(use, 0) for use in ("firm_w", "flexible_w", "spot_w", "idle_gpu_w", "hashing_w")},
        "overhead_w": cooling.cooling_hosts + cooling.cooling_miners, **kept,
    }  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(_ADD, [values[c] for c in _COLUMNS])
        cursor.execute(_TELL, [site.pk, start])


def _use(site: Site, seen: Drawn, ms: int, *, fixed_w: int = 0, metered_w: int | None = None) -> Use:
    return energy.drawn(
        seen.of(Of.PLACEMENT), seen.of(Of.HOST), seen.of(Of.MINER), ms,
        pue_permille=site.pue_permille, miner_pue_permille=site.miner_pue_permille, fixed_w=fixed_w, metered_w=metered_w,
    )  # fmt: skip


def _add_hour(site: Site, start: datetime, ms: int, seen: Drawn) -> None:
    """`ms` at these watts. The caller holds the site's row, so nobody else adds to these."""
    kept = {row.of: row for row in DeviceHour.objects.filter(site=site, start=start)}
    rows = []
    for of, drawn in seen.devices.items():
        more = {pk: watts * ms for pk, watts in drawn.items() if watts}
        if not more or not ms:
            continue
        row = kept.get(of) or DeviceHour(site=site, start=start, of=of)
        if of == Of.PLACEMENT and len(row.ms) == len(
            row.ids
        ):  # an hour that began before time was kept goes on without
            row.ms = energy.merged(row.ids, row.ms, dict.fromkeys(more, ms))[1]
        row.ids, row.mj = energy.merged(row.ids, row.mj, more)
        rows.append(row)
    DeviceHour.objects.bulk_create(
        rows, update_conflicts=True, unique_fields=["site", "start", "of"], update_fields=["ids", "mj", "ms"]
    )


def _ms(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _at(ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
