"""What the GPUs that a call held lower come to, by the clock, before any invoice says so: for the call's report, its notices, the P&L.

`billing.held_lower` credits the same by recorded seconds of use.
"""

from collections import defaultdict
from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from django.db.models import Q, QuerySet

from billing.core import rating
from marketplace.models import HeldLower, Placement


class Spell(NamedTuple):
    """`placement` ran on GPUs held lower from `begins` to `ends`; `milli` milli-GPUs of it are credited."""

    placement: Placement
    row: HeldLower
    begins: datetime
    ends: datetime

    @property
    def milli(self) -> int:
        return rating.withheld(self.placement.milli_gpus, self.row.gpu_w, self.row.full_w)


def spells(rows: Collection[HeldLower], placements: QuerySet[Placement], *, until: datetime) -> list[Spell]:
    """Of the placements that may be seen, those that ran meanwhile, up to `until`; by begin."""
    held: dict[int, list[HeldLower]] = defaultdict(list)
    for row in rows:
        held[row.host_id].append(row)
    if not held:
        return []
    ran = (
        placements.filter(host__in=held, running_at__lt=until)
        .filter(Q(release_requested_at=None) | Q(release_requested_at__gt=min(r.starts_at for r in rows)))
        .select_related("contract")
    )
    found = []
    for placement in ran.order_by("pk"):
        assert placement.running_at is not None
        over = min(at for at in (placement.release_requested_at, placement.finished_at, until) if at is not None)
        for row in held[placement.host_id]:
            begins, ends = max(placement.running_at, row.starts_at), min(over, row.ends_at or until)
            if begins < ends:
                found.append(Spell(placement, row, begins, ends))
    return sorted(found, key=lambda s: (s.begins, s.placement.pk))
