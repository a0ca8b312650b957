"""What control has been told: rows by kind and key, each with a version; a sync carries what was not acknowledged yet."""

from __future__ import annotations

from typing import Any

Row = Any
KINDS = ("hosts", "miners", "meters", "placements")


class Reports:
    """Rows to tell. `urgent` rows set `news`: they should not wait for the next regular report."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, tuple[int, Row]]] = {kind: {} for kind in KINDS}
        self.told: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        self.version = 0
        self.news = False

    def set(self, kind: str, key: str, row: Row, *, urgent: bool = False) -> None:
        old = self.rows[kind].get(key)
        if old is not None and old[1] == row:
            return
        self.version += 1
        self.rows[kind][key] = (self.version, row)
        self.news = self.news or urgent

    def drop(self, kind: str, key: str) -> None:
        self.rows[kind].pop(key, None)
        self.told[kind].pop(key, None)

    def pending(self) -> bool:
        return any(v > self.told[kind].get(key, 0) for kind in KINDS for key, (v, _) in self.rows[kind].items())

    def collect(self, *, full: bool) -> tuple[dict[str, list[Row]], dict[str, dict[str, int]]]:
        """(rows by kind, versions to acknowledge when the call succeeded)."""
        rows: dict[str, list[Row]] = {}
        versions: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            told = self.told[kind]
            chosen = {k: (v, row) for k, (v, row) in self.rows[kind].items() if full or v > told.get(k, 0)}
            rows[kind] = [row for _, row in chosen.values()]
            versions[kind] = {k: v for k, (v, _) in chosen.items()}
        return rows, versions

    def acknowledge(self, versions: dict[str, dict[str, int]]) -> None:
        for kind, keys in versions.items():
            told = self.told[kind]
            for key, version in keys.items():
                if key in self.rows[kind]:
                    told[key] = max(told.get(key, 0), version)
