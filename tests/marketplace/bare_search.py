"""The search by bare SQL and `availability.stock`, as it was before the catalogue: what tests hold the catalogue's answers against.

What stands in columns is filtered in SQL. What depends on time (is there room for `count` in that window?) is asked of the
capacity core, batch by batch along the keyset, with batches that grow fourfold, so that the number of queries is bounded
whatever the size of the catalogue: MAX_BATCHES x 4 for rows and stock, one for facets, and one more when nothing matched.
"""

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.db.models import (
    BigIntegerField,
    BooleanField,
    Count,
    Exists,
    ExpressionWrapper,
    F,
    OuterRef,
    Q,
    QuerySet,
    Sum,
    Value,
)
from django.db.models.functions import Coalesce

from marketplace.errors import MarketError
from marketplace.models import Host, Kind, Listing
from marketplace.services import availability
from marketplace.services.availability import HOLDING, Stock
from marketplace.services.search import Filters, Found, Result, on_offer
from marketplace.tenancy import Actor

MAX_BATCHES = 8  # 32 x 4^7: the last takes all that is left of a catalogue of 500,000 listings
FIRST_BATCH = 32
UNKNOWN = (1 << 62) - 1  # sorts what has no value last

PRICE_COLUMN = {
    Kind.ON_DEMAND: "on_demand_price",
    Kind.RESERVED: "reserved_price",
    Kind.FLEXIBLE: "flexible_price",
    Kind.SPOT: "spot_floor",
}
SORTS = ("price", "-price", "vram", "-vram", "fabric", "-fabric", "carbon", "-carbon", "newest", "term")
FACETS = {
    "gpu_model": "gpu_model__name",
    "region": "site__region",
    "country": "site__country",
    "interconnect": "interconnect",
    "runtime": "runtime",
}


def search(
    actor: Actor,
    wanted: Filters,
    *,
    now: datetime,
    sort: str = "price",
    limit: int = 20,
    cursor: str | None = None,
    with_facets: bool = False,
) -> Result:
    """One page of offers. `sort`: one of SORTS. MarketError("invalid_request") for a sort or cursor that is not ours."""
    if sort not in SORTS:
        raise MarketError("invalid_request", f"sort is {sort}", {"/sort": f"one of {', '.join(SORTS)}"})
    base = on_offer(actor)
    steps = conditions(wanted, now)
    matching = base.filter(*[q for _, q in steps])
    rows, more = _page(matching.filter(_large_enough(wanted)), wanted, sort=sort, limit=limit, cursor=cursor, now=now)
    return Result(
        rows=rows,
        has_more=more,
        cursor=_encode(rows[-1].listing, sort) if more else None,
        as_of=now,
        facets=facets(base, wanted, now) if with_facets else {},
        nothing=_why_nothing(base, steps, wanted, now) if not rows and cursor is None else None,
    )


def conditions(wanted: Filters, now: datetime) -> list[tuple[str, Q]]:
    """(name, condition) of each filter that was set, in the order in which "what removed the last offers" is told."""
    start = max(wanted.start or now, now)
    steps: list[tuple[str, Q | None]] = [
        ("gpu_model", Q(gpu_model__name__in=wanted.gpu_model) if wanted.gpu_model else None),
        ("vram_min_mib", _least("gpu_model__vram_mib", wanted.vram_min_mib)),
        ("region", Q(site__region__in=wanted.region) if wanted.region else None),
        ("country", Q(site__country__in=wanted.country) if wanted.country else None),
        ("interconnect", Q(interconnect__in=wanted.interconnect) if wanted.interconnect else None),
        ("fabric_gbps_min", _least("fabric_gbps", wanted.fabric_gbps_min)),
        ("carbon_max_g", None if wanted.carbon_max_g is None else Q(site__carbon_g_per_kwh__lte=wanted.carbon_max_g)),
        ("runtime", Q(runtime__in=wanted.runtime) if wanted.runtime else None),
        ("kind", Q(**{f"{PRICE_COLUMN[Kind(wanted.kind)]}__isnull": False}) if wanted.kind else None),
        ("price_max", _priced(wanted.kinds, wanted.price_max) if wanted.price_max is not None else None),
        ("end", _term(wanted, start)),
        ("count", None if wanted.count is None else Q(min_gpus__lte=wanted.count)),
    ]
    return [(name, q) for name, q in steps if q is not None]


