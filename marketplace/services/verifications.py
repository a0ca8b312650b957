"""Verification: a benchmark that runs on a host as a job of our own, and what the host is taken for because of its figures.

A run takes all GPUs of a host that nobody uses, for some minutes, at no price: a placement like any other, with its watts shed,
confirmed and granted, under a contract that ends with it. It begins only where nothing runs and nobody waits, and is taken back as
soon as a customer waits for that listing. Its figures come as the last line of its log. Rules: scheduler.core.verification.
"""

import json
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import numpy as np
from django.conf import settings
from django.core import signing
from django.core.mail import send_mail
from django.db import connection, transaction

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import (
    Contract,
    Host,
    HostVerification,
    Job,
    Kind,
    Listing,
    LogChunk,
    Membership,
    Organization,
    Placement,
    ReservationBlock,
    Site,
    Verification,
)
from marketplace.services import audit, availability, gpu_health, gpu_rule, jobs, maintenance, placements, power
from marketplace.services import hosts as host_rows
from marketplace.services.transitions import record_created
from marketplace.tenancy import SYSTEM, Actor
from scheduler.core import verification as core

COMMAND: Final = "tailrace-verify"  # what agents run as their own program, wherever they run jobs
RUN_S: Final = 300
MARGIN: Final = timedelta(minutes=10)  # nobody may have a claim on the host so soon
EVERY: Final = timedelta(days=30)
SPREAD_S: Final = 3 * 86_400  # of the next runs, so that hosts that came together part
STALE: Final = timedelta(days=45)
AGAIN: Final = timedelta(hours=1)  # after a first failure, or a run that was taken back
LATER: Final = timedelta(days=1)  # after the second in a row
RETRY: Final = timedelta(minutes=10)  # where it could not begin
LOG_PATIENCE: Final = timedelta(minutes=2)
FAILED_TWICE: Final = "marketplace.verification_failed"
BATCH: Final = 20
_SALT: Final = "tailrace.probe"
_FINGERPRINT: Final = """
md5(concat_ws('|', h.gpu_model_id, h.gpu_count, h.vram_mib, h.nvlink_domains::text,
  (SELECT string_agg(g.serial, ',' ORDER BY g.index) FROM marketplace_gpu g WHERE g.host_id = h.id)))
"""


# --- beginning
def begin(host: Host, *, actor: Actor, now: datetime) -> Verification:
    """Run the benchmark on a host now. MarketError("verification_not_now") says what is in the way."""
    with transaction.atomic():
        acquire((Lock.CELL, host.cell_id), (Lock.SITE, host.site_id))
        rows = Host.objects.select_for_update(no_key=True, of=("self",)).select_related("site", "gpu_model", "listing")
        fresh: Host = rows.get(pk=host.pk)
        _check_free(fresh, now)
        made = _place(fresh, asked_by=actor.label[:120], now=now)
        HostVerification.objects.get_or_create(host=fresh, defaults={"next_at": now})
        HostVerification.objects.filter(host=fresh).update(waits_for="")
        audit.record(
            actor, "host.verification_begun", fresh.public_id, now=now, organization_id=fresh.site.organization_id,
            after={"verification": made.public_id},
        )  # fmt: skip
        outbox.emit("scheduler.site_loop", key=str(fresh.site_id), payload={"site": fresh.site_id})
    return made


def _check_free(host: Host, now: datetime) -> None:
    """Nobody uses it, nobody will soon, nobody waits for it; MarketError otherwise."""
    listing = host.listing
    refused = ""
    repaired = _repaired(host)
    if listing is None or listing.state == Listing.State.RETIRED:
        refused = "put the host into a listing first (a draft will do)"
    elif not (host.state == Host.State.ACTIVE or repaired) or host.site.mode != Site.Mode.AUTO:
        refused = f"the host is {host.state} and its site in mode {host.site.mode}; both must be at work"
    elif power.frozen():
        refused = "the platform's power is frozen; nothing begins until that is lifted"
    elif not host.gpu_count:
        refused = "the host has no GPU"
    elif Verification.objects.filter(host__site_id=host.site_id, state=Verification.State.RUNNING).exists():
        refused = "another verification runs at this site; it takes some minutes"
    elif Placement.objects.filter(host=host).exclude(state__in=Placement.FINAL).exists() or min(host.gpu_free) < 1000:
        refused = "jobs run on the host; it is verified when all of its GPUs are idle"
    elif repaired:
        return  # what is promised there waits for it
    elif _claimed(host, now):
        refused = "a reservation or announced maintenance claims the host within ten minutes"
    elif _awaited(listing.pk).exists():
        refused = "customers wait for capacity of its listing; they come first"
    if refused:
        raise MarketError("verification_not_now", f"{host.name}: {refused}.")


