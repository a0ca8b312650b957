"""GPUs that a contract has and cannot use for want of a host: which, from which second to which. Nobody pays for them
(`services.commitments`), and who holds them is told (`healing`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from django.db.models import Max, Min, Q, QuerySet

from marketplace.models import (
    Contract,
    Host,
    HostCondition,
    Maintenance,
    MaintenanceHost,
    Placement,
    Reservation,
    ReservationBlock,
    Shortfall,
    Site,
)
from marketplace.services import gpu_rule

FAR = datetime.max.replace(tzinfo=UTC)
_MAINTAINED = MaintenanceHost.objects.filter(
    taken_at__isnull=False, given_back_at=None, maintenance__state__in=Maintenance.LIVE
)
GONE = (  # of hosts: out of work, or of a site that is switched off; what maintenance has it has rows of its own for
    (~Q(state=Host.State.ACTIVE) & Q(back_at=None) | gpu_rule.SICK | Q(site__mode=Site.Mode.OFF))
    & ~Q(pk__in=_MAINTAINED.values("host"))
)


def standing(now: datetime) -> QuerySet[Shortfall]:
    """What is missing now for want of a host."""
    return Shortfall.objects.filter(host__isnull=False, ends_at__gt=now)


def missing(contract: Contract, now: datetime) -> tuple[int, datetime | None]:
    """(GPUs of it that cannot be used now and nobody stands in for, since when). Reads its `shortfalls`, prefetched or not."""
    rows = [row for row in contract.shortfalls.all() if row.host_id is not None and row.starts_at <= now < row.ends_at]
    return sum(row.gpus for row in rows), min((row.starts_at for row in rows), default=None)


@dataclass(frozen=True)
class Stay:
    """The contract's own work on `gpus` of a host during [start, end)."""

    gpus: frozenset[int]
    start: datetime
    end: datetime


def pieces(
    own: Collection[int], out: Iterable[tuple[datetime, datetime, bool]], stays: Iterable[Stay]
) -> list[tuple[int, datetime, datetime]]:
    """(GPUs, start, end) in which so many of a host's `own` GPUs could not be used. `out`: (start, end, dead), when the host took
    nothing new; what ran there ran on, unless it was dead. Pure.
    """
    spans, work = list(out), list(stays)
    marks = {t for a, b, _ in spans for t in (a, b)} | {t for s in work for t in (s.start, s.end)}
    found: list[tuple[int, datetime, datetime]] = []
    for a, b in pairwise(sorted(marks)):
        here = [dead for start, end, dead in spans if start <= a < end]
        if not here:
            continue
        used = set().union(*(s.gpus for s in work if s.start <= a < s.end)) if not any(here) else set()
        gpus = len(set(own) - used)
        if gpus and found and (found[-1][0], found[-1][2]) == (gpus, a):
            found[-1] = (gpus, found[-1][1], b)
        elif gpus:
            found.append((gpus, a, b))
    return found


def write_down(contract: Contract, begun: Sequence[Reservation], now: datetime, clear_at: datetime) -> int:
    """What the contract misses on hosts out of work, from the second in which each was until it is back, or, where others stand in,
    until they are clear. What has been stays as it was. Returns the GPUs that are missing for as long as can be seen.
    """
    if not begun:
        return 0
    held: dict[int, list[tuple[Reservation, set[int]]]] = defaultdict(list)
    by_id = {row.pk: row for row in begun}
    for block in ReservationBlock.objects.filter(reservation__in=begun, host__in=Host.objects.filter(GONE)):
        held[block.host_id].append((by_id[block.reservation_id], set(block.gpu_indices)))
    last = min(row.ends_at for row in begun)
    open_ = {row.host_id: row for row in standing(now).filter(contract=contract, ends_at__gte=last)}
    short = 0
    for host_id in sorted({*held, *filter(None, open_)}):
        row, out = open_.get(host_id), _out(host_id)
        if row is not None and host_id not in held:
            _close(row, _back_at(row) or clear_at)
        if host_id not in held or not out:
            continue
        if row is not None and row.starts_at < out[0][0] and (back := _back_at(row)) is not None:
            _close(row, back)  # it was back meanwhile
            row = None
        found = _missed(contract, host_id, held[host_id], out, row, now)
        gpus = found[-1].gpus if found and found[-1].ends_at > now else 0
        if row is None:
            Shortfall.objects.bulk_create(found)
        elif gpus != row.gpus:
            _close(row, found[-1].starts_at if gpus else now)
            Shortfall.objects.bulk_create(found[-1:] if gpus else [])
        short += gpus
    return short