def _least(column: str, value: int | None) -> Q | None:
    return None if value is None else Q(**{f"{column}__gte": value})


def _priced(kinds: Iterable[Kind], most: int | None) -> Q:
    """Offered as one of `kinds`, at `most` or less."""
    found = Q(pk__in=())
    for kind in kinds:
        column = PRICE_COLUMN[kind]
        found |= Q(**{f"{column}__isnull": False}) if most is None else Q(**{f"{column}__lte": most})
    return found


def _term(wanted: Filters, start: datetime) -> Q | None:
    """Terms bind what is reserved; on-demand and spot end when their owner likes."""
    if wanted.end is None or (wanted.kind is not None and wanted.kind not in HOLDING):
        return None
    term = wanted.end - start
    hours, days = term // timedelta(hours=1), -(-term // timedelta(days=1))
    return Q(min_term_hours__lte=hours, max_term_days__gte=days)


def _large_enough(wanted: Filters) -> Q:
    """Only listings whose hosts could hold the block if all were up and free: what the capacity core need not look at."""
    if wanted.count is None:
        return Q()
    hosts = Host.objects.filter(listing=OuterRef("pk"))
    if wanted.level == "host":
        return Q(Exists(hosts.filter(gpu_count__gte=wanted.count)))
    total = hosts.order_by().values("listing").annotate(gpus=Sum("gpu_count"))
    return Q(Exists(total.filter(gpus__gte=wanted.count)))


# --- rows, in the order asked for, with room in the window
def _sorting(sort: str, kinds: tuple[Kind, ...]) -> tuple[Any, bool]:
    """(expression, descending); what has no value comes last either way."""
    columns = {
        "price": Coalesce(*[F(PRICE_COLUMN[k]) for k in kinds], Value(UNKNOWN), output_field=BigIntegerField()),
        "vram": F("gpu_model__vram_mib"),
        "fabric": F("fabric_gbps"),
        "carbon": F("site__carbon_g_per_kwh"),
        "newest": F("id"),
        "term": F("min_term_hours"),
    }
    name, descending = sort.lstrip("-"), sort.startswith("-") or sort == "newest"
    missing = Value(-1 if descending else UNKNOWN)
    return Coalesce(columns[name], missing, output_field=BigIntegerField()), descending


def _page(
    matching: QuerySet[Listing], wanted: Filters, *, sort: str, limit: int, cursor: str | None, now: datetime
) -> tuple[list[Found], bool]:
    found: list[Found] = []
    needs_room = wanted.count is not None or wanted.start is not None
    size = max(FIRST_BATCH, limit + 1) if needs_room else limit + 1
    for batch in _batches(matching, wanted, sort=sort, cursor=cursor, size=size):
        kind = wanted.kind or (Kind.RESERVED if wanted.end is not None else Kind.ON_DEMAND)
        stock = availability.stock(
            batch, now=now, level=wanted.level, kind=kind, starts_at=wanted.start, ends_at=wanted.end
        )
        found += [Found(row, stock[row.pk]) for row in batch if not needs_room or _has_room(row, stock[row.pk], wanted)]
        if len(found) > limit or not needs_room:
            break
    return found[:limit], len(found) > limit


def _has_room(listing: Listing, stock: Stock, wanted: Filters) -> bool:
    return stock.gpus >= max(wanted.count or 1, listing.min_gpus)


def _batches(
    matching: QuerySet[Listing], wanted: Filters, *, sort: str, cursor: str | None, size: int
) -> Iterator[Sequence[Listing]]:
    expression, descending = _sorting(sort, wanted.kinds)
    sign, op = ("-", "lt") if descending else ("", "gt")
    ordered = (
        matching.select_related("site", "gpu_model", "organization")
        .annotate(sort_value=expression)
        .order_by(f"{sign}sort_value", f"{sign}id")
    )
    at = _decode(cursor, sort) if cursor else None
    for _ in range(MAX_BATCHES):
        rows = ordered
        if at is not None:
            rows = rows.filter(Q(**{f"sort_value__{op}": at[0]}) | Q(**{"sort_value": at[0], f"id__{op}": at[1]}))
        batch = list(rows[:size])
        if batch:
            yield batch
        if len(batch) < size:
            return
        at = (batch[-1].sort_value, batch[-1].pk)
        size *= 4