def _repaired(host: Host) -> bool:
    """It is out of work for a sick GPU: a run is how it comes back."""
    return host.state in {Host.State.DRAINING, Host.State.MAINTENANCE} and bool(gpu_rule.sick_on([host.pk]))


def _claimed(host: Host, now: datetime) -> bool:
    soon = availability.live_reservations(now, "reservation__")
    blocks = ReservationBlock.objects.filter(soon, host=host, reservation__claims_at__lt=now + MARGIN)
    return blocks.exists() or bool(maintenance.covers([host.pk], now, now + MARGIN))


def _awaited(listing_id: int) -> Any:
    return Job.objects.filter(contract__listing_id=listing_id, state__in=Job.WAITING).exclude(
        contract__organization__is_house=True
    )


def house(*, livemode: bool) -> Organization:
    """The organization whose jobs verify hosts; one for each mode."""
    made, _ = Organization.objects.get_or_create(
        is_house=True, livemode=livemode, defaults={"name": "Tailrace verification", "is_customer": False}
    )
    return made


def _place(host: Host, *, asked_by: str, now: datetime) -> Verification:
    """Contract, job, placement and its claim on watts; the caller holds the locks, and all of the host is free."""
    listing = host.listing
    assert listing is not None
    of = house(livemode=host.site.organization.livemode)
    contract = Contract.objects.create(
        organization=of, operator=host.site.organization, listing=listing, site=host.site, cell_id=host.cell_id,
        kind=Kind.ON_DEMAND, gpu_model=host.gpu_model, gpu_count=host.gpu_count, starts_at=now,
        ends_at=now + timedelta(seconds=RUN_S) + 2 * MARGIN, price=0, currency=listing.currency, fee_permille=0,
        listing_version=listing.version, terms={"verification": host.public_id}, created_at=now, began_at=now,
    )  # fmt: skip
    record_created(Contract, [contract.pk], state=contract.state, now=now, actor=asked_by, reason="verification")
    job = Job.objects.create(
        organization=of, contract=contract, cell_id=host.cell_id, state=Job.State.PLACED, attempt=1, max_restarts=0,
        name=f"verification of {host.name}", command=[COMMAND], env={"TAILRACE_PROBE_URL": _probe_url(host)},
        checkpoint_grace_s=5, max_seconds=RUN_S, gpus=host.gpu_count, vcpu_milli=min(8000, host.vcpu_free),
        ram_mib=min(16_384, host.ram_free), created_at=now, queued_at=now, priority=-100,
    )  # fmt: skip
    record_created(Job, [job.pk], state=job.state, now=now, actor=asked_by, reason="verification")
    delta = max(0, power.active_watts(host, range(host.gpu_count), cpu_only=False) - host.reserved_w)
    one = np.ones(1, np.int64)
    placements.create(
        placements.Planned(
            job=one * job.pk, rank=one * 0, host=one * host.pk, site=one * host.site_id,
            gpus=["{" + ",".join(map(str, range(host.gpu_count))) + "}"], milli=one * 1000, vram=one * host.vram_mib,
            watts_delta=one * delta, granted=one * 0, delta_w=one * delta,
        ),
        host_rows.Left(
            ids=one * host.pk, gpu_count=one * host.gpu_count, gpu_free=np.zeros((1, 16), np.int64),
            vram_free=np.zeros((1, 16), np.int64), vcpu_free=one * (host.vcpu_free - job.vcpu_milli),
            ram_free=one * (host.ram_free - job.ram_mib), nvme_free=one * host.nvme_free,
            cpu_only=one * host.cpu_only_active, reserved_w=one * host.reserved_w, limits=[None], power_states=[None],
        ),
        now=now,
        actor="verification",
    )  # fmt: skip
    return Verification.objects.create(
        host=host, job=job, asked_by=asked_by, started_at=now, gpu_model=host.gpu_model.name,
        fingerprint=fingerprint(host),
    )  # fmt: skip


def fingerprint(host: Host) -> str:
    """Of the devices that the host states: another model, number, memory, linking or serial is another host."""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {_FINGERPRINT} FROM marketplace_host h WHERE h.id = %s", [host.pk])  # noqa: S608
        found: str = cursor.fetchone()[0]
    return found


def _probe_url(host: Host) -> str:
    token = signing.TimestampSigner(salt=_SALT).sign(f"{host.pk}.{uuid4().hex}")
    return f"{settings.PUBLIC_URL.rstrip('/')}/api/v1/probe/{token}"


def probe_allowed(token: str) -> bool:
    """Whether this token was given to a run, and lately."""
    try:
        signing.TimestampSigner(salt=_SALT).unsign(token, max_age=timedelta(seconds=RUN_S) + 2 * MARGIN)
    except signing.BadSignature:
        return False
    return True


