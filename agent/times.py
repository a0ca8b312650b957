"""Times on the wire are RFC 3339 in UTC; inside the agent they are seconds since the epoch."""

from __future__ import annotations

from datetime import UTC, datetime


def to_wire(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_wire(text: str) -> float:
    """Raises ValueError for a text that is not a time, or has no zone."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"time without a zone: {text!r}")
    return moment.timestamp()
