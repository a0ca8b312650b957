"""A market for benchmarks: thousands of listings with hosts, reservations and running jobs, seeded, written in bulk."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
GPUS_A_HOST = 8
MODELS = (
    ("H100-SXM", 81_920, 700), ("H200-SXM", 144_384, 700), ("B200", 196_608, 1000), ("A100-80", 81_920, 400),
    ("L40S", 49_152, 350), ("RTX-4090", 24_576, 450),
)  # fmt: skip
REGIONS = (("us-tx", "US"), ("us-ny", "US"), ("no-north", "NO"), ("se-north", "SE"), ("ca-qc", "CA"), ("py-east", "PY"))


def build(listings: int, gpus: int, *, seed: int = 42) -> dict[str, Any]:
    """`listings` published offers of `gpus` GPUs in all, half of them partly reserved; and a customer who may buy. Empties the market."""
    from django.db import connection

    from marketplace.models import BillingStanding, Cell, GpuModel, Listing, Organization, PowerNode, Site

    rng = random.Random(seed)
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE marketplace_organization, marketplace_cell, marketplace_gpumodel CASCADE")
    operator = Organization.objects.create(name="Operator", is_operator=True)
    customer = Organization.objects.create(name="Customer", gpu_limit=1_000_000)
    BillingStanding.objects.create(organization=customer, state="good", updated_at=NOW)
    models = [GpuModel.objects.create(name=n, vram_mib=v, tdp_w=w) for n, v, w in MODELS]
    cells = [Cell.objects.create(name=region, region=region) for region, _ in REGIONS]
    sites = Site.objects.bulk_create(
        Site(
            organization=operator, cell=cells[i % len(cells)], name=f"site {i}", region=REGIONS[i % len(cells)][0],
            country=REGIONS[i % len(cells)][1], contract_power_w=50_000_000, carbon_g_per_kwh=rng.randrange(15, 600),
        )
        for i in range(120)
    )  # fmt: skip
    nodes = PowerNode.objects.bulk_create(PowerNode(site=s, name="site", kind="site", cap_w=50_000_000) for s in sites)
    rows = []
    for i in range(listings):
        at = rng.randrange(len(sites))
        price = rng.randrange(400_000, 6_000_000)
        rows.append(
            Listing(
                organization=operator, site=sites[at], gpu_model=models[rng.randrange(len(models))], title=f"offer {i}",
                state="published", published_at=NOW, on_demand_price=price, reserved_price=price * 8 // 10,
                flexible_price=price * 7 // 10 if i % 3 else None, spot_floor=price // 3 if i % 2 else None,
                min_gpus=rng.choice((1, 1, 1, 8)), interconnect=rng.choice(("infiniband", "roce", "")),
                fabric_gbps=rng.choice((0, 100, 400, 800)), runtime=rng.choice(("podman", "slurm", "kubernetes")),
            )
        )  # fmt: skip
    offers = Listing.objects.bulk_create(rows, batch_size=1000)
    hosts = _hosts(offers, {s.pk: n for s, n in zip(sites, nodes, strict=True)}, gpus // GPUS_A_HOST)
    _reserve(hosts, rng)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    return {"customer": customer, "listings": offers, "hosts": hosts}


def _hosts(offers: list[Any], node_of: dict[int, Any], count: int) -> list[Any]:
    from django.db import connection

    from marketplace.models import Host

    rows = []
    for i in range(count):
        offer = offers[i % len(offers)]
        model, site = offer.gpu_model, offer.site
        rows.append(
            Host(
                site=site, cell_id=site.cell_id, power_node=node_of[site.pk], listing=offer, gpu_model=model, name=f"h{i}",
                leaf=f"leaf-{i % 7}", spine="spine-1", gpu_count=GPUS_A_HOST, vcpu_milli=192_000, ram_mib=2_000_000,
                vram_mib=model.vram_mib, nvlink_domains=[0] * GPUS_A_HOST, gpu_free=[1000] * GPUS_A_HOST,
                vram_free=[model.vram_mib] * GPUS_A_HOST, vcpu_free=192_000, ram_free=2_000_000, parked_w=1100, base_w=4600,
                gpu_min_w=200, gpu_max_w=model.tdp_w, reserved_w=1100, desired_limits_w=[200] * GPUS_A_HOST, beat_at=NOW,
            )
        )  # fmt: skip
    made = Host.objects.bulk_create(rows, batch_size=2000)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO marketplace_gpu (host_id, index, serial, healthy, last_error)"
            " SELECT id, generate_series(0, gpu_count - 1), '', true, '' FROM marketplace_host"
        )
    return made


def _reserve(hosts: list[Any], rng: random.Random) -> None:
    """Every second host has part of it promised for some days of the next weeks."""
    from marketplace.models import Reservation, ReservationBlock

    chosen = hosts[::2]
    windows = [(NOW + timedelta(hours=rng.randrange(1, 600)), rng.randrange(24, 400)) for _ in chosen]
    held = Reservation.objects.bulk_create(
        (
            Reservation(
                listing_id=h.listing_id, starts_at=at, ends_at=at + timedelta(hours=hours), claims_at=at - timedelta(minutes=4),
                state="firm",
            )
            for h, (at, hours) in zip(chosen, windows, strict=True)
        ),
        batch_size=2000,
    )  # fmt: skip
    ReservationBlock.objects.bulk_create(
        (
            ReservationBlock(reservation=r, host=h, gpu_indices=list(range(rng.choice((2, 4, 8)))))
            for r, h in zip(held, chosen, strict=True)
        ),
        batch_size=2000,
    )
