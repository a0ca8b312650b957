"""What a tariff adds to the price of energy, by time of use and by the grid's coincident peaks. Pure; micro-USD per MWh.

A tariff is a list of parts, each a JSON object with a `kind`; the price at an instant is the market's (or the site's flat one)
plus what every part adds. Times are those of the site's own clock.

    {"kind": "time_of_use", "uusd_mwh": 18000000, "from": "14:00", "to": "20:00", "weekdays": [0, 1, 2, 3, 4], "months": [6, 7, 8, 9]}
        added within the window; `weekdays` (0 = Monday) and `months` may be left out; a window over midnight is one

    {"kind": "coincident_peak", "uusd_mw_year": 100000000000, "expected_hours": 40, "from": "15:00", "to": "18:00", "months": [6, 7, 8, 9]}
        a charge by the draw in the grid's own peak intervals, known afterwards: in hours that may become one, a MWh costs its
        share of the year's charge, so that whoever earns less than that stands still (research/power.md: $50 to $150 a kW-year)

Rules of grids change (the four peaks of a Texan summer are being replaced), so kinds are a plug-in: `register` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Any

Part = Callable[[datetime], int]  # the site's own clock -> micro-USD per MWh


class TariffError(ValueError):
    """A part that cannot be; `field` names what is wrong."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


@dataclass(frozen=True)
class Window:
    start: time
    end: time
    weekdays: frozenset[int]
    months: frozenset[int]

    def holds(self, local: datetime) -> bool:
        """Half-open; one that begins later than it ends goes over midnight and belongs to the day on which it stands."""
        if local.month not in self.months or local.weekday() not in self.weekdays:
            return False
        at = local.time()
        if self.start < self.end:
            return self.start <= at < self.end
        return at >= self.start or at < self.end


_KINDS: dict[str, Callable[[Mapping[str, Any]], Part]] = {}


def register(kind: str, parse: Callable[[Mapping[str, Any]], Part]) -> None:
    """A kind of part: `parse` reads its object and raises TariffError on what it cannot read."""
    _KINDS[kind] = parse


def parse(parts: Any) -> tuple[Part, ...]:
    """Raises TariffError on a part that cannot be read."""
    if not isinstance(parts, list):
        raise TariffError("tariff", "a list of parts")
    found = []
    for i, part in enumerate(parts):
        kind = part.get("kind") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise TariffError(f"tariff/{i}/kind", f"one of {', '.join(sorted(_KINDS))}")
        try:
            found.append(_KINDS[kind](part))
        except TariffError as error:
            raise TariffError(f"tariff/{i}/{error.field}", str(error).partition(": ")[2]) from error
    return tuple(found)


def added_uusd_mwh(parts: Sequence[Part], local: datetime) -> int:
    return sum(part(local) for part in parts)


# --- the kinds that stand
def _time_of_use(part: Mapping[str, Any]) -> Part:
    _known(part, "uusd_mwh")
    window, added = _window(part), _whole(part, "uusd_mwh", -(10**12), 10**12)
    return lambda local: added if window.holds(local) else 0


def _coincident_peak(part: Mapping[str, Any]) -> Part:
    _known(part, "uusd_mw_year", "expected_hours")
    window = _window(part)
    added = _whole(part, "uusd_mw_year", 0, 10**15) // _whole(part, "expected_hours", 1, 8784)
    return lambda local: added if window.holds(local) else 0


def _known(part: Mapping[str, Any], *names: str) -> None:
    for name in part:
        if name not in {"kind", "from", "to", "weekdays", "months", *names}:
            raise TariffError(str(name), "unknown field")


def _whole(part: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = part.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise TariffError(name, f"a whole number from {least} to {most}")
    return value


def _window(part: Mapping[str, Any]) -> Window:
    return Window(
        _time(part, "from"), _time(part, "to"), _some(part, "weekdays", range(7)), _some(part, "months", range(1, 13))
    )


def _time(part: Mapping[str, Any], name: str) -> time:
    try:
        return time.fromisoformat(part.get(name, "00:00"))
    except (TypeError, ValueError) as error:
        raise TariffError(name, "a time like 14:00") from error


def _some(part: Mapping[str, Any], name: str, among: range) -> frozenset[int]:
    value = part.get(name, list(among))
    if not isinstance(value, list) or not value or any(type(v) is not int or v not in among for v in value):
        raise TariffError(name, f"numbers from {among.start} to {among.stop - 1}")
    return frozenset(value)


register("time_of_use", _time_of_use)
register("coincident_peak", _coincident_peak)
