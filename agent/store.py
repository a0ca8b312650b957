"""What the agent must not forget: one SQLite file of small JSON documents, and a lock so that one agent runs a state folder.

Survives kill -9 at any instant: every write is its own transaction (or one of a `batch`), in WAL mode.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Document = dict[str, Any]


class StateBusyError(Exception):
    """Another agent process holds the state folder."""


class Store:
    """Documents by (kind, key). Kinds: placement, host, miner, event, log, gpu_errors, fact."""

    def __init__(self, folder: Path) -> None:
        """Opens (and makes, mode 0700) a state folder. Raises StateBusyError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateBusyError(f"another agent is running on {folder}") from error
        self._db = sqlite3.connect(folder / "state.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS doc (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """All writes within are one transaction."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def put(self, kind: str, key: str, value: Document) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO doc VALUES (?, ?, ?)", (kind, key, json.dumps(value, separators=(",", ":")))
        )

    def get(self, kind: str, key: str) -> Document | None:
        row = self._db.execute("SELECT value FROM doc WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return json.loads(row[0]) if row else None

    def all(self, kind: str) -> dict[str, Document]:
        rows = self._db.execute("SELECT key, value FROM doc WHERE kind = ? ORDER BY key", (kind,))
        return {key: json.loads(value) for key, value in rows}

    def delete(self, kind: str, key: str) -> None:
        self._db.execute("DELETE FROM doc WHERE kind = ? AND key = ?", (kind, key))


def write_private(path: Path, value: Document) -> None:
    """Writes a JSON file that only its owner may read, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
