"""What a site does, minute by minute: watts by use, energy, hashing revenue and energy cost. Source of the chart and the P&L."""

from collections import defaultdict
from datetime import datetime, timedelta

from django.db import connection

from marketplace.models import Host, Miner, Placement, PowerNode, Site
from marketplace.services import feeds

MAX_STEP = timedelta(seconds=60)  # a longer silence is not accounted as if we had seen it
_USE = {"reserved": "firm_w", "flexible": "flexible_w", "on_demand": "firm_w", "spot": "spot_w"}


def watts_by_use(site: Site) -> dict[str, int]:
    """Measured watts (booked ones where a host has no reading) by use: firm_w, flexible_w, spot_w, idle_gpu_w, hashing_w."""
    found: dict[str, int] = defaultdict(int)
    use: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    live = Placement.objects.filter(site=site, state__in=Placement.AT_SITE).values_list(
        "host_id", "contract__kind", "gpu_indices", "gpu_milli"
    )
    for host_id, kind, gpus, milli in live:
        use[host_id][_USE[kind]] += max(1, len(gpus) * milli)
    for pk, measured, reserved in Host.objects.filter(site=site).values_list("id", "measured_w", "reserved_w"):
        watts = reserved if measured is None else measured
        total = sum(use[pk].values())
        if not total:
            found["idle_gpu_w"] += watts
        for column, share in use[pk].items():
            found[column] += watts * share // total
    for watts in Miner.objects.filter(site=site).exclude(measured_w=None).values_list("measured_w", flat=True):
        found["hashing_w"] += watts or 0
    return dict(found)


def record(site: Site, *, now: datetime) -> None:
    """Add the time since the last sample to the running minute, at the watts of now."""
    seconds = min(MAX_STEP, now - site.sampled_at).total_seconds() if site.sampled_at and site.sampled_at < now else 0
    if not Site.objects.filter(pk=site.pk, sampled_at=site.sampled_at).update(sampled_at=now):
        return  # another turn of the loop has accounted for this time
    watts = watts_by_use(site)
    ai = sum(watts.get(c, 0) for c in ("firm_w", "flexible_w", "spot_w", "idle_gpu_w"))
    hashing = watts.get("hashing_w", 0)
    overhead = (ai * (site.pue_permille - 1000) + hashing * (site.miner_pue_permille - 1000)) // 1000
    ghs = sum(Miner.objects.filter(site=site).exclude(measured_ghs=None).values_list("measured_ghs", flat=True))
    prices = feeds.prices(site, now=now)
    earned = feeds.worth_uusd_h(prices, ghs, 0) if prices else 0
    price = prices.energy_uusd_mwh if prices else site.energy_price_microusd_per_kwh * 1000
    root = PowerNode.objects.filter(site=site, parent=None).first()
    metered = root.measured_w if root else None
    total = metered if metered is not None else ai + hashing + overhead
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO marketplace_siteminute (site_id, start, firm_w, flexible_w, spot_w, idle_gpu_w, hashing_w, overhead_w, metered_w,"
            " cap_w, hashing_ghs, hashing_mwh, ai_mwh, hashing_microusd, energy_microusd)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (site_id, start) DO UPDATE SET firm_w = EXCLUDED.firm_w, flexible_w = EXCLUDED.flexible_w,"
            " spot_w = EXCLUDED.spot_w, idle_gpu_w = EXCLUDED.idle_gpu_w, hashing_w = EXCLUDED.hashing_w,"
            " overhead_w = EXCLUDED.overhead_w,"
            " metered_w = EXCLUDED.metered_w, cap_w = EXCLUDED.cap_w, hashing_ghs = EXCLUDED.hashing_ghs,"
            " hashing_mwh = marketplace_siteminute.hashing_mwh + EXCLUDED.hashing_mwh,"
            " ai_mwh = marketplace_siteminute.ai_mwh + EXCLUDED.ai_mwh,"
            " hashing_microusd = marketplace_siteminute.hashing_microusd + EXCLUDED.hashing_microusd,"
            " energy_microusd = marketplace_siteminute.energy_microusd + EXCLUDED.energy_microusd",
            [
                site.pk, now.replace(second=0, microsecond=0), watts.get("firm_w", 0), watts.get("flexible_w", 0), watts.get("spot_w", 0),
                watts.get("idle_gpu_w", 0), hashing, overhead, metered, root.cap_w if root else site.contract_power_w, ghs,
                int(hashing * seconds * 1000 / 3600), int(ai * seconds * 1000 / 3600), int(earned * seconds / 3600),
                int(total * seconds * price / 3_600_000_000),
            ],
        )  # fmt: skip
