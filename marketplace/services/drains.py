"""Hosts that leave: drained at once, or by a named hour; taints, which keep all but some jobs away.

A host that drains takes nothing new. With an hour (`by`) it goes on taking what is sure to end before, those who run on it are
told when it is announced, and who is still there at the hour is asked to leave: checkpoint signal, grace, queued again, and
none of it counts against max_restarts. Its hour is now where what runs is asked to leave at once (`evict`). Once its hour has
come and it is empty it is in maintenance, until it is put back to work; one that drains without an hour stays as it is. A gang
that may replace or do without a replica loses only those that stand there.

What the operator writes as the reason stands on the host and in the audit trail. Customers read the kind of work and the hours,
and the reason only where it is marked as public.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import QuerySet

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Host, Job, MaintenanceHost, Placement, Site
from marketplace.outbox import emit
from marketplace.services import audit, conditions, gpu_rule, jobs, placements, replicas
from marketplace.tenancy import Actor

CURE = "Repair it, then run the benchmark (Verify): when it passes, the host is back at work."  # of sick GPUs
PUT_BACK = "marketplace.hosts_put_back"  # by hand, in the midst of maintenance
ABLE = (Host.State.ACTIVE, Host.State.DRAINING)
# Kinds of work, as customers read them.
CATEGORIES = {
    "other": "maintenance",
    "hardware": "work on hardware",
    "network": "work on the network",
    "power": "work on its power",
    "cooling": "work on its cooling",
    "software": "a software update",
}


@dataclass(frozen=True)
class Leave:
    """Why and when hosts leave. With `evict`, what runs is asked to leave at once; `by`: at that hour, and until then they take
    what is sure to end before. `category`: of CATEGORIES; `until`: when they are likely back; `public`: customers may read `reason`.
    """

    reason: str
    evict: bool = False
    by: datetime | None = None
    category: str = "other"
    until: datetime | None = None
    public: bool = False

    def check(self, now: datetime) -> None:
        if self.by is not None and self.by <= now:
            raise MarketError("invalid_request", "by is past: give a later time, or evict.", {"/by": "in the past"})
        if self.by is not None and self.evict:
            raise MarketError(
                "invalid_request", "evict asks what runs to leave now, by at that time.", {"/evict": "one of the two"}
            )
        if self.until is not None and self.until <= (self.by or now):
            raise MarketError(
                "invalid_request", "until is when they are back: after they leave.", {"/until": "too early"}
            )

    @property
    def words(self) -> str:
        """The kind of work and when it ends, for customers."""
        until = f", until about {self.until:%F %R} UTC" if self.until else ""
        return CATEGORIES[self.category] + until + (f" ({self.reason})" if self.public else "")


@transaction.atomic
def drain_host(host: Host, *, actor: Actor, now: datetime, **leave: Any) -> Host:
    """Place nothing new here, or with `by` nothing that may outlast it. `leave`: the fields of `Leave`."""
    host = _host(host, expected=ABLE)
    _drain([host], Leave(**leave), actor=actor, now=now)
    return host


@transaction.atomic
def drain_site(site: Site, *, actor: Actor, now: datetime, **leave: Any) -> list[Host]:
    """As `drain_host`, every host of the site that works; returns them."""
    acquire((Lock.SITE, site.pk))
    rows = Host.objects.filter(site=site, state__in=ABLE).order_by("pk").select_for_update(no_key=True, of=("self",))
    hosts = list(rows.select_related("site"))
    if not hosts:
        raise MarketError("illegal_transition", f"{site.name} has no host that is active or draining.")
    _drain(hosts, Leave(**leave), actor=actor, now=now)
    return hosts


def _drain(hosts: Collection[Host], wanted: Leave, *, actor: Actor, now: datetime) -> None:
    wanted.check(now)
    told = {name: value for name, value in asdict(wanted).items() if name != "by"} | {"until": _text(wanted.until)}
    for host in hosts:
        before = {"state": host.state, "leaves_at": _text(host.leaves_at)}
        host.state, host.state_reason = Host.State.DRAINING, wanted.reason[:200]
        host.leaves_at = now if wanted.evict else wanted.by  # `due` has it in maintenance once it is empty
        host.back_at = None
        after = {"state": host.state, "leaves_at": _text(host.leaves_at), **told}
        _audit(host, actor, "host.drained", now, before=before, after=after)
    ids = {host.pk for host in hosts}
    _taken(ids).update(comes_back=False)  # from now on by hand
    Host.objects.bulk_update(hosts, ["state", "state_reason", "leaves_at", "back_at"], batch_size=500)
    conditions.record(hosts=ids, now=now)
    if wanted.evict:
        leave(ids, now=now, actor=actor.label, reason=f"host drained: {wanted.words}"[:200])
    elif wanted.by is not None:
        _announce(hosts, wanted.by, wanted.words, now=now, actor=actor.label)
    changed(hosts)


def keep_out(host: Host, reason: str, *, actor: Actor, now: datetime) -> None:
    """A host that is not well takes nothing new, whatever was planned for it; what runs stays. The caller holds the site's lock, and
    the row's.
    """
    _taken({host.pk}).update(comes_back=False)
    if host.state not in {Host.State.MAINTENANCE, Host.State.RETIRED}:
        before = host.state
        host.state, host.leaves_at, host.back_at = Host.State.DRAINING, None, None
        _audit(
            host, actor, "host.drained", now, before={"state": before}, after={"state": host.state, "reason": reason}
        )
    host.state_reason = reason[:200]
    host.save(update_fields=["state", "state_reason", "leaves_at", "back_at"])
    conditions.record(hosts=[host.pk], now=now)
    changed([host])


def _announce(hosts: Collection[Host], by: datetime, why: str, *, now: datetime, actor: str) -> None:
    """Those who run there read it in their job's story."""
    name = {host.pk: host.name for host in hosts}
    on: dict[int, set[str]] = defaultdict(set)
    for job_id, host_id in live(name).values_list("job_id", "host_id"):
        on[job_id].add(name[host_id])
    for job in Job.objects.filter(pk__in=on).order_by("pk"):
        which = ", ".join(sorted(on[job.pk]))
        words = f"notice: {which} leaves at {by:%F %R} UTC for {why}; what runs there then is asked to leave"
        replicas.note([job], words, now=now, actor=actor[:120])


