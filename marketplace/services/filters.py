"""What a buyer may ask of an offer: filters by name, and comparisons of any field, as conditions on the columns of `Offers`.

A comparison is written FIELD OP VALUE: `vram_mib>=81920`, `gpu_model!=L40S|A100-80`, `renewable_permille>500`. Text fields know = and
!=, with alternatives between bars; an offer that states no value of the field fails every comparison of it.
"""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np

from marketplace.errors import MarketError
from marketplace.models import Kind
from marketplace.models.listings import PRICE_COLUMNS
from marketplace.services.availability import HOLDING
from marketplace.services.offers import NONE, Mask, Offers
from marketplace.services.price_tiers import Asked
from scheduler.core.capacity import LEVELS

FACETS: Final = ("gpu_model", "region", "country", "interconnect", "runtime")
TEXTS: Final = (*FACETS, "currency")
# Comparable field -> column of `Offers`. What is of hosts holds for every host of the listing.
NUMBERS: Final = {
    "vram_mib": "vram_mib",
    "gpus_per_host": "gpu_count",
    "nvlink_gpus": "nvlink_gpus",
    "vcpu_milli_per_host": "vcpu_milli",
    "ram_mib_per_host": "ram_mib",
    "nvme_gib_per_host": "nvme_gib",
    "fabric_gbps": "fabric_gbps",
    "carbon_g_per_kwh": "carbon_g_per_kwh",
    "renewable_permille": "renewable_permille",
    "reliability_permille": "reliability_permille",
    "verified": "verified",
    "benchmark_score": "benchmark_score",
    "min_gpus": "min_gpus",
    "min_term_hours": "min_term_hours",
    "max_term_days": "max_term_days",
    "eviction_notice_s": "eviction_notice_s",
    "flexible_hours_per_month": "flexible_hours_per_month",
    "flexible_notice_s": "flexible_notice_s",
    "emergency_clause": "emergency_clause",
    "emergency_notice_s": "emergency_notice_s",
    **{name: name for name in PRICE_COLUMNS.values()},
}
COMPARABLE: Final = ("price", *NUMBERS, *TEXTS)  # `price`: of any kind asked for
OPERATORS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MAX_COMPARISONS: Final = 30
_COMPARISON: Final = re.compile(r"\s*([a-z_]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")
_MOST: Final = (1 << 62) - 1


@dataclass(frozen=True)
class Comparison:
    """`values`: one whole number, or texts of which one must be (=) or none may be (!=) the offer's."""

    field: str
    op: str
    values: tuple[int, ...] | tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}{self.op}{'|'.join(map(str, self.values))}"


def comparisons(text: str) -> tuple[Comparison, ...]:
    """From `FIELD OP VALUE, FIELD OP VALUE, ...`; MarketError("invalid_request") says what is wrong with which."""
    parts = [part for part in text.split(",") if part.strip()]
    if len(parts) > MAX_COMPARISONS:
        raise _wrong(f"at most {MAX_COMPARISONS} comparisons")
    return tuple(_comparison(part) for part in parts)


def _comparison(text: str) -> Comparison:
    found = _COMPARISON.fullmatch(text)
    if found is None or not found[3]:
        raise _wrong(f"{text.strip()}: write FIELD OP VALUE, with one of {' '.join(OPERATORS)}")
    name, op, value = found.groups()
    if name in TEXTS:
        if op not in {"=", "!="}:
            raise _wrong(f"{name} is text: use = or !=")
        return Comparison(name, op, tuple(part.strip() for part in value.split("|")))
    if name not in COMPARABLE:
        raise _wrong(f"{name} is no field of an offer: use one of {', '.join(COMPARABLE)}")
    if not value.isascii() or not value.isdigit() or int(value[:20]) > _MOST:
        raise _wrong(f"{name} is compared with a whole number, not with {value[:40]}")
    return Comparison(name, op, (int(value),))


