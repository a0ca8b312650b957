"""OpenADR 3 events as spans in which a node is asked to stay under some watts. Pure: JSON in, spans out; nothing is fetched here.

What of an event counts (OpenADR 3.0.1 and 3.1, section "event"):

    IMPORT_CAPACITY_LIMIT, DISPATCH_SETPOINT   the watts themselves (KW, unless a payload descriptor says W or MW)
    ALERT_GRID_EMERGENCY                       the source's cap, as an emergency
    SIMPLE                                     0 nothing, 1 half of the way to the source's cap, 2 the cap, 3 the cap as an emergency
    PRICE                                      the source's cap, for money alone, where the price reaches its strike (per KWH, or MWH)

Of several payloads of one interval the strictest holds. Intervals that follow each other with the same watts are one span.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

ENDLESS = timedelta(days=365)  # P9999Y: until somebody takes it back
_DURATION = re.compile(
    r"^P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?$"
)
_DAYS = (365, 30, 7, 1)
_WATTS = {"W": 1, "KW": 1_000, "MW": 1_000_000}
_PER_MWH = {"KWH": 1_000, "MWH": 1}


class NotUnderstoodError(ValueError):
    """The event says something that we cannot act on; the text names what."""


@dataclass(frozen=True)
class Terms:
    """What the source says where the signal does not: watts of its node and its cap; the strike that makes a price a call."""

    node_w: int
    cap_w: int
    strike_uusd_mwh: int | None
    ven_name: str


@dataclass(frozen=True)
class Span:
    """[start, end): stay under `cap_w`. `key` is the same whenever the same event is read."""

    key: str
    start: datetime
    end: datetime
    cap_w: int
    mandatory: bool = True
    emergency: bool = False


def duration(text: str) -> timedelta:
    """An ISO 8601 duration; years count 365 days, months 30."""
    found = _DURATION.match(text)
    if found is None or text in {"P", "PT"} or text.endswith("T"):
        raise NotUnderstoodError(f"duration {text[:40]!r}")
    parts = [float(p or 0) for p in found.groups()]
    days = sum(n * d for n, d in zip(parts[:4], _DAYS, strict=True))
    return min(ENDLESS, timedelta(days=min(days, 10_000), hours=parts[4], minutes=parts[5], seconds=parts[6]))


def moment(text: str) -> datetime | None:
    """A date-time; None for the zero date, which stands for `at once`."""
    if text.startswith(("0000-", "0001-01-01")):
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise NotUnderstoodError(f"date {text[:40]!r}") from error
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def spans(event: Mapping[str, Any], terms: Terms, *, descriptors: Sequence[Mapping[str, Any]] = ()) -> list[Span]:
    """The event's spans in order. `descriptors`: the programme's, for an event without its own. Raises NotUnderstoodError."""
    try:
        if not _for_us(event.get("targets") or [], terms.ven_name):
            return []
        units = {d["payloadType"]: d for d in event.get("payloadDescriptors") or descriptors if "payloadType" in d}
        found = [
            Span(f"{event['id']}/{number}", start, end, *said)
            for number, start, end, payloads in _intervals(event, terms.ven_name)
            if (said := _strictest(payloads, units, terms)) is not None
        ]
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise NotUnderstoodError(
            f"event {str(event.get('id'))[:40]}: {type(error).__name__} {str(error)[:60]}"
        ) from error
    return _joined(sorted(found, key=lambda s: (s.start, s.key)))


def _for_us(targets: Iterable[Any], ven_name: str) -> bool:
    """3.0: [{"type": "VEN_NAME", "values": [..]}, ..]; 3.1: ["name", ..]. An event without such a target is for everybody."""
    named = False
    for target in targets:
        if isinstance(target, str):
            named = True
            if target == ven_name:
                return True
        elif target.get("type") == "VEN_NAME":
            named = True
            if ven_name in target.get("values", []):
                return True
    return not named


def _intervals(event: Mapping[str, Any], ven_name: str) -> Iterable[tuple[int, datetime, datetime, Sequence[Any]]]:
    whole = event.get("intervalPeriod") or {}
    made = moment(event["createdDateTime"]) if event.get("createdDateTime") else None
    at: datetime | None = None
    for order, interval in enumerate(event["intervals"]):
        period = interval.get("intervalPeriod") or {}
        if "start" in period or at is None:
            at = moment(period.get("start") or whole.get("start") or "0000-") or made
            if at is None:
                raise NotUnderstoodError(f"event {event['id']} begins at once and does not say when it was made")
            spread = period.get("randomizeStart") or whole.get("randomizeStart")
            if spread:
                at += duration(spread) * _draw(f"{ven_name} {event['id']}")
        end = at + duration(period.get("duration") or whole.get("duration") or event.get("duration") or "P9999Y")
        if end <= at:
            raise NotUnderstoodError(f"event {event['id']} has an interval of no length")
        yield int(interval.get("id", order)), at, end, interval["payloads"]
        at = end


def _draw(text: str) -> float:
    """0 to 1, the same each time: a randomized start does not move when the event is read again."""
    return int.from_bytes(sha256(text.encode()).digest()[:4]) / 2**32


def _strictest(
    payloads: Sequence[Mapping[str, Any]], units: Mapping[str, Mapping[str, Any]], terms: Terms
) -> tuple[int, bool, bool] | None:
    """(cap, mandatory, emergency) of one interval."""
    said = [found for p in payloads if (found := _payload(p, units.get(p["type"], {}), terms)) is not None]
    if not said:
        return None
    return min(cap for cap, _, _ in said), any(m for _, m, _ in said), any(e for _, _, e in said)


def _payload(payload: Mapping[str, Any], unit: Mapping[str, Any], terms: Terms) -> tuple[int, bool, bool] | None:
    kind, values = payload["type"], payload.get("values") or []
    if kind == "ALERT_GRID_EMERGENCY":
        return terms.cap_w, True, True
    if kind not in {"IMPORT_CAPACITY_LIMIT", "DISPATCH_SETPOINT", "SIMPLE", "PRICE"}:
        return None
    try:
        value = float(values[0])
    except (ValueError, IndexError) as error:
        raise NotUnderstoodError(f"{kind} of {values!r}"[:120]) from error
    if not -1e12 < value < 1e12:
        raise NotUnderstoodError(f"{kind} of {value}")
    if kind == "SIMPLE":
        level = int(value)
        if level <= 0:
            return None
        return (terms.node_w + terms.cap_w) // 2 if level == 1 else terms.cap_w, True, level >= 3
    if kind == "PRICE":
        return _price(value, unit, terms)
    scale = _WATTS.get(str(unit.get("units") or "KW").upper())
    if scale is None:
        raise NotUnderstoodError(f"{kind} in units of {unit.get('units')!r}")
    return min(terms.node_w, max(0, int(value * scale))), True, False


def _price(value: float, unit: Mapping[str, Any], terms: Terms) -> tuple[int, bool, bool] | None:
    per = _PER_MWH.get(str(unit.get("units") or "KWH").upper())
    if per is None or str(unit.get("currency") or "USD").upper() != "USD":
        raise NotUnderstoodError(f"PRICE in {unit.get('currency')!r} per {unit.get('units')!r}")
    if terms.strike_uusd_mwh is None or value * per * 1_000_000 < terms.strike_uusd_mwh:
        return None
    return terms.cap_w, False, False


def _joined(rows: Sequence[Span]) -> list[Span]:
    out: list[Span] = []
    for row in rows:
        last = out[-1] if out else None
        alike = last is not None and (last.cap_w, last.mandatory, last.emergency) == (
            row.cap_w,
            row.mandatory,
            row.emergency,
        )
        if last is not None and alike and last.end == row.start:
            out[-1] = replace(last, end=row.end)
        else:
            out.append(row)
    return out
