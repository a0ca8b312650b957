"""Days of hosts, counted from our own telemetry, and the scores that come of them (rules: scheduler.core.reliability).

`roll_up` counts a few days anew, from conditions, ended placements and errors, and then sums the last 30 of every host: bounded work,
whatever the age of a host. A placement counts on the day of its end.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import date, datetime, time, timedelta
from typing import Any, Final
from uuid import UUID

from django.db import connection, transaction
from django.db.models import Q, QuerySet

from marketplace.models import GpuError, Host, HostCondition, Placement, Reliability
from marketplace.services import maintenance
from scheduler.core import reliability as core

EVENTS_SHOWN: Final = 100
WORDS: Final = {  # part -> what it says, and in what it is counted
    "availability": ("Able to work", "hours on offer"),
    "starts": ("Jobs that started", "starts"),
    "gpus": ("GPU-days without an error", "GPU-days"),
    "drains": ("Left in time when asked", "leaves"),
}
_COLUMNS: Final = tuple(f.name for f in fields(core.Counts))
# A start that never came to run for a reason that is not the job's: an exit code is the command's own (126, 127).
HOST_FAULTS: Final = ("start_failed", "host_lost", "supervisor_lost", "power_lost")
_FAILED_START: Final = (
    "p.running_at IS NULL AND p.state IN ('failed', 'lost') AND p.exit_code IS NULL"
    " AND split_part(p.reason, ':', 1) = ANY (%(faults)s)"
)
_ASKED: Final = "p.running_at IS NOT NULL AND p.state <> 'lost' AND p.release_requested_at < p.finished_at"
_LATE: Final = f"{_ASKED} AND p.finished_at > p.release_requested_at + (j.checkpoint_grace_s + {core.DRAIN_SLACK_S}) * interval '1 s'"
_DAY: Final = f"""
WITH spans AS (
  SELECT host_id, kind, extract(epoch FROM least(coalesce(ends_at, %(end)s), %(end)s) - greatest(starts_at, %(start)s)) AS s
  FROM marketplace_hostcondition WHERE starts_at < %(end)s AND (ends_at IS NULL OR ends_at > %(start)s)
), been AS (
  SELECT host_id, floor(coalesce(sum(s) FILTER (WHERE kind <> 'not_offered'), 0))::bigint AS offered_s,
    floor(coalesce(sum(s) FILTER (WHERE kind = 'able'), 0))::bigint AS able_s,
    floor(coalesce(sum(s) FILTER (WHERE kind = 'silent'), 0))::bigint AS silent_s
  FROM spans GROUP BY host_id
), work AS (
  SELECT c.host_id,
    floor(sum(extract(epoch FROM least(coalesce(c.ends_at, w.until), w.until) - greatest(c.starts_at, w.since))))::bigint AS s
  FROM unnest(%(hosts)s::bigint[], %(since)s::timestamptz[], %(until)s::timestamptz[]) AS w(host_id, since, until)
  JOIN marketplace_hostcondition c ON c.host_id = w.host_id AND c.starts_at < w.until AND (c.ends_at IS NULL OR c.ends_at > w.since)
  WHERE c.kind NOT IN ('able', 'not_offered') GROUP BY c.host_id
), did AS (
  SELECT p.host_id, count(*) FILTER (WHERE p.running_at IS NOT NULL OR ({_FAILED_START})) AS starts,
    count(*) FILTER (WHERE {_FAILED_START}) AS failed_starts,
    count(*) FILTER (WHERE {_ASKED}) AS drains, count(*) FILTER (WHERE {_LATE}) AS late_drains
  FROM marketplace_placement p JOIN marketplace_job j ON j.id = p.job_id
  WHERE p.finished_at >= %(start)s AND p.finished_at < %(end)s GROUP BY p.host_id
), sick AS (
  SELECT host_id, count(DISTINCT gpu) AS gpus FROM marketplace_gpuerror WHERE at >= %(start)s AND at < %(end)s GROUP BY host_id
)
INSERT INTO marketplace_hostday (host_id, day, offered_s, able_s, silent_s, excused_s, starts, failed_starts, gpu_days, sick_gpu_days,
  drains, late_drains)
SELECT b.host_id, %(day)s, b.offered_s, least(b.able_s, b.offered_s), b.silent_s,
  least(coalesce(w.s, 0), b.offered_s - least(b.able_s, b.offered_s)), coalesce(d.starts, 0), coalesce(d.failed_starts, 0),
  CASE WHEN b.offered_s > 0 THEN h.gpu_count ELSE 0 END,
  CASE WHEN b.offered_s > 0 THEN least(coalesce(s.gpus, 0), h.gpu_count) ELSE 0 END, coalesce(d.drains, 0), coalesce(d.late_drains, 0)
