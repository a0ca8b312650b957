"""Sites that fall silent: first their placements are `unreachable` (nothing moves), only after the lease are they lost.

A lease counts only while the control plane itself is up: `pulse` notices a gap in its own beat and extends every lease by it.
"""

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F, Max

from marketplace.models import Agent, ControlPulse, Host, Placement, Site
from marketplace.services import conditions, jobs, placements
from marketplace.services.conditions import SILENT
from marketplace.services.transitions import transition_many

HOST_SILENT = timedelta(seconds=150)
GAP = timedelta(seconds=30)


def pulse(*, now: datetime) -> timedelta:
    """Beat; returns by how much the leases were extended because nobody was here to renew them."""
    with transaction.atomic():
        row = ControlPulse.objects.select_for_update().first()
        if row is None:
            ControlPulse.objects.create(at=now)
            return timedelta(0)
        gap = now - row.at
        ControlPulse.objects.filter(pk=row.pk).update(at=now, resumed_at=row.resumed_at if gap <= GAP else now)
        if gap <= GAP:
            return timedelta(0)
        Agent.objects.exclude(lease_until=None).update(lease_until=F("lease_until") + gap)
        return gap


def watch(site: Site, *, now: datetime) -> None:
    """Move placements and hosts of a silent site along, and write down what its hosts are like. The caller holds the site's lock."""
    _watch(site, now)
    conditions.record(sites=[site.pk], now=now)


def _watch(site: Site, now: datetime) -> None:
    seen = Agent.objects.filter(site=site).aggregate(at=Max("last_sync_at"), lease=Max("lease_until"))
    if seen["at"] is None:
        return
    live = Placement.objects.filter(site=site).exclude(state__in=Placement.FINAL)
    if seen["lease"] < now:
        unstarted = list(live.filter(state__in=("intended", "shedding")).values_list("pk", flat=True))
        placements.finish(unstarted, to="released", now=now, actor="lease", reason="site_lost")
        gone = live.exclude(state="parked").values_list("pk", "release_requested_at")
        ends = [
            placements.Ended(pk, "lost", "site_lost", {"release_requested_at": min(asked or seen["at"], seen["at"])})
            for pk, asked in gone
        ]
        placements.end(ends, now=now, actor="lease")
    elif now - _heard_since(seen["at"]) > SILENT:
        ids = list(live.values_list("pk", flat=True))
        transition_many(
            Placement,
            ids,
            expected=("granted", "starting", "running", "draining"),
            to="unreachable",
            now=now,
            actor="lease",
            reason=f"site silent; last beat {seen['at'].isoformat()}",
        )
    else:
        _watch_hosts(site, now)


def _heard_since(last: datetime) -> datetime:
    """The site's last word, or our own return if that is later: while we were away it had nobody to speak to."""
    resumed = _resumed_at()
    return max(last, resumed) if resumed else last


def _resumed_at() -> datetime | None:
    return ControlPulse.objects.exclude(resumed_at=None).values_list("resumed_at", flat=True).first()


def _watch_hosts(site: Site, now: datetime) -> None:
    """Hosts without a beat take no new work; what becomes of their placements the agent says. Who has just come back has heard
    nobody yet, and waits as long for the first beat.
    """
    stale = Host.objects.filter(site=site, state=Host.State.ACTIVE, beat_at__lt=now - HOST_SILENT)
    resumed = _resumed_at()
    if resumed and now - resumed < HOST_SILENT:
        stale = stale.none()
    back = Host.objects.filter(site=site, state=Host.State.LOST, beat_at__gte=now - HOST_SILENT)
    lost = stale.update(state=Host.State.LOST, state_reason="no beat")
    if back.update(state=Host.State.ACTIVE, state_reason="") or lost:
        jobs.nudge_cell(site.cell_id)
