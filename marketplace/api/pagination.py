"""Lists: `{data, has_more, cursor}`, by keyset on the id, never by offset."""

import base64
from typing import Any

from django.db.models import QuerySet

from marketplace.errors import MarketError

MAX_LIMIT = 100


def page(queryset: QuerySet[Any], query: dict[str, str], *, order: str = "-id") -> tuple[list[Any], bool, str | None]:
    """One page: (rows, has_more, cursor). `order`: "id", or "-id" for the newest first.

    Reads `limit` (1..100, default 20) and `cursor` from the query string.
    """
    limit = _limit(query.get("limit", "20"))
    ordered = queryset.order_by(order)
    if cursor := query.get("cursor"):
        ordered = ordered.filter(**{"id__lt" if order == "-id" else "id__gt": _decode(cursor)})
    rows = list(ordered[: limit + 1])
    more = len(rows) > limit
    rows = rows[:limit]
    return rows, more, _encode(rows[-1].pk) if more else None


def _limit(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(MAX_LIMIT)) or not 1 <= int(text) <= MAX_LIMIT:
        raise MarketError(
            "invalid_request", f"limit is {text[:20]}; it must be 1 to {MAX_LIMIT}", {"/limit": f"1 to {MAX_LIMIT}"}
        )
    return int(text)


def _encode(pk: int) -> str:
    return base64.urlsafe_b64encode(str(pk).encode()).decode()


def _decode(cursor: str) -> int:
    """The id of the last row shown. Only what `_encode` writes is taken."""
    try:
        pk = int(base64.urlsafe_b64decode(cursor.encode()))
    except ValueError:  # of the alphabet, of the digits
        pk = -1
    if not 0 < pk < 1 << 63 or _encode(pk) != cursor:
        raise MarketError(
            "invalid_request", "The cursor is not one of ours; start again without it.", {"/cursor": "invalid"}
        )
    return pk
