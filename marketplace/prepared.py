"""Statements of every call and of every cycle, prepared by the server: parsed, analysed and planned once a connection, where
that costs several times what PostgreSQL then needs to run them.

    found = prepared.row("SELECT id FROM marketplace_site WHERE name = %s", [name])

Parameters are bound by the server, not written into the text, so one whose type nothing tells wants a cast (`%s::text`). The
text must be the same at each call: whatever varies is a parameter (lists as arrays: `= ANY(%s)`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections
from psycopg import Cursor

Parameters = Sequence[Any] | Mapping[str, Any]


def rows(query: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
    """The rows that a statement answers, none for one that answers nothing."""
    cursor = _run(query, parameters)
    return cursor.fetchall() if cursor.description else []


def row(query: str, parameters: Parameters = ()) -> tuple[Any, ...] | None:
    """The first row, if there is one."""
    found: tuple[Any, ...] | None = _run(query, parameters).fetchone()
    return found


def count(query: str, parameters: Parameters = ()) -> int:
    """How many rows a statement wrote."""
    written: int = _run(query, parameters).rowcount
    return written


def _run(query: str, parameters: Parameters) -> Any:
    """On Django's connection, in its transaction and counted with its statements, by the one cursor kept for it."""
    db: Any = connections[DEFAULT_DB_ALIAS]
    db.close_if_health_check_failed()
    db.ensure_connection()
    cursor = getattr(db, "_prepared", None)
    if cursor is None or cursor.connection is not db.connection:
        cursor = db._prepared = Cursor(db.connection)  # noqa: SLF001 (Django's own bind on the client)
    wrapped = db._prepare_cursor(cursor)  # noqa: SLF001 (what `connection.cursor` does with its own)
    wrapped.execute(query, parameters)
    return wrapped
