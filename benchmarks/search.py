"""Search of the market: 5,000 listings with 100,000 GPUs, questions as buyers ask them, exact stock and facets included.

The columns are warm, as a process has them after its first search; `cold_ms` is that first one. Between every ten questions something
changes, as a market does: a quote's hold, a host that fails, a price. Peer: the bare SQL of the same page, its rows fetched and
nothing made of them (no stock, no facets).
"""

from __future__ import annotations

import random
import statistics
import time
from datetime import timedelta
from typing import Any

from benchmarks import catalogue, database
from benchmarks.harness import Options, Report, require

LISTINGS, GPUS = 5_000, 100_000


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Arguments of `search.Filters`, with a sort; a fifth ask for nothing but an order, a third for a window."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        asked: dict[str, Any] = {}
        if rng.random() < 0.7:
            asked["gpu_model"] = (rng.choice(catalogue.MODELS)[0],)
        if rng.random() < 0.3:
            asked["region"] = (rng.choice(catalogue.REGIONS)[0],)
        if rng.random() < 0.3:
            asked["price_max"] = rng.randrange(800_000, 5_000_000)
        if rng.random() < 0.2:
            asked["carbon_max_g"] = rng.randrange(50, 500)
        if rng.random() < 0.2:
            asked["fabric_gbps_min"] = 400
        asked["kind"] = rng.choice(("on_demand", "reserved", "flexible"))
        if rng.random() < 0.5:
            asked["count"], asked["level"] = rng.choice((1, 2, 8, 16)), rng.choice(("host", "site"))
        if rng.random() < 0.35:
            start = catalogue.NOW + timedelta(days=rng.randrange(1, 20))
            asked["start"], asked["end"] = start, start + timedelta(days=rng.randrange(1, 14))
        found.append({"filters": asked, "sort": rng.choice(("price", "price", "carbon", "newest", "-fabric"))})
    return found


def bare_sql(offers: Any, asked: dict[str, Any]) -> Any:
    """The first page of what matches, by id: only what stands in columns."""
    lookups = {"gpu_model": "gpu_model__name__in", "region": "site__region__in", "carbon_max_g": "site__carbon_g_per_kwh__lte",
               "fabric_gbps_min": "fabric_gbps__gte", "count": "min_gpus__lte"}  # fmt: skip
    price = f"{asked['kind']}_price"
    rows = offers.filter(**{lookups[k]: v for k, v in asked.items() if k in lookups}, **{f"{price}__isnull": False})
    if "price_max" in asked:
        rows = rows.filter(**{f"{price}__lte": asked["price_max"]})
    return rows.order_by("id")[:21]


def disturb(world: dict[str, Any], rng: random.Random) -> None:
    """Something changes in the market, committed."""
    from marketplace.models import Gpu, Listing, Reservation

    kind = rng.randrange(3)
    if kind == 0:
        Listing.objects.filter(pk=rng.choice(world["listings"]).pk).update(
            on_demand_price=rng.randrange(400_000, 6_000_000)
        )
    elif kind == 1:
        Gpu.objects.filter(host=rng.choice(world["hosts"]), index=rng.randrange(8)).update(healthy=rng.random() < 0.5)
    else:
        held = Reservation.objects.filter(listing=rng.choice(world["listings"]))
        held.update(state=rng.choice(("firm", "released")))


def run(options: Options) -> Report:
    database.ready()
    from django.db import connection

    from marketplace.services import catalogue as columns
    from marketplace.services import search
    from marketplace.tenancy import Actor

    size = 5 if options.quick else 1
    world = catalogue.build(LISTINGS // size, GPUS // size, seed=(options.seeds or (42,))[0])
    actor = Actor(kind="user", organization_id=world["customer"].pk, role="owner")
    asked = questions(200 if options.quick else 1000, 7)
    taken: list[float] = []
    bare: list[float] = []
    rows = stock = 0
    rng = random.Random(11)
    start = time.perf_counter()
    columns.read()
    cold = time.perf_counter() - start
    for i, question in enumerate([*asked[:20], *asked]):  # the first twenty warm up
        filters = search.Filters(**question["filters"])
        if i % 10 == 0:
            disturb(world, rng)
        start = time.perf_counter()
        found = search.search(actor, filters, now=catalogue.NOW, sort=question["sort"], with_facets=i % 2 == 0)
        spent = time.perf_counter() - start
        sql, parameters = bare_sql(search.on_offer(actor), question["filters"]).query.sql_with_params()
        start = time.perf_counter()
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            cursor.fetchall()
        if i >= 20:
            taken.append(spent * 1000)
            bare.append((time.perf_counter() - start) * 1000)
            rows += len(found.rows)
            stock += sum(f.stock.gpus for f in found.rows)
    require(rows > len(asked) and stock > 0, f"{rows} offers and {stock} GPUs shown for {len(asked)} questions")
    figures = {
        "p50_ms": statistics.median(taken),
        "p99_ms": _p99(taken),
        "cold_ms": cold * 1000,
        "offers_shown": float(rows),
    }
    return Report(
        "search",
        figures,
        peer={"p50_ms": statistics.median(bare), "p99_ms": _p99(bare)},
        conditions={
            "listings": LISTINGS // size,
            "gpus": GPUS // size,
            "questions": len(asked),
            "facets": "on every second",
            "changes": "one before every tenth",
        },
        must={"p50_ms": ("<=", 10), "p99_ms": ("<=", 50)},
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]
