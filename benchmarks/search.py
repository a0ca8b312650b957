"""Search of the market: 5,000 listings with 100,000 GPUs, questions as buyers ask them, exact stock and facets included.

Peer: the bare SQL of the same page, its rows fetched and nothing made of them.
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


def run(options: Options) -> Report:
    database.ready()
    from django.db import connection

    from marketplace.services import search
    from marketplace.tenancy import Actor

    size = 5 if options.quick else 1
    world = catalogue.build(LISTINGS // size, GPUS // size, seed=(options.seeds or (42,))[0])
    actor = Actor(kind="user", organization_id=world["customer"].pk, role="owner")
    asked = questions(200 if options.quick else 1000, 7)
    taken: list[float] = []
    bare: list[float] = []
    rows = stock = 0
    for i, question in enumerate([*asked[:20], *asked]):  # the first twenty warm up
        filters = search.Filters(**question["filters"])
        start = time.perf_counter()
        found = search.search(actor, filters, now=catalogue.NOW, sort=question["sort"], with_facets=i % 2 == 0)
        spent = time.perf_counter() - start
        matching = search.on_offer(actor).filter(*[q for _, q in search.conditions(filters, catalogue.NOW)])
        sql, parameters = matching.order_by("id")[:21].query.sql_with_params()
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
    figures = {"p50_ms": statistics.median(taken), "p99_ms": _p99(taken), "offers_shown": float(rows)}
    return Report(
        "search",
        figures,
        peer={"p50_ms": statistics.median(bare), "p99_ms": _p99(bare)},
        conditions={
            "listings": LISTINGS // size,
            "gpus": GPUS // size,
            "questions": len(asked),
            "facets": "on every second",
        },
        must={"p50_ms": ("<=", 10), "p99_ms": ("<=", 50)},
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]
