"""Prices of energy from outside, as rows: a CSV file, JSON by HTTP, or a grid operator's own data through `gridstatus`.

    CSV    zone,start,usd_per_mwh[,carbon_g_per_kwh]        a line an interval, `start` in ISO 8601 with its offset
    JSON   {"prices": [{"zone", "start", "usd_per_mwh", "carbon_g_per_kwh"}]}
    gridstatus (the extra `gridstatus`, imported when asked)   GRIDSTATUS_PRICES="ercot/REAL_TIME_15_MIN/HB_WEST=us-tx"

A zone is the region of the sites that it prices; the nameless zone prices all others. Prices below zero are real, a price of
exactly zero is what a feed says that does not know (`feeds.store` refuses it). A row that cannot be read is refused with its place.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any

MOST_USD_MWH = 100_000
MOST_G_KWH = 5_000


class PriceFileError(ValueError):
    """A feed that cannot be read; says which row and why."""


@dataclass(frozen=True)
class Row:
    """The price of the interval that begins at `start`; carbon in grams per MWh, None where the feed does not say."""

    zone: str
    start: datetime
    uusd_mwh: int
    carbon_g_mwh: int | None = None


def read_csv(text: str) -> list[Row]:
    """Raises PriceFileError where a column is missing or a row cannot be read."""
    table = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    missing = {"zone", "start", "usd_per_mwh"} - set(table.fieldnames or ())
    if missing:
        raise PriceFileError(f"the first line names no {', '.join(sorted(missing))}")
    return rows((f"line {table.line_num}", row) for row in table)


def read_json(body: Any) -> list[Row]:
    """Raises PriceFileError on another shape."""
    found = body.get("prices") if isinstance(body, dict) else None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise PriceFileError('no {"prices": [...]} of objects')
    return rows((f"prices/{i}", row) for i, row in enumerate(found))


def read_gridstatus(which: str) -> list[Row]:
    """`ISO/MARKET/LOCATION=ZONE`, several by commas: the newest interval of each. Raises PriceFileError where it does not answer."""
    try:
        grid = import_module("gridstatus")
    except ImportError as error:
        raise PriceFileError(
            "GRIDSTATUS_PRICES is set, and gridstatus is not installed: the extra `gridstatus`"
        ) from error
    found = []
    for entry in filter(None, (part.strip() for part in which.split(","))):
        where, _, zone = entry.partition("=")
        try:
            iso, market, location = where.split("/", 2)
            source = grid.get_iso(iso.lower())()
            kind = grid.Markets(market)
            # ERCOT settles at settlement point prices, the others at locational marginal prices.
            ask, column = (source.get_spp, "SPP") if hasattr(source, "get_spp") else (source.get_lmp, "LMP")
            answer = ask(date="latest", market=kind, locations=[location]).to_dict("records")
            newest = max(answer, key=lambda row: row["Interval Start"])
            found.append(
                (entry, {"zone": zone, "start": newest["Interval Start"].isoformat(), "usd_per_mwh": newest[column]})
            )
        except Exception as error:  # whatever a scraper of somebody's pages may raise
            raise PriceFileError(f"{entry}: {type(error).__name__}: {error}") from error
    return rows(found)


def rows(table: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """(place, row) -> rows; raises PriceFileError with the place."""
    found = []
    for place, row in table:
        try:
            found.append(_row(row))
        except (KeyError, InvalidOperation, ValueError) as error:
            raise PriceFileError(f"{place}: {error}") from error
    return found


def _row(row: Mapping[str, Any]) -> Row:
    start = datetime.fromisoformat(str(row["start"]))
    if start.tzinfo is None:
        raise ValueError("start has no offset from UTC")
    price, said = Decimal(str(row["usd_per_mwh"])), row.get("carbon_g_per_kwh")
    if not price.is_finite() or abs(price) > MOST_USD_MWH:
        raise ValueError(f"usd_per_mwh is {price}")
    carbon = None if said in (None, "") else Decimal(str(said))
    if carbon is not None and not (carbon.is_finite() and 0 <= carbon <= MOST_G_KWH):
        raise ValueError(f"carbon_g_per_kwh is {carbon}")
    return Row(
        str(row.get("zone") or ""),
        start.astimezone(UTC),
        int(price * 1_000_000),
        None if carbon is None else int(carbon * 1000),
    )