def _encode(row: Listing, sort: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([sort, row.sort_value, row.pk]).encode()).decode()  # type: ignore[attr-defined]


def _decode(cursor: str, sort: str) -> tuple[int, int]:
    try:
        name, value, pk = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        at = int(value), int(pk)
    except (ValueError, TypeError):
        name, at = None, (0, 0)
    if name != sort:
        raise MarketError(
            "invalid_request", "The cursor is not one of this search and sort; start again.", {"/cursor": "invalid"}
        )
    return at


# --- what else there is
def facets(base: QuerySet[Listing], wanted: Filters, now: datetime) -> dict[str, dict[str, int]]:
    """Offers per value of each facet, counted as if its own filter were off. One query, over combinations of values."""
    own = {*FACETS, "kind", "price_max"}
    others = [q for name, q in conditions(wanted, now) if name not in own]
    # Kinds offered differ within a combination of the other facets, so they are part of its key.
    keys = [*FACETS.values(), *[f"sells_{kind}" for kind in Kind.values]]
    rows = (
        base.filter(*others)
        .annotate(**{f"sells_{kind}": _flag(_priced((Kind(kind),), wanted.price_max)) for kind in Kind.values})
        .order_by()
        .values(*keys)
        .annotate(offers=Count("id"))
        .values_list(*keys, "offers")
    )
    names = tuple(FACETS)
    allowed = [frozenset(getattr(wanted, name)) for name in names]
    asked = [kind in wanted.kinds for kind in Kind.values]
    counts: dict[str, dict[str, int]] = {name: defaultdict(int) for name in (*names, "kind")}
    for row in rows:
        values, sells, offers = row[: len(names)], row[len(names) : -1], row[-1]
        fails = [i for i, value in enumerate(values) if allowed[i] and value not in allowed[i]]
        sold = any(sold and wish for sold, wish in zip(sells, asked, strict=True))
        if len(fails) + (not sold) > 1:
            continue  # two filters are in the way: no facet counts it
        for i in fails or (range(len(names)) if sold else ()):
            if values[i]:
                counts[names[i]][values[i]] += offers
        if not fails:
            for kind, one in zip(Kind.values, sells, strict=True):
                if one:
                    counts["kind"][kind] += offers
    return {name: dict(sorted(values.items(), key=lambda v: (-v[1], v[0]))) for name, values in counts.items()}


def _flag(condition: Q) -> Any:
    return ExpressionWrapper(condition, output_field=BooleanField())


def _why_nothing(base: QuerySet[Listing], steps: list[tuple[str, Q]], wanted: Filters, now: datetime) -> dict[str, Any]:
    """`removed_by`: the filter that took the last offers, in the order of `conditions`, "availability" last; `left_before`: how
    many there were until then; `without`: offers if one filter alone were off (only those that would help).
    """
    ever: dict[str, Any] = {"ever_all": Count("id")}
    together = Q()
    for name, q in steps:
        together &= q
        ever[f"upto_{name}"] = Count("id", filter=together)
        rest = Q()
        for other, condition in steps:
            if other != name:
                rest &= condition
        ever[f"without_{name}"] = Count("id", filter=rest) if rest else Count("id")
    counts = base.aggregate(**ever)
    before = counts["ever_all"]
    without = {name: counts[f"without_{name}"] for name, _ in steps if counts[f"without_{name}"]}
    if before == 0:
        return {"removed_by": None, "left_before": 0, "without": {}}
    for name, _ in steps:
        if counts[f"upto_{name}"] == 0:
            return {"removed_by": name, "left_before": before, "without": without}
        before = counts[f"upto_{name}"]
    return {
        "removed_by": "availability",
        "left_before": before,
        "without": {},
        "largest": _most(base, steps, wanted, now),
    }


def _most(base: QuerySet[Listing], steps: list[tuple[str, Q]], wanted: Filters, now: datetime) -> int:
    """The largest block there is in the window, over the first offers by price: what could be asked for instead."""
    rows = list(base.filter(*[q for _, q in steps]).order_by("id")[: FIRST_BATCH * 8])
    kind = wanted.kind or (Kind.RESERVED if wanted.end is not None else Kind.ON_DEMAND)
    stock = availability.stock(rows, now=now, level=wanted.level, kind=kind, starts_at=wanted.start, ends_at=wanted.end)
    return max((s.gpus for s in stock.values()), default=0)
