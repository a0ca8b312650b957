"""Lists: `{data, has_more, cursor}`, by keyset on (ordering column, id), never by offset."""

import base64
import json
from typing import Any

from django.db.models import Q, QuerySet
from django.utils.dateparse import parse_datetime

from marketplace.errors import MarketError

MAX_LIMIT = 100


def page(queryset: QuerySet[Any], query: dict[str, str], *, order: str = "-id") -> tuple[list[Any], bool, str | None]:
    """One page: (rows, has_more, cursor). `order` is a column, `-` for descending; ties go by id the same way.

    Reads `limit` (1..100, default 20) and `cursor` from the query string.
    """
    limit = _limit(query.get("limit", "20"))
    descending, column = order.startswith("-"), order.lstrip("-")
    sign = "-" if descending else ""
    ordered = queryset.order_by(f"{sign}{column}", f"{sign}id") if column != "id" else queryset.order_by(f"{sign}id")
    if cursor := query.get("cursor"):
        value, pk = _decode(cursor)
        op = "lt" if descending else "gt"
        after = Q(**{f"id__{op}": pk})
        if column != "id":
            after = Q(**{f"{column}__{op}": value}) | (Q(**{column: value}) & after)
        ordered = ordered.filter(after)
    rows = list(ordered[: limit + 1])
    more = len(rows) > limit
    rows = rows[:limit]
    return rows, more, _encode(rows[-1], column) if more else None


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LIMIT:
        raise MarketError(
            "invalid_request", f"limit is {text}; it must be 1 to {MAX_LIMIT}", {"/limit": f"1 to {MAX_LIMIT}"}
        )
    return int(text)


def _encode(row: Any, column: str) -> str:
    value: Any = getattr(row, column) if "__" not in column else None
    plain = value.isoformat() if hasattr(value, "isoformat") else value
    return base64.urlsafe_b64encode(json.dumps([plain, row.pk]).encode()).decode()


def _decode(cursor: str) -> tuple[Any, int]:
    try:
        value, pk = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        if isinstance(value, str) and (moment := parse_datetime(value)):
            value = moment
        return value, int(pk)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MarketError(
            "invalid_request", "The cursor is not one of ours; start again without it.", {"/cursor": "invalid"}
        ) from error
