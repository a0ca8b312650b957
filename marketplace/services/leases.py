"""Sites that fall silent: first their placements are `unreachable` (nothing moves), only after the lease are they lost.

A lease counts only while the control plane itself is up: `pulse` notices a gap in its own beat and extends every lease by it.
"""

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F

from marketplace import prepared
from marketplace.models import Agent, ControlPulse, Placement, Site
from marketplace.services import conditions, jobs, placements
from marketplace.services.conditions import SILENT
from marketplace.services.transitions import transition_many

HOST_SILENT = timedelta(seconds=150)
GAP = timedelta(seconds=30)
SITE_SILENT = "site silent"  # of a host, why it is lost


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


_HEARD = """
SELECT max(last_sync_at), max(lease_until), (SELECT max(resumed_at) FROM marketplace_controlpulse)
FROM marketplace_agent WHERE site_id = %s
"""
# Of a site that was silent past its lease nothing can be had: its hosts are lost like any without a beat, until they are heard again.
_LOST = """
UPDATE marketplace_host SET state = 'lost', state_reason = %(reason)s WHERE site_id = %(site)s AND state = 'active'
"""
# Hosts without a beat take no new work; what becomes of their placements the agent says.
_BEATS = """
UPDATE marketplace_host SET state = CASE state WHEN 'active' THEN 'lost' ELSE 'active' END,
  state_reason = CASE state WHEN 'active' THEN 'no beat' ELSE '' END
WHERE site_id = %(site)s AND (
  (state = 'active' AND beat_at < %(since)s AND %(judged)s) OR (state = 'lost' AND beat_at >= %(since)s))
"""


def _watch(site: Site, now: datetime) -> None:
    last, lease, resumed = prepared.rows(_HEARD, [site.pk])[0]
    if last is None:
        return
    live = Placement.objects.filter(site=site).exclude(state__in=Placement.FINAL)
    if lease < now:
        unstarted = list(live.filter(state__in=("intended", "shedding")).values_list("pk", flat=True))
        placements.finish(unstarted, to="released", now=now, actor="lease", reason="site_lost")
        gone = live.exclude(state="parked").values_list("pk", "release_requested_at")
        ends = [
            placements.Ended(pk, "lost", "site_lost", {"release_requested_at": min(asked or last, last)})
            for pk, asked in gone
        ]
        placements.end(ends, now=now, actor="lease")
        if prepared.count(_LOST, {"site": site.pk, "reason": SITE_SILENT}):
            jobs.nudge_cell(site.cell_id)
    elif now - max(last, resumed or last) > SILENT:  # while we were away it had nobody to speak to
        ids = list(live.values_list("pk", flat=True))
        transition_many(
            Placement,
            ids,
            expected=("granted", "starting", "running", "draining"),
            to="unreachable",
            now=now,
            actor="lease",
            reason=f"site silent; last beat {last.isoformat()}",
        )
    else:
        judged = not resumed or now - resumed >= HOST_SILENT  # who has just come back waits as long for the first beat
        if prepared.count(_BEATS, {"site": site.pk, "since": now - HOST_SILENT, "judged": judged}):
            jobs.nudge_cell(site.cell_id)