@transaction.atomic
def undrain_host(host: Host, *, actor: Actor, now: datetime) -> Host:
    """Back to work: from draining, maintenance or lost."""
    host = _host(host, expected=(Host.State.DRAINING, Host.State.MAINTENANCE, Host.State.LOST))
    if sick := gpu_rule.sick_on([host.pk]):
        raise _sick(host.name, gpu_rule.words(sick[host.pk]))
    _undrain([host], actor=actor, now=now)
    return host


@transaction.atomic
def undrain_site(site: Site, *, actor: Actor, now: datetime) -> list[Host]:
    """Back to work: every host of the site that drains or is in maintenance, but for those with a sick GPU; returns them."""
    acquire((Lock.SITE, site.pk))
    rows = Host.objects.filter(site=site, state__in=(Host.State.DRAINING, Host.State.MAINTENANCE)).order_by("pk")
    hosts = list(rows.select_for_update(no_key=True, of=("self",)).select_related("site"))
    if not hosts:
        raise MarketError("illegal_transition", f"{site.name} has no host that drains or is in maintenance.")
    sick = gpu_rule.sick_on([host.pk for host in hosts])
    hosts = [host for host in hosts if host.pk not in sick]
    if not hosts:
        raise _sick(site.name, f"{len(sick)} hosts with sick GPUs")
    _undrain(hosts, actor=actor, now=now)
    return hosts


def _sick(name: str, why: str) -> MarketError:
    return MarketError("gpu_sick", f"{name}: {why}. {CURE}")


def _undrain(hosts: Collection[Host], *, actor: Actor, now: datetime) -> None:
    for host in hosts:
        before, host.state, host.state_reason, host.leaves_at = host.state, Host.State.ACTIVE, "", None
        host.back_at = None
        _audit(host, actor, "host.undrained", now, before={"state": before}, after={"state": "active"})
    Host.objects.bulk_update(hosts, ["state", "state_reason", "leaves_at", "back_at"], batch_size=500)
    conditions.record(hosts=[host.pk for host in hosts], now=now)
    if _taken({host.pk for host in hosts}).update(given_back_at=now):
        for cell_id in sorted({host.cell_id for host in hosts}):
            emit(PUT_BACK, key=str(cell_id), payload={"cell": cell_id})
    changed(hosts)


def _taken(host_ids: Collection[int]) -> QuerySet[MaintenanceHost]:
    """Rows of maintenance that has these hosts (services.maintenance); by hand is the last word."""
    return MaintenanceHost.objects.filter(host_id__in=host_ids, taken_at__isnull=False, given_back_at=None)


