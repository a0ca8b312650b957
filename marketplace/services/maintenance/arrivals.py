"""GPUs that come back to a contract under work that was announced meanwhile: of an offer that nobody took, or of a sale that is undone."""

from collections.abc import Collection
from datetime import datetime

from marketplace.models import Contract, Maintenance, MaintenanceHost
from marketplace.services.maintenance import notices, planning, taking


def meet(contract: Contract, host_ids: Collection[int], *, now: datetime) -> None:
    """Others stand in where there are any, its people are told at once, and what is missing now is written down. Callers hold the
    cell's lock.
    """
    there = MaintenanceHost.objects.filter(
        host__in=host_ids, given_back_at=None, maintenance__state__in=Maintenance.LIVE, maintenance__ends_at__gt=now
    )
    works = Maintenance.objects.filter(pk__in=there.values("maintenance")).select_related("site").order_by("pk")
    for row in works:
        planning.stand_in(row, max(row.away_at, now), row.ends_at, now=now, only=contract.pk)
        notices.tell_new(row, planning.impact(row, now=now), now=now)
    if works:
        taking.record(host_ids, now=now)