# --- the clock
def clock(*, now: datetime) -> dict[str, int]:
    """What happens because time passes; bounded batches, each row in a transaction of its own. Returns counts."""
    return {
        "concluded": sum(attend(pk, now=now) for pk in _running()),
        "stale": _expire(now),
        "known": _know(now),
        "begun": _begin_due(now),
    }


def _running() -> list[int]:
    rows = Verification.objects.filter(state=Verification.State.RUNNING).order_by("pk")
    return list(rows.values_list("pk", flat=True)[: 10 * BATCH])


def _know(now: datetime) -> int:
    """Hosts on offer that were never seen here get their row; the first run comes within a day."""
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO marketplace_hostverification (host_id, state, score, failures, next_at, waits_for, fingerprint)"
            " SELECT h.id, 'unverified', 0, 0, %s::timestamptz + (3600 + h.id * 40503 %% 82800) * interval '1 s', '', ''"
            " FROM marketplace_host h JOIN marketplace_listing l ON l.id = h.listing_id AND l.state = 'published'"
            " WHERE NOT EXISTS (SELECT FROM marketplace_hostverification v WHERE v.host_id = h.id) ORDER BY h.id"
            " ON CONFLICT DO NOTHING",
            [now],
        )
        return int(cursor.rowcount)


def _expire(now: datetime) -> int:
    """Verified too long ago, or with other devices than are stated now."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE marketplace_hostverification v SET state = 'stale', next_at = %s FROM marketplace_host h"  # noqa: S608
            f" WHERE h.id = v.host_id AND v.state = 'verified' AND (v.verified_at < %s OR v.fingerprint <> {_FINGERPRINT})",
            [now, now - STALE],
        )
        return int(cursor.rowcount)


def _begin_due(now: datetime) -> int:
    due = HostVerification.objects.filter(next_at__lte=now, host__state=Host.State.ACTIVE, host__gpu_count__gt=0)
    listed = due.filter(host__listing__state=Listing.State.PUBLISHED)
    idle = listed.exclude(host__verifications__state=Verification.State.RUNNING)
    begun = 0
    for row in idle.select_related("host__site").order_by("next_at", "pk")[:BATCH]:
        try:
            begin(row.host, actor=SYSTEM, now=now)
            begun += 1
        except MarketError as refusal:
            HostVerification.objects.filter(pk=row.pk).update(
                next_at=now + RETRY, waits_for=(refusal.detail or str(refusal))[:200]
            )
    return begun


# --- the end of a run
def attend(pk: int, *, now: datetime) -> bool:
    """Take a run back where a customer waits, or conclude one that has ended. Returns whether it is over."""
    run = Verification.objects.select_related("host__site", "host__gpu_model", "job__contract").get(pk=pk)
    job = run.job
    if job.state not in Job.FINAL:
        if job.state in Job.WAITING or job.attempt > 1 or _wanted(run.host, job):
            _take_back(job, now)
        return False
    figures, trouble = _printed(job)
    if not figures and job.state == Job.State.SUCCEEDED and now - (job.finished_at or now) < LOG_PATIENCE:
        return False  # its log is on the way
    with transaction.atomic():
        acquire((Lock.SITE, run.host.site_id))
        standing, _ = HostVerification.objects.select_for_update(no_key=True).get_or_create(
            host=run.host, defaults={"next_at": now}
        )
        run.refresh_from_db(fields=["state"])
        if run.state != Verification.State.RUNNING:
            return False  # somebody else was faster
        _conclude(run, standing, figures, trouble, job, now)
    return True


def _wanted(host: Host, job: Job) -> bool:
    """Does a customer wait who could have the host?"""
    return _awaited(job.contract.listing_id).exists() and not _repaired(host)


def _take_back(job: Job, now: datetime) -> None:
    try:
        jobs.cancel(SYSTEM, job, now=now)
    except MarketError as refusal:
        if refusal.code not in {"illegal_transition", "busy"}:  # it has just ended; or next time
            raise


def _printed(job: Job) -> tuple[dict[str, int], str]:
    """(figures, what the program itself says went wrong) of its log's last line of figures."""
    chunks = LogChunk.objects.filter(placement__job=job, stream="stdout").order_by("placement_id", "offset")
    lines = "".join(chunks.values_list("data", flat=True)).splitlines()
    told = next(
        (line.removeprefix(COMMAND).strip() for line in reversed(lines) if line.startswith(f"{COMMAND} {{")), ""
    )
    try:
        found = json.loads(told) if told else {}
        return read(found), "; ".join(str(text) for text in found.get("errors", []))[:500]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return {}, "its figures cannot be read"


