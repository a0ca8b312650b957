"""The calendar of what is free, as a heat map: of one listing, and of all offers of a search."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django import forms
from django.http import QueryDict
from django.urls import reverse

from marketplace.models import Listing
from marketplace.services import availability, calendars
from marketplace.services.availability import Market
from marketplace.services.search import Filters
from marketplace.tenancy import Actor
from marketplace.web.base import iso_minute
from marketplace.web.tags import LEVEL_WORDS
from scheduler.core.capacity import LEVELS

DAY = timedelta(days=1)
WEEK_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = {1: "1 month", 3: "3 months", 6: "6 months", 12: "12 months"}
HOURS_A_ROW = 6


class CalendarForm(forms.Form):
    """Which block is looked for, and which stretch of time is shown. `day`: that one by the hour."""

    count = forms.IntegerField(label="GPUs, one block", required=False, min_value=1, max_value=1_000_000)
    level = forms.ChoiceField(
        label="All of them in", required=False, choices=[(v, LEVEL_WORDS[v]) for v in reversed(LEVELS)]
    )
    days = forms.IntegerField(label="For days", required=False, min_value=1, max_value=1096)
    start = forms.DateField(
        label="From", required=False, widget=forms.DateInput(attrs={"type": "date"}, format="%Y-%m-%d")
    )
    months = forms.TypedChoiceField(
        label="Show", required=False, coerce=int, empty_value=None, choices=list(MONTHS.items())
    )
    day = forms.DateField(
        label="Hour by hour", required=False, widget=forms.DateInput(attrs={"type": "date"}, format="%Y-%m-%d")
    )


def shown(row: Listing, asked: QueryDict, now: datetime, total: int, market: Market) -> dict[str, Any]:
    """What part/calendar.html shows of a listing. Each step in which the block fits is a link to the quote form filled in."""
    form = CalendarForm({"level": "site", "months": 3, **asked.dict()})
    good = form.is_valid()
    given = {name: form.cleaned_data.get(name) if good else None for name in form.fields}
    count, level = given["count"], given["level"] or "site"
    hours, start, end = _stretch(now, given["start"], given["months"] or 3, given["day"])
    kind = calendars.kind_of(row)
    cuts = calendars.steps(start, end, timedelta(hours=1) if hours else DAY, now)
    steps = calendars.of_listing(row, cuts, now=now, kind=kind, market=market)
    least = max(count or 1, row.min_gpus)

    def link(begin: datetime, finish: datetime) -> str:
        query = {"kind": kind, "gpu_count": least, "level": level, "ends_at": iso_minute(finish)}
        if begin > now:
            query["starts_at"] = iso_minute(begin)
        return f"{reverse('web:quote-new', args=[row.public_id])}?{urlencode(query)}"

    def cell(step: calendars.Step) -> dict[str, Any]:
        gpus = step.gpus[level]
        fits = gpus >= least
        return {
            "gpus": gpus, "levels": step.gpus, "heat": _heat(gpus, total), "fits": count is not None and fits,
            "short": count is not None and not fits, "href": link(step.start, step.end) if fits else None,
        }  # fmt: skip

    return {
        **_table(steps, cell, start, hours=hours),
        "form": form,
        "action": reverse("web:listing", args=[row.public_id]),
        "count": count,
        "level_words": LEVEL_WORDS[level],
        "windows": None
        if count is None
        else _windows(row, given, now=now, kind=kind, end=end, market=market, link=link),
        "days": given["days"] or 1,
    }


def _windows(
    row: Listing, given: dict[str, Any], *, now: datetime, kind: str, end: datetime, market: Market,
    link: Callable[[datetime, datetime], str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The first windows in which the block is free for the days asked for, less what is kept clear between two contracts."""
    days = (given["days"] or 1) * DAY
    span = max(days - 2 * timedelta(seconds=availability.lead_s(row)), timedelta(hours=row.min_term_hours))
    begin = _midnight(given["start"]) if given["start"] else now
    horizon = max(end, begin + span + 366 * DAY)
    found = calendars.first_windows(
        row, gpus=given["count"], level=given["level"] or "site", span=span, starts_at=begin, ends_at=horizon, now=now, kind=kind,
        market=market,
    )  # fmt: skip
    return [
        {"start": a, "end": b, "days": round((b - a) / DAY), "open": b >= horizon, "href": link(a, a + span)}
        for a, b in found
    ]


def market_shown(actor: Actor, wanted: Filters, asked: QueryDict, now: datetime) -> dict[str, Any]:
    """What part/calendar.html shows of a search; each step leads to the offers that fit it."""
    start, end = now.replace(hour=0, minute=0, second=0, microsecond=0), now + 91 * DAY
    if wanted.start is not None and wanted.start > now:
        start = wanted.start.replace(hour=0, minute=0, second=0, microsecond=0)
        end = max(start + 91 * DAY, wanted.end or start)
    steps = calendars.of_search(actor, wanted, calendars.steps(start, end, DAY, now), now=now)
    most = max((step.gpus for step in steps), default=0)

    def cell(step: calendars.MarketStep) -> dict[str, Any]:
        query = asked.copy()
        for name in ("cursor", "view"):
            query.pop(name, None)
        query["start"], query["end"] = iso_minute(max(step.start, now)), iso_minute(step.end)
        return {
            "gpus": step.gpus, "offers": step.offers, "heat": _heat(step.gpus, most),
            "fits": wanted.count is not None and step.offers > 0, "short": wanted.count is not None and not step.offers,
            "href": f"?{query.urlencode()}" if step.offers else None,
        }  # fmt: skip

    return {**_table(steps, cell, start, hours=False), "count": wanted.count, "level_words": LEVEL_WORDS[wanted.level]}


def _midnight(day: Any) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _stretch(now: datetime, first: Any, months: int, day: Any) -> tuple[bool, datetime, datetime]:
    """(by the hour, start, end)."""
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if day is not None:
        start = max(_midnight(day), today)
        return True, start, start + DAY
    start = max(_midnight(first), today) if first is not None else today
    end = start + months * 31 * DAY
    return False, start, end + (7 - end.weekday()) % 7 * DAY  # whole weeks


def _table(
    steps: Sequence[Any], cell: Callable[[Any], dict[str, Any]], start: datetime, *, hours: bool
) -> dict[str, Any]:
    """Rows of a week, or of HOURS_A_ROW hours; the first is filled up with empty cells."""
    columns = HOURS_A_ROW if hours else 7
    before = (steps[0].at.hour % HOURS_A_ROW if hours else steps[0].at.weekday()) if steps else 0
    cells: list[dict[str, Any]] = [{} for _ in range(before)]
    cells += [{"at": step.at, "start": step.start, "end": step.end, **cell(step)} for step in steps]
    return {
        "rows": [cells[i : i + columns] for i in range(0, len(cells), columns)],
        "heads": [f"+{i} h" for i in range(columns)] if hours else WEEK_DAYS,
        "hours": start if hours else None,
    }


def _heat(gpus: int, total: int) -> int:
    return 0 if not total or not gpus else 1 + 3 * min(gpus, total) // total