def _missed(
    contract: Contract, host_id: int, held: Sequence[tuple[Reservation, set[int]]], out: Sequence[tuple[datetime, datetime, bool]],
    row: Shortfall | None, now: datetime,
) -> list[Shortfall]:  # fmt: skip
    """Rows of what it misses on one host; of what is written down already, no more."""
    own = set().union(*(indices for _, indices in held))
    until = min(of.ends_at for of, _ in held)
    written = Shortfall.objects.filter(contract=contract, host=host_id).order_by("-ends_at").first()
    since = max(out[0][0], min(of.starts_at for of, _ in held), row.starts_at if row else out[0][0])
    given_back = MaintenanceHost.objects.filter(host=host_id).aggregate(at=Max("given_back_at"))["at"]
    if row is None:  # after what is written down already, and after maintenance, which has rows of its own
        since = max(filter(None, [since, written and written.ends_at, given_back]))
    spans = [(max(a, since), min(b, until), dead) for a, b, dead in out if a < until and b > since]
    left = Q(finished_at__gt=since) | Q(finished_at=None)
    stays = [
        Stay(frozenset(indices), max(created, since), min(filter(None, [asked, finished, until])))
        for indices, created, asked, finished in Placement.objects.filter(
            left, contract=contract, host=host_id
        ).values_list("gpu_indices", "created_at", "release_requested_at", "finished_at")
        if created < until and min(filter(None, [asked, finished, until])) > since
    ]
    found: list[tuple[int, datetime, datetime]] = []
    for begin, end, sold in _sold(contract, host_id, since, until, now):
        inside = [(max(a, begin), min(b, end), dead) for a, b, dead in spans if a < end and b > begin]
        for gpus, a, b in pieces(_less(own, sold), inside, stays):
            goes_on = bool(found) and (found[-1][0], found[-1][2]) == (gpus, a)
            found.append((gpus, found.pop()[1] if goes_on else a, b))
    return [Shortfall(contract=contract, host_id=host_id, gpus=gpus, starts_at=a, ends_at=b) for gpus, a, b in found]


def _sold(
    contract: Contract, host_id: int, since: datetime, until: datetime, now: datetime
) -> list[tuple[datetime, datetime, set[int]]]:
    """(start, end, GPUs of the host that others had then) from `since` to `until`: what was sold on has come back into the contract's
    own, and was not its to miss before. What is still sold is not among its own yet.
    """
    rows = ReservationBlock.objects.filter(
        host=host_id, reservation__contract__fill__resale__contract=contract, reservation__contract__fill__undone_at=None,
        reservation__maintenance=None, reservation__ends_at__lte=now, reservation__ends_at__gt=since,
    ).values_list("reservation__claims_at", "reservation__ends_at", "gpu_indices")  # fmt: skip
    away = [(max(a, since), min(b, until), set(gpus)) for a, b, gpus in rows if a < until]
    marks = sorted({since, until, *(t for a, b, _ in away for t in (a, b))})
    return [(a, b, set().union(*(gpus for x, y, gpus in away if x <= a < y))) for a, b in pairwise(marks)]


def _less(own: set[int], sold: set[int]) -> set[int]:
    """Without as many as were sold: these devices, or others where they came back under other numbers."""
    order = sorted(own, key=lambda gpu: (gpu in sold, gpu))
    return set(order[: max(0, len(own) - len(sold))])


def _out(host_id: int) -> list[tuple[datetime, datetime, bool]]:
    """(start, end, dead) of how the host is out of work, without a gap up to now; the last goes on. [] where it is at work."""
    found: list[tuple[datetime, datetime, bool]] = []
    for row in HostCondition.objects.filter(host=host_id).order_by("-starts_at", "-pk"):
        if row.kind == HostCondition.Kind.ABLE or (found and row.ends_at != found[0][0]):
            break
        found.insert(0, (row.starts_at, row.ends_at or FAR, row.kind == HostCondition.Kind.LOST))
    return found


def _back_at(row: Shortfall) -> datetime | None:
    """When its host came back, or was taken for maintenance, which has rows of its own."""
    able = HostCondition.objects.filter(host=row.host_id, kind=HostCondition.Kind.ABLE, starts_at__gt=row.starts_at)
    taken = _MAINTAINED.filter(host=row.host_id, taken_at__gt=row.starts_at)
    first = [
        able.order_by("starts_at").values_list("starts_at", flat=True).first(),
        taken.aggregate(at=Min("taken_at"))["at"],
    ]
    return min(filter(None, first), default=None)


def _close(row: Shortfall, at: datetime) -> None:
    if at <= row.starts_at:
        row.delete()
    elif at != row.ends_at:
        row.ends_at = at
        row.save(update_fields=["ends_at"])