def _wrong(message: str) -> MarketError:
    return MarketError("invalid_request", f"where: {message}", {"/where": message})


@dataclass(frozen=True)
class Filters:
    """What a buyer asks for; empty or None asks for nothing. Prices: millionths of the major unit per GPU-hour. Window: [start, end)."""

    gpu_model: tuple[str, ...] = ()
    vram_min_mib: int | None = None
    region: tuple[str, ...] = ()
    country: tuple[str, ...] = ()
    interconnect: tuple[str, ...] = ()
    fabric_gbps_min: int | None = None
    carbon_max_g: int | None = None  # g/kWh; sites that state none are left out
    runtime: tuple[str, ...] = ()
    verified: bool = False  # every host of it
    reliability_min: int | None = None  # thousandths; what was never counted is left out
    kind: str | None = None
    price_max: int | None = None
    upfront_max_permille: int | None = None  # as services.price_tiers says, with the window's length as the term
    flexible_hours_max: int | None = None
    start: datetime | None = None
    end: datetime | None = None
    count: int | None = None
    level: str = "site"
    resale: bool | None = None  # only what customers sell on, or none of it
    where: tuple[Comparison, ...] = ()

    def __post_init__(self) -> None:
        wrong: dict[str, str] = {}
        if self.level not in LEVELS:
            wrong["/level"] = f"one of {', '.join(LEVELS)}"
        if self.kind is not None and self.kind not in Kind.values:
            wrong["/kind"] = f"one of {', '.join(Kind.values)}"
        if self.count is not None and self.count < 1:
            wrong["/count"] = "at least 1"
        for name in ("upfront_max_permille", "flexible_hours_max"):
            if (getattr(self, name) or 0) < 0:
                wrong[f"/{name}"] = "at least 0"
        if self.end is not None and self.start is None:
            wrong["/start"] = "an end needs a start"
        if self.start and self.end and self.start >= self.end:
            wrong["/end"] = "after start"
        if wrong:
            raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return (Kind(self.kind),) if self.kind else tuple(Kind)

    @property
    def stock_kind(self) -> str:
        """The kind whose lead the window of the stock has."""
        return self.kind or (Kind.RESERVED if self.end is not None else Kind.ON_DEMAND)

    def asked(self, now: datetime) -> Asked:
        """Of prices: for how long, and at most what. Without an end the term is not known."""
        term = None if self.end is None else self.end - max(self.start or now, now)
        term_s = None if term is None else max(0, term // timedelta(seconds=1))
        return Asked(term_s, self.upfront_max_permille, self.flexible_hours_max)


FILTER_NAMES = tuple(f.name for f in fields(Filters))


def stored(wanted: Filters) -> dict[str, Any]:
    """What was asked, as plain JSON; `restored` reads it back."""
    asked = {f.name: getattr(wanted, f.name) for f in fields(Filters)}
    kept = {f.name: asked[f.name] for f in fields(Filters) if asked[f.name] != f.default}
    plain: dict[str, Any] = {}
    for name, value in kept.items():
        if isinstance(value, datetime):
            plain[name] = value.isoformat()
        elif isinstance(value, tuple):
            plain[name] = [str(each) for each in value]
        else:
            plain[name] = value
    return plain


def restored(kept: dict[str, Any]) -> Filters:
    asked: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in kept.items()}
    for name in ("start", "end"):
        if name in asked:
            asked[name] = datetime.fromisoformat(asked[name])
    if "where" in asked:
        asked["where"] = comparisons(",".join(asked["where"]))
    return Filters(**asked)