def read(found: dict[str, Any]) -> dict[str, int]:
    """FIGURES of what a run printed (docs/agent.md); empty where it printed nothing. Raises on what is no figure."""
    if not found:
        return {}
    gpus, links = found.get("gpus", []), found.get("links", [])
    disk, network = found.get("disk", {}), found.get("network", {})
    figures = {
        "gpus": len(gpus),
        "matmul_gflops": min((int(g["matmul_gflops"]) for g in gpus), default=0),
        "memory_mb_s": min((int(g["memory_mb_s"]) for g in gpus), default=0),
        "fabric_mb_s": min((int(link["mb_s"]) for link in links), default=0),
        "disk_write_mb_s": int(disk.get("write_mb_s", 0)),
        "disk_read_mb_s": int(disk.get("read_mb_s", 0)),
        "network_down_kb_s": int(network.get("down_kb_s", 0)),
        "network_up_kb_s": int(network.get("up_kb_s", 0)),
    }
    if not all(0 <= value < 1 << 40 for value in figures.values()) or len(gpus) > 1 << 10:
        raise ValueError("a figure out of range")
    return figures


def _conclude(
    run: Verification, standing: HostVerification, figures: dict[str, int], trouble: str, job: Job, now: datetime
) -> None:
    host = run.host
    for name, value in figures.items():
        setattr(run, name, value)
    run.finished_at = now
    if not figures and job.state != Job.State.SUCCEEDED and job.exit_code in {None, 137, 143}:
        run.state, run.reason = Verification.State.ABORTED, f"it did not run to its end: {job.state_reason}"[:1000]
        standing.next_at = now + AGAIN
    else:
        wrong = core.shortcomings(figures, bounds_of(host))
        words = (
            [*wrong, *([trouble] if trouble else [])]
            if figures
            else [trouble or f"it printed no figures: {job.state_reason}"]
        )
        run.score = core.score(figures)
        run.state = Verification.State.FAILED if wrong or not figures else Verification.State.PASSED
        run.reason = "; ".join(words)[:1000]
        _judge(run, standing, now)
    run.save()
    standing.save()
    audit.record(
        SYSTEM, "host.verified" if run.state == run.State.PASSED else "host.not_verified", host.public_id, now=now,
        organization_id=host.site.organization_id, after={"verification": run.public_id, "state": run.state, "reason": run.reason},
    )  # fmt: skip


def _judge(run: Verification, standing: HostVerification, now: datetime) -> None:
    if run.state == Verification.State.PASSED:
        standing.state, standing.score, standing.verified_at, standing.run = "verified", run.score, now, run
        standing.failures, standing.fingerprint = 0, run.fingerprint
        if gpu_rule.sick_on([run.host_id]):
            gpu_health.well(run.host, actor=SYSTEM, now=now, why=f"{run.public_id} has passed")
        standing.next_at = now + EVERY + timedelta(seconds=run.host_id * 40_503 % SPREAD_S)
        return
    standing.failures += 1
    if standing.failures < 2:  # once may be chance: again soon, and until then it stays what it was
        standing.next_at = now + AGAIN
        return
    standing.state, standing.score, standing.next_at = "failed", 0, now + LATER
    if standing.failures == 2:
        outbox.emit(FAILED_TWICE, key=str(run.pk), payload={"verification": run.pk})


def tell_operator(pk: int) -> None:
    """By mail: the host has failed twice in a row, why, and what to do. Twice is no harm."""
    run = Verification.objects.select_related("host__site").get(pk=pk)
    people = Membership.objects.filter(
        organization=run.host.site.organization_id, role__in=("owner", "admin", "engineer")
    )
    addresses = sorted(people.values_list("user__email", flat=True).distinct())
    if addresses:
        where = f"{settings.PUBLIC_URL.rstrip('/')}/operator/marketplace/host/{run.host_id}/change/"
        text = (
            f"{run.host.name} at {run.host.site.name} has failed its benchmark twice in a row, and is not shown as verified any more.\n\n"
            f"{run.reason}\n\nIt is tried again in a day; you can run it at once when that is put right:\n{where}\n"
        )
        send_mail(f"{run.host.name} is not verified any more", text, settings.DEFAULT_FROM_EMAIL, addresses)


def bounds_of(host: Host) -> tuple[core.Bound, ...]:
    """What is wanted of this host."""
    linked = len(set(host.nvlink_domains)) < host.gpu_count
    return core.bounds(host.gpu_model.name, host.gpu_count, linked=linked)


def of_listing(listing: Listing) -> tuple[int, int, list[HostVerification]]:
    """(hosts verified, hosts on offer, their rows by host) of a listing."""
    hosts = listing.offered_hosts()
    rows = HostVerification.objects.filter(host__in=hosts).select_related("run").order_by("host_id")
    found = list(rows)
    return sum(row.state == HostVerification.State.VERIFIED for row in found), hosts.count(), found
