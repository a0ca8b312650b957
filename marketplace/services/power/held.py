"""GPUs held lower for a call of the grid: to how much, since when, until when, and that the jobs on them know.

A row begins in the statement that commands the lower limits, and is over when the host has read its full ones back: by those
seconds it is credited. Every function is idempotent and runs under the site's lock.
"""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

from django.db import connection
from django.db.models import F

from marketplace.models import HeldLower, Host, Job, JobEvent, Placement
from marketplace.services import replicas
from marketplace.services.power.ledger import Ledger


def begin(hosts: Collection[Host], calls: Mapping[int, int], *, now: datetime) -> None:
    """`call_gpu_w` of the hosts has just been lowered, each for the call named (host id -> call id)."""
    standing = HeldLower.objects.filter(host__in=[h.pk for h in hosts], ends_at=None)
    standing.filter(starts_at__gte=now).delete()
    standing.update(ends_at=now)
    HeldLower.objects.bulk_create(
        HeldLower(host=h, curtailment_id=calls[h.pk], gpu_w=h.gpu_most_w, full_w=h.gpu_max_w, starts_at=now)
        for h in hosts
    )


def lift(hosts: Iterable[Host]) -> None:
    """They were commanded their full limits."""
    for host in hosts:
        HeldLower.objects.filter(host=host, ends_at=None).update(lifted_generation=host.desired_generation)


_READ_BACK = """
UPDATE marketplace_heldlower r SET ends_at = %(now)s FROM marketplace_host h
WHERE r.host_id = h.id AND h.id = ANY(%(hosts)s) AND r.ends_at IS NULL AND r.lifted_generation <= h.applied_generation
  AND r.starts_at < %(now)s RETURNING r.id
"""


def settle(ledger: Ledger, *, now: datetime) -> None:
    """End what hosts have read back. Where new work has raised a host's limits since, it is not held any more."""
    held = [h for h in ledger.hosts.values() if ledger.is_held(h)]
    if not held:
        return
    raised = [h for h in held if h.call_gpu_w is not None and max(h.desired_limits_w) > h.call_gpu_w]
    for host in raised:
        host.call_gpu_w = None
    if raised:
        Host.objects.filter(pk__in=[h.pk for h in raised]).update(call_gpu_w=None)
        lift(raised)
    with connection.cursor() as cursor:
        cursor.execute(_READ_BACK, {"now": now, "hosts": [h.pk for h in held]})
        over = [pk for (pk,) in cursor.fetchall()]
    for row in HeldLower.objects.filter(pk__in=over).select_related("host", "curtailment").order_by("pk"):
        text = f"curtailment {row.curtailment.public_id}: GPUs of {row.host.name} may draw {row.full_w} W each again"
        there = Placement.objects.filter(host=row.host, state__in=Placement.AT_SITE, release_requested_at=None)
        replicas.note(Job.objects.filter(pk__in=there.values("job")).order_by("pk"), text, now=now, actor="power")


def tell(site_id: int, *, now: datetime) -> list[tuple[int, int]]:
    """A line in the story of each job whose GPUs are held lower now, once of each limit; also of those that came since. Returns who has
    work there: (call, contract), in order.
    """
    there = HeldLower.objects.filter(
        host__site=site_id, ends_at=None, lifted_generation=None,
        host__placements__state__in=Placement.AT_SITE, host__placements__release_requested_at=None,
        host__placements__gpu_milli__gt=0,
    )  # fmt: skip
    rows = list(
        there.select_related("host", "curtailment").annotate(
            job=F("host__placements__job"), contract=F("host__placements__contract")
        )
    )
    if not rows:
        return []
    said = {(row.job, words(row)) for row in rows}
    known = JobEvent.objects.filter(job__in={job for job, _ in said}, reason__in={text for _, text in said})
    fresh = sorted(said - set(known.values_list("job_id", "reason")))
    jobs = Job.objects.in_bulk({job for job, _ in fresh})
    for job, text in fresh:
        replicas.note([jobs[job]], text, now=now, actor="power")
    return sorted({(row.curtailment_id, row.contract) for row in rows})


def words(row: HeldLower) -> str:
    """Of a job's story."""
    return f"curtailment {row.curtailment.public_id}: GPUs of {row.host.name} held to {row.gpu_w} W each"
