"""What the fake remembers: one SQLite file, so that a restart forgets nothing.

One connection behind one lock. A request is one transaction; the few statements that the delivery thread runs are too.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, account TEXT NOT NULL,
    created INTEGER NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS objects_kind ON objects (account, kind, seq);
CREATE INDEX IF NOT EXISTS objects_customer ON objects (kind, json_extract(body, '$.customer'));
CREATE INDEX IF NOT EXISTS objects_invoice ON objects (kind, json_extract(body, '$.invoice'));
CREATE INDEX IF NOT EXISTS objects_number ON objects (kind, json_extract(body, '$.number'));
CREATE INDEX IF NOT EXISTS objects_charge ON objects (kind, json_extract(body, '$.charge'));
CREATE TABLE IF NOT EXISTS idempotency (
    scope TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL,
    request_id TEXT NOT NULL, created INTEGER NOT NULL, PRIMARY KEY (scope, key));
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, endpoint TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL, state TEXT NOT NULL DEFAULT 'pending', last_status INTEGER, last_error TEXT);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, next_at);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, body TEXT NOT NULL);
"""

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
Obj = dict[str, Any]


def new_id(prefix: str, length: int = 24) -> str:
    """`in_1Q...`: ids look like Stripe's and never repeat."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(length))


class Store:
    def __init__(self, path: str) -> None:
        self.lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _SCHEMA)
        self.clock_offset = float(self.setting("clock_offset", 0.0))

    def close(self) -> None:
        with self.lock:
            self._db.close()

    def now(self) -> int:
        """Unix seconds, moved by `/_sandbox/clock`."""
        return int(time.time() + self.clock_offset)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything or nothing; other threads wait."""
        with self.lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def savepoint(self) -> None:
        self._db.execute("SAVEPOINT handler")

    def rollback_to_savepoint(self) -> None:
        self._db.execute("ROLLBACK TO handler")

    # --- objects
    def put(self, obj: Obj, *, account: str = "", kind: str | None = None) -> Obj:
        """Insert or replace by id; the order of the first insert is the order of lists."""
        created = obj.get("created")
        self._db.execute(
            "INSERT INTO objects (id, kind, account, created, body) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (
                obj["id"],
                kind or obj["object"],
                account,
                created if isinstance(created, int) else self.now(),
                json.dumps(obj),
            ),
        )
        return obj

    def get(self, id_: str, *, kind: str | None = None, account: str | None = "") -> Obj | None:
        row = self._db.execute("SELECT kind, account, body FROM objects WHERE id = ?", (id_,)).fetchone()
        if row is None or (kind is not None and row[0] != kind) or (account is not None and row[1] != account):
            return None
        return json.loads(row[2])

    def delete(self, id_: str) -> None:
        self._db.execute("DELETE FROM objects WHERE id = ?", (id_,))

    def find(
        self,
        kind: str,
        *,
        account: str | None = "",
        newest_first: bool = False,
        limit: int = -1,
        after: str | None = None,
        before: str | None = None,
        created: dict[str, int] | None = None,
        **equals: Any,
    ) -> list[Obj]:
        """Objects of a kind whose (possibly dotted, written `a__b`) fields equal what is given; None is not a filter."""
        where, args = ["kind = ?"], [kind]
        if account is not None:
            where.append("account = ?")
            args.append(account)
        for name, value in equals.items():
            if value is None:
                continue
            where.append(f"json_extract(body, '$.{name.replace('__', '.')}') = ?")
            args.append(value)
        for cursor, sign in ((after, "<" if newest_first else ">"), (before, ">" if newest_first else "<")):
            if cursor is not None:
                where.append(f"seq {sign} (SELECT seq FROM objects WHERE id = ?)")
                args.append(cursor)
        for op, bound in (created or {}).items():
            where.append(f"created {({'gt': '>', 'gte': '>=', 'lt': '<', 'lte': '<='})[op]} ?")
            args.append(bound)  # type: ignore[arg-type]
        order = "DESC" if newest_first else "ASC"
        if before is not None:
            order = "ASC" if newest_first else "DESC"
        sql = f"SELECT body FROM objects WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"
        rows = [json.loads(r[0]) for r in self._db.execute(sql, (*args, limit))]
        return rows[::-1] if before is not None else rows

    def sum(self, kind: str, field: str, *, account: str = "", **equals: Any) -> int:
        where = "".join(f" AND json_extract(body, '$.{k}') = ?" for k in equals)
        row = self._db.execute(
            f"SELECT COALESCE(SUM(json_extract(body, '$.{field}')), 0) FROM objects WHERE kind = ? AND account = ?{where}",
            (kind, account, *equals.values()),
        ).fetchone()
        return int(row[0])

    def count(self, kind: str, **equals: Any) -> int:
        where = "".join(f" AND json_extract(body, '$.{k}') = ?" for k in equals)
        sql = f"SELECT COUNT(*) FROM objects WHERE kind = ?{where}"
        return int(self._db.execute(sql, (kind, *equals.values())).fetchone()[0])

    def counts(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT kind, COUNT(*) FROM objects GROUP BY kind ORDER BY kind").fetchall())

    # --- settings, idempotency, deliveries
    def setting(self, name: str, default: Any) -> Any:
        with self.lock:
            row = self._db.execute("SELECT body FROM settings WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_setting(self, name: str, value: Any) -> None:
        with self.lock:
            self._db.execute(
                "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                (name, json.dumps(value)),
            )

    def remembered(self, scope: str, key: str) -> tuple[str, int, str, str] | None:
        sql = "SELECT fingerprint, status, body, request_id FROM idempotency WHERE scope = ? AND key = ?"
        return self._db.execute(sql, (scope, key)).fetchone()

    def remember(self, scope: str, key: str, fingerprint: str, status: int, body: str, request_id: str) -> None:
        self._db.execute(
            "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?, ?, ?)",
            (scope, key, fingerprint, status, body, request_id, self.now()),
        )

    def execute(self, sql: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Any other statement, under the lock."""
        with self.lock:
            return self._db.execute(sql, args).fetchall()

    def reset(self, *, keep: str) -> None:
        """Forget every object (but `keep`), key and delivery; settings (faults, clock) stay."""
        with self.transaction():
            self._db.execute("DELETE FROM objects WHERE id != ?", (keep,))
            for table in ("idempotency", "deliveries"):
                self._db.execute(f"DELETE FROM {table}")
