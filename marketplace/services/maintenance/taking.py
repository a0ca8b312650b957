"""Hosts go and come back: taken before the start, given back at the end, and the seconds that contracts missed meanwhile.

A host that several maintenances have comes back when none of them has it. Who puts it back to work by hand, or drains it by hand,
has the last word (services.drains). Callers hold the locks of the cell and the site.
"""

from collections.abc import Collection, Iterable
from datetime import datetime

from django.db import transaction
from django.db.models import Max, QuerySet

from marketplace.locks import Lock, acquire
from marketplace.models import (
    Host,
    Maintenance,
    MaintenanceHost,
    Placement,
    Reservation,
    ReservationBlock,
    Shortfall,
)
from marketplace.models.maintenance import LEAD
from marketplace.services import conditions, drains
from marketplace.services.availability import LAG_S
from marketplace.services.inventory import SHRANK
from marketplace.services.leases import HOST_SILENT
from marketplace.services.maintenance import planning

GRACE_MOST_S = 3600  # what a job may ask for to write its checkpoint
EARLIEST_S = GRACE_MOST_S + LAG_S  # before the start its hosts may be taken


def due(row: Maintenance, now: datetime) -> list[int]:
    """Ids of hosts that are to be taken now: LEAD before the start, or as early as the grace of what runs there asks for."""
    waiting = row.hosts.filter(taken_at=None).exclude(host__state=Host.State.RETIRED)
    ids = list(waiting.values_list("host_id", flat=True))
    if row.starts_at - LEAD <= now:
        return ids
    left = (row.starts_at - now).total_seconds() - LAG_S
    live = Placement.objects.filter(host_id__in=ids, job__checkpoint_grace_s__gte=left).exclude(
        state__in=Placement.FINAL
    )
    return sorted(set(live.values_list("host_id", flat=True)))


def take(row: Maintenance, host_ids: Collection[int], *, now: datetime) -> None:
    """They take nothing any more, and what runs there is asked to leave: checkpoint signal, grace, queued again, not counted.
    The site's power loop puts them into maintenance once they are empty.
    """
    hosts = list(
        Host.objects.filter(pk__in=host_ids)
        .order_by("pk")
        .select_for_update(no_key=True, of=("self",))
        .select_related("site")
    )
    back = set(
        _open(host_ids).filter(comes_back=True).values_list("host_id", flat=True)
    )  # another maintenance has them already
    words = f"{row.public_id}: {drains.CATEGORIES[row.category]}, until about {row.ends_at:%F %R} UTC"
    for host in hosts:
        comes_back = host.state in {Host.State.ACTIVE, Host.State.LOST} or host.pk in back
        MaintenanceHost.objects.filter(maintenance=row, host=host, taken_at=None).update(
            taken_at=now, comes_back=comes_back
        )
        if comes_back:
            host.back_at = max(filter(None, [host.back_at, row.ends_at]))
            host.state_reason = host.state_reason if host.pk in back else words[:200]
        if host.state in {Host.State.ACTIVE, Host.State.LOST}:
            host.state = Host.State.DRAINING
        if host.state == Host.State.DRAINING:
            host.leaves_at = min(filter(None, [host.leaves_at, now]))
    Host.objects.bulk_update(hosts, ["state", "state_reason", "leaves_at", "back_at"], batch_size=500)
    conditions.record(hosts=[host.pk for host in hosts], now=now)
    Reservation.objects.filter(maintenance=row, contract=None, claims_at__gt=now).update(claims_at=now)
    record(host_ids, now=now)
    drains.leave(host_ids, now=now, actor="maintenance", reason=f"drained: {words}"[:200])
    drains.changed(hosts)


def lengthen(row: Maintenance, *, now: datetime) -> None:
    """It ends later: so do the absences of what it has taken."""
    taken = list(row.hosts.filter(taken_at__isnull=False, given_back_at=None).values_list("host_id", flat=True))
    Host.objects.filter(pk__in=taken, back_at__lt=row.ends_at).update(back_at=row.ends_at)
    record(taken, now=now)


def give_back(row: Maintenance, *, now: datetime) -> None:
    """What it has taken is back at work, but for hosts that another maintenance has, that are not well, or that somebody keeps out."""
    taken = list(row.hosts.filter(taken_at__isnull=False, given_back_at=None).select_related("host__site"))
    if not taken:
        return
    Shortfall.objects.filter(maintenance=row, ends_at=row.ends_at, starts_at__lt=now).update(ends_at=now)
    ids = [each.host_id for each in taken]
    MaintenanceHost.objects.filter(pk__in=[each.pk for each in taken]).update(given_back_at=now)
    others = dict(_open(ids).values_list("host_id").annotate(until=Max("maintenance__ends_at")))
    hosts = list(
        Host.objects.filter(pk__in=ids)
        .order_by("pk")
        .select_for_update(no_key=True, of=("self",))
        .select_related("site")
    )
    comes_back = {each.host_id for each in taken if each.comes_back}
    for host in hosts:
        if host.pk in others:
            host.back_at = others[host.pk] if host.back_at is not None else None
            continue
        host.back_at = None
        if (
            host.pk in comes_back
            and host.state in {Host.State.DRAINING, Host.State.MAINTENANCE}
            and host.state_reason != SHRANK
        ):
            silent = host.beat_at is not None and host.beat_at < now - HOST_SILENT
            host.state = Host.State.LOST if silent else Host.State.ACTIVE
            host.state_reason, host.leaves_at = "no beat" if silent else "", None
    Host.objects.bulk_update(hosts, ["state", "state_reason", "leaves_at", "back_at"], batch_size=500)
    conditions.record(hosts=[host.pk for host in hosts], now=now)
    record(ids, now=now)
    drains.changed(hosts)


def put_back(cell_id: int, *, now: datetime) -> None:
    """Somebody has put hosts back to work by hand: nobody misses them any more, and they can be had again."""
    with transaction.atomic():
        acquire((Lock.CELL, cell_id))
        for row in MaintenanceHost.objects.filter(
            host__cell=cell_id, given_back_at__isnull=False, maintenance__state__in=Maintenance.LIVE
        ):
            ReservationBlock.objects.filter(
                reservation__maintenance=row.maintenance_id, reservation__contract=None, host=row.host_id
            ).delete()
        running = Shortfall.objects.filter(contract__cell=cell_id, host=None, ends_at__gt=now)
        _record(sorted(set(running.values_list("contract_id", flat=True))), now)


def _open(host_ids: Iterable[int]) -> QuerySet[MaintenanceHost]:
    """Rows of live maintenance that has these hosts."""
    return MaintenanceHost.objects.filter(
        host_id__in=list(host_ids), taken_at__isnull=False, given_back_at=None,
        maintenance__state__in=Maintenance.LIVE,
    )  # fmt: skip


def record(host_ids: Collection[int], *, now: datetime) -> None:
    """Write down anew, from now on, what contracts with GPUs on these hosts miss, as planned. What has been stays as it was."""
    _record(planning.contracts_on(host_ids), now)


def _record(contract_ids: list[int], now: datetime) -> None:
    later = Shortfall.objects.filter(contract__in=contract_ids, host=None, ends_at__gt=now)
    later.filter(starts_at__gte=now).delete()
    later.update(ends_at=now)
    Shortfall.objects.bulk_create(
        Shortfall(
            maintenance_id=piece.maintenance, contract_id=piece.contract, gpus=piece.gpus, starts_at=piece.start, ends_at=piece.end
        )
        for piece in planning.short_now(contract_ids, now=now)
        if piece.end > now
    )  # fmt: skip