FROM been b JOIN marketplace_host h ON h.id = b.host_id LEFT JOIN did d ON d.host_id = b.host_id
LEFT JOIN sick s ON s.host_id = b.host_id LEFT JOIN work w ON w.host_id = b.host_id ORDER BY b.host_id
ON CONFLICT (host_id, day) DO UPDATE SET ({", ".join(_COLUMNS)}) = ROW ({", ".join(f"excluded.{name}" for name in _COLUMNS)})
"""  # noqa: S608
_SUMS: Final = f"""
SELECT d.host_id, h.listing_id, s.organization_id, {", ".join(f"sum(d.{name})::bigint" for name in _COLUMNS)}
FROM marketplace_hostday d JOIN marketplace_host h ON h.id = d.host_id JOIN marketplace_site s ON s.id = h.site_id
WHERE d.day > %s AND d.day <= %s GROUP BY 1, 2, 3 ORDER BY 1
"""  # noqa: S608


def roll_up(*, now: datetime) -> int:
    """Count yesterday, today, and every day of the window of which an error was told late; then score all. Returns hosts scored."""
    today = now.date()
    days = {today - timedelta(days=1), today, *_told_late(now)}
    for day in sorted(days):
        count_day(day, now=now)
    return score_all(now=now)


def _told_late(now: datetime) -> set[date]:
    """Days of errors that came in the last day although they are older: an agent that was cut off tells them when it is back."""
    first = now - timedelta(days=core.WINDOW_DAYS)
    recent = GpuError.objects.filter(received_at__gt=now - timedelta(days=1), at__gt=first)
    return {at.date() for at in recent.order_by().values_list("at", flat=True)}


def count_day(day: date, *, now: datetime) -> int:
    """Count one UTC day of every host, as far as it has passed; replaces what was counted before. Returns hosts."""
    start = datetime.combine(day, time(), now.tzinfo)
    end = min(start + timedelta(days=1), now)
    if end <= start:
        return 0
    touched = HostCondition.objects.filter(starts_at__lt=end).filter(Q(ends_at=None) | Q(ends_at__gt=start))
    with transaction.atomic(), connection.cursor() as cursor:
        away = touched.exclude(kind__in=(HostCondition.Kind.ABLE, HostCondition.Kind.NOT_OFFERED))
        excused = maintenance.covers(set(away.values_list("host_id", flat=True)), start, end)
        windows = [(host, since, until) for host, found in sorted(excused.items()) for since, until in found]
        hosts, since, until = (list(column) for column in zip(*windows, strict=True)) if windows else ([], [], [])
        cursor.execute(
            _DAY,
            {
                "day": day,
                "start": start,
                "end": end,
                "faults": list(HOST_FAULTS),
                "hosts": hosts,
                "since": since,
                "until": until,
            },
        )
        return int(cursor.rowcount)


def score_all(*, now: datetime) -> int:
    """Sum the last 30 days of every host, of its listing and of its operator, and score them."""
    last = now.date()
    with connection.cursor() as cursor:
        cursor.execute(_SUMS, [last - timedelta(days=core.WINDOW_DAYS), last])
        rows = cursor.fetchall()
    groups: dict[str, dict[int, list[core.Counts]]] = {
        n: defaultdict(list) for n in ("host", "listing", "organization")
    }
    for host, listing, organization, *sums in rows:
        counts = core.Counts(*map(int, sums))
        for name, pk in (("host", host), ("listing", listing), ("organization", organization)):
            if pk is not None:
                groups[name][pk].append(counts)
    for name, found in groups.items():
        _write(name, {pk: core.total(counts) for pk, counts in found.items()}, now)
    return len(rows)


def _write(of: str, counted: dict[int, core.Counts], now: datetime) -> None:
    table = [(pk, core.permille(counts), *astuple(counts)) for pk, counts in sorted(counted.items())]
    if not table:
        return
    names = ("score_permille", *_COLUMNS)
    arrays = ", ".join(["%s::bigint[]"] * (1 + len(names)))
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO marketplace_reliability ({of}_id, as_of, {', '.join(names)})"  # noqa: S608
            f" SELECT u.id, %s, {', '.join(f'u.{name}' for name in names)} FROM unnest({arrays}) AS u(id, {', '.join(names)})"
            f" WHERE EXISTS (SELECT FROM marketplace_{of} o WHERE o.id = u.id) ORDER BY u.id"
            f" ON CONFLICT ({of}_id) DO UPDATE SET as_of = excluded.as_of, {', '.join(f'{n} = excluded.{n}' for n in names)}",
            [now, *(list(column) for column in zip(*table, strict=True))],
        )


def counts_of(row: Reliability | None) -> core.Counts:
    """What stands in a row; without one, nothing counted yet."""
    return core.Counts() if row is None else core.Counts(*(getattr(row, name) for name in _COLUMNS))


def said(row: Reliability) -> list[tuple[str, int, str]]:
    """(what, share in thousandths, what was counted) of each part, for people."""
    return [
        (
            WORDS[part.name][0],
            int(part.value * 1000),
            f"{_number(part.good)} of {_number(part.of)} {WORDS[part.name][1]}",
        )
        for part in core.parts(counts_of(row))
    ]


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


# --- errors that agents tell
def take_errors(site_id: int, events: Iterable[dict[str, Any]], *, now: datetime) -> int:
    """Write the `gpu_error` events of an agent's report, each once by its id. What names no host of the site, or is no error, is left
    out: the event itself is kept all the same. Returns how many were new.
    """
    told = [
        (event, error)
        for event in events
        if event["kind"] == "gpu_error" and (error := _error(event.get("data") or {}))
    ]
    names = {str(event.get("subject", "")) for event, _ in told}
    hosts = dict(Host.objects.filter(site_id=site_id, name__in=names).values_list("name", "pk")) if names else {}
    before = GpuError.objects.filter(event_id__in=[event["id"] for event, _ in told]).count() if told else 0
    rows = [
        GpuError(
            host_id=hosts[event["subject"]],
            event_id=UUID(str(event["id"])),
            at=min(event["at"], now),
            received_at=now,
            **error,
        )
        for event, error in told
        if event.get("subject") in hosts
    ]
    if not rows:
        return 0
    GpuError.objects.bulk_create(rows, ignore_conflicts=True)
    return GpuError.objects.filter(event_id__in=[row.event_id for row in rows]).count() - before


def _error(data: dict[str, Any]) -> dict[str, Any] | None:
    gpu, code = data.get("gpu"), data.get("code", 0)
    if not isinstance(gpu, int) or not 0 <= gpu < 1 << 15 or not isinstance(code, int) or not 0 <= code < 1 << 31:
        return None
    return {"gpu": gpu, "code": code, "kind": str(data.get("kind", ""))[:12], "text": str(data.get("text", ""))[:120]}


# --- what stands behind a score
@dataclass(frozen=True)
class Event:
    """Something that counted against a host; `record` is the public id of the row that says so."""

    at: datetime
    until: datetime | None
    kind: str  # draining | maintenance | lost | silent | off | failed_start | late_drain | gpu_error
    text: str
    record: str

    @property
    def words(self) -> str:
        return self.kind.replace("_", " ")


def events(host: Host, *, now: datetime, limit: int = EVENTS_SHOWN) -> list[Event]:
    """The newest of what counted in the window, newest first, at most `limit`."""
    since = now - timedelta(days=core.WINDOW_DAYS)
    found = [*_absences(host, since, limit), *_placements(host, since, limit), *_errors(host, since, limit)]
    return sorted(found, key=lambda e: (e.at, e.record), reverse=True)[:limit]


def _absences(host: Host, since: datetime, limit: int) -> list[Event]:
    rows = host.conditions.exclude(kind__in=(HostCondition.Kind.ABLE, HostCondition.Kind.NOT_OFFERED))
    recent = rows.filter(Q(ends_at=None) | Q(ends_at__gt=since)).order_by("-starts_at")[:limit]
    return [Event(c.starts_at, c.ends_at, c.kind, c.reason, c.public_id) for c in recent]


def _placements(host: Host, since: datetime, limit: int) -> list[Event]:
    """Looked up on the days that counted one: placements are found by the time of their end, not by their host."""
    bad = host.days.filter(Q(failed_starts__gt=0) | Q(late_drains__gt=0), day__gte=since.date())
    days = [datetime.combine(day, time(), since.tzinfo) for day in bad.order_by("-day").values_list("day", flat=True)]
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT p.id, {_LATE} FROM unnest(%(days)s::timestamptz[]) d JOIN marketplace_placement p"  # noqa: S608
            " ON p.finished_at >= d AND p.finished_at < d + interval '1 day' JOIN marketplace_job j ON j.id = p.job_id"
            f" WHERE p.host_id = %(host)s AND (({_FAILED_START}) OR ({_LATE})) ORDER BY p.finished_at DESC LIMIT %(limit)s",
            {"host": host.pk, "days": days, "limit": limit, "faults": list(HOST_FAULTS)},
        )
        late = dict(cursor.fetchall())
    rows: QuerySet[Any] = Placement.objects.filter(pk__in=late)
    return [
        Event(
            p.release_requested_at, p.finished_at, "late_drain", "left later than its grace and a minute", p.public_id
        )
        if late[p.pk]
        else Event(p.finished_at, None, "failed_start", p.reason, p.public_id)
        for p in rows
    ]


def _errors(host: Host, since: datetime, limit: int) -> list[Event]:
    recent = host.gpu_errors.filter(at__gt=since).order_by("-at")[:limit]
    return [
        Event(e.at, None, "gpu_error", f"GPU {e.gpu}: {e.kind} {e.code} {e.text}".rstrip(), e.public_id) for e in recent
    ]