def conditions(offers: Offers, wanted: Filters, now: datetime) -> list[tuple[str, Mask]]:
    """(name, bool[N]) of each filter that was set, in the order in which "what removed the last offers" is told."""
    start = max(wanted.start or now, now)
    asked, kinds = wanted.asked(now), wanted.kinds
    plain, upfront = (
        replace(asked, upfront_max_permille=None, flexible_hours_max=None),
        replace(asked, flexible_hours_max=None),
    )
    steps: list[tuple[str, Mask | None]] = [
        ("gpu_model", one_of(offers, "gpu_model", wanted.gpu_model)),
        ("vram_min_mib", _least(offers, "vram_mib", wanted.vram_min_mib)),
        ("region", one_of(offers, "region", wanted.region)),
        ("country", one_of(offers, "country", wanted.country)),
        ("interconnect", one_of(offers, "interconnect", wanted.interconnect)),
        ("fabric_gbps_min", _least(offers, "fabric_gbps", wanted.fabric_gbps_min)),
        ("carbon_max_g", _carbon(offers, wanted.carbon_max_g)),
        ("runtime", one_of(offers, "runtime", wanted.runtime)),
        ("verified", _least(offers, "verified", 1 if wanted.verified else None)),
        ("reliability_min", _least(offers, "reliability_permille", wanted.reliability_min)),
        ("resale", None if wanted.resale is None else offers.listings["is_resale"] == int(wanted.resale)),
        *((str(each), _compared(offers, each, kinds, asked)) for each in wanted.where),
        ("kind", priced(offers, kinds, None, plain) if wanted.kind else None),
        ("upfront_max_permille", None if upfront == plain else priced(offers, kinds, None, upfront)),
        ("flexible_hours_max", None if asked == upfront else priced(offers, kinds, None, asked)),
        ("price_max", None if wanted.price_max is None else priced(offers, kinds, wanted.price_max, asked)),
        ("end", _term(offers, wanted, start)),
        ("count", None if wanted.count is None else offers.listings["min_gpus"] <= wanted.count),
    ]
    return [(name, mask) for name, mask in steps if mask is not None]


def one_of(offers: Offers, name: str, texts: tuple[str, ...]) -> Mask | None:
    """bool[N]: the text is one of these; None where nothing is asked."""
    return np.isin(offers.listings[name], offers.names.known(texts)) if texts else None


def _least(offers: Offers, name: str, value: int | None) -> Mask | None:
    return None if value is None else offers.number(name) >= max(value, 0)


def _carbon(offers: Offers, most: int | None) -> Mask | None:
    stated = offers.listings["carbon_g_per_kwh"]
    return None if most is None else (stated != NONE) & (stated <= most)


def priced(offers: Offers, kinds: Iterable[Kind], most: int | None, asked: Asked) -> Mask:
    """bool[N]: offered as one of `kinds`, at `most` or less for what is asked."""
    found = np.zeros(len(offers), bool)
    for kind in kinds:
        price = offers.price(kind, asked)
        found |= (price != NONE) & (price <= (_MOST if most is None else most))
    return found


def _compared(offers: Offers, each: Comparison, kinds: Iterable[Kind], asked: Asked) -> Mask:
    if each.field in TEXTS:
        stated = offers.listings[each.field]
        among = np.isin(stated, offers.names.known(str(v) for v in each.values))
        return among if each.op == "=" else ~among & (stated != NONE)
    of_kinds = each.field == "price"
    columns = [offers.price(kind, asked) for kind in kinds] if of_kinds else [offers.number(NUMBERS[each.field])]
    found = np.zeros(len(offers), bool)
    for column in columns:
        found |= (column != NONE) & OPERATORS[each.op](column, each.values[0])
    return found


def _term(offers: Offers, wanted: Filters, start: datetime) -> Mask | None:
    """Terms bind what is reserved; on-demand and spot end when their owner likes."""
    if wanted.end is None or (wanted.kind is not None and wanted.kind not in HOLDING):
        return None
    term = wanted.end - start
    hours, days = term // timedelta(hours=1), -(-term // timedelta(days=1))
    rows = offers.listings
    return (rows["min_term_hours"] <= hours) & (rows["max_term_days"] >= days)