@transaction.atomic
def set_taints(host: Host, taints: Collection[str], *, actor: Actor, now: datetime) -> Host:
    """From now on only jobs that tolerate all of `taints` come here; those that run stay."""
    host = _host(host, expected=[s for s in Host.State.values if s != Host.State.RETIRED])
    before, host.taints = host.taints, sorted(set(taints))
    if before != host.taints:
        host.save(update_fields=["taints"])
        _audit(host, actor, "host.tainted", now, before={"taints": before}, after={"taints": host.taints})
        changed([host])
    return host


def due(site: Site, *, now: datetime) -> int:
    """Whose hour has come: what still runs there is asked to leave, and empty hosts are in maintenance. Returns how many hosts
    are. The caller (scheduler.site_loop) holds the site's lock.
    """
    ids = set(
        Host.objects.filter(site=site, state=Host.State.DRAINING, leaves_at__lte=now).values_list("pk", flat=True)
    )
    if not ids:
        return 0
    leave(ids, now=now, actor="maintenance", reason="drained: the host leaves for maintenance")
    full = set(live(ids).values_list("host_id", flat=True))
    gone = Host.objects.filter(pk__in=ids - full, state=Host.State.DRAINING).update(state=Host.State.MAINTENANCE)
    conditions.record(hosts=ids, now=now)
    return gone


def leave(host_ids: Collection[int], *, now: datetime, actor: str, reason: str) -> None:
    """Ask what stands on these hosts to go: as few replicas as a gang's policy allows, else the whole job, which queues again.
    The caller holds the sites' locks.
    """
    going = live(host_ids).filter(release_requested_at=None).order_by("pk")
    take_off(list(going), now=now, actor=actor, reason=reason)


def take_off(going: Iterable[Placement], *, now: datetime, actor: str, reason: str) -> list[int]:
    """Ask these placements to go, with no more of their gangs than must go with them: as `leave`. The reason's first word is one
    of services.jobs.FAULTS. Returns the jobs of which something was asked to go.
    """
    here: dict[int, list[Placement]] = defaultdict(list)
    for placement in going:
        here[placement.job_id].append(placement)
    rows = {job.pk: job for job in Job.objects.filter(pk__in=here).order_by("pk").select_for_update(no_key=True)}
    gangs: dict[int, list[Placement]] = defaultdict(list)
    for placement in Placement.objects.filter(job_id__in=here):
        gangs[placement.job_id].append(placement)
    single: list[int] = []
    whole: list[int] = []
    for pk, some in here.items():
        gang = replicas.newest(gangs[pk], rows[pk].attempt)
        if replicas.may_lose(rows[pk], gang, {p.rank for p in some}):
            single += [p.pk for p in some]
        else:
            whole.append(pk)
    moved = jobs.preempt(whole, now=now, actor=actor, reason=reason)
    placements.request_release(single, now=now, actor=actor, reason=reason)
    return sorted({*moved, *(here.keys() - whole)})


def live(host_ids: Iterable[int]) -> QuerySet[Placement]:
    """What stands on these hosts."""
    return Placement.objects.filter(host_id__in=list(host_ids)).exclude(state__in=Placement.FINAL)


def _host(host: Host, *, expected: Collection[str]) -> Host:
    """The row locked, where it stands in an expected state."""
    acquire((Lock.SITE, host.site_id))
    found: Host = Host.objects.select_for_update(no_key=True, of=("self",)).select_related("site").get(pk=host.pk)
    if found.state not in expected:
        raise MarketError(
            "illegal_transition", f"Host {found.name} is {found.state}; this needs {', '.join(expected)}."
        )
    return found


def changed(hosts: Collection[Host]) -> None:
    """After a change: the agents are told, the power loops and the cycles run."""
    placements.touch_sites({host.site_id for host in hosts})
    for site_id in sorted({host.site_id for host in hosts}):
        emit("scheduler.site_loop", key=str(site_id), payload={"site": site_id})
    for cell_id in sorted({host.cell_id for host in hosts}):
        jobs.nudge_cell(cell_id)


def _audit(host: Host, actor: Actor, verb: str, now: datetime, *, before: Any, after: Any) -> None:
    audit.record(
        actor, verb, host.public_id, now=now, organization_id=host.site.organization_id, before=before, after=after
    )


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
