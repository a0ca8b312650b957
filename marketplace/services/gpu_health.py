"""Sick GPUs (rule: `gpu_rule`): the host drains, what runs on them leaves, and nothing uses them until they are well again.

A sick GPU's host takes nothing new, by whatever name it was at work; jobs on its other GPUs run to their end, because a reset or a
power cycle takes all of the host. Putting it back by hand is refused. It comes back when a benchmark passes on all of its GPUs
(*Verify*, once it was repaired), or when one of our own people says that they are well. An operator's own drain or announced
maintenance that began meanwhile keeps the host out until its own end.
"""

from collections import defaultdict
from datetime import datetime

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Gpu, GpuError, Host
from marketplace.outbox import emit
from marketplace.services import audit, drains, gpu_rule, mails
from marketplace.services.gpu_rule import Reported
from marketplace.tenancy import SYSTEM, Actor

TOLD = "marketplace.gpu_sick"
REASON = "sick: "  # so begins the reason of a host that drains for this
REPAIR = (
    "Reset the GPU or power-cycle the host; if the error comes again, replace the device. Then press Verify on the host's page: it is "
    "back at work when the benchmark passes on all of its GPUs."
)


def judge(site_id: int, *, now: datetime) -> list[int]:
    """Look at GPUs of which errors came in at `now`; returns the hosts of those that are sick by them. In a transaction of the caller,
    who holds the site's lock.
    """
    told = GpuError.objects.filter(host__site_id=site_id, received_at=now).values_list("host_id", "gpu")
    wanted = set(told)
    gpus = {
        (gpu.host_id, gpu.index): gpu
        for gpu in Gpu.objects.filter(host_id__in={host for host, _ in wanted}, healthy=True)
        if (gpu.host_id, gpu.index) in wanted
    }
    errors: dict[tuple[int, int], list[Reported]] = defaultdict(list)
    rows = GpuError.objects.filter(host_id__in={host for host, _ in gpus}).values_list(
        "host_id", "gpu", "kind", "code", "at"
    )
    for host, index, kind, code, at in rows:
        gpu = gpus.get((host, index))
        if gpu is not None and (gpu.well_at is None or at > gpu.well_at):
            errors[host, index].append(Reported(kind, code, at))
    sick = []
    for key, gpu in sorted(gpus.items()):
        if why := gpu_rule.verdict(errors[key]):
            gpu.healthy, gpu.last_error, gpu.sick_at = False, why[:120], now
            sick.append(gpu)
    Gpu.objects.bulk_update(sick, ["healthy", "last_error", "sick_at"])
    hosts = sorted({gpu.host_id for gpu in sick})
    if hosts:
        _take_out(hosts, sick, now)
    return hosts


def _take_out(host_ids: list[int], fresh: list[Gpu], now: datetime) -> None:
    rows = Host.objects.filter(pk__in=host_ids).order_by("pk").select_for_update(no_key=True, of=("self",))
    all_sick = gpu_rule.sick_on(host_ids)
    for host in rows.select_related("site"):
        mine = {gpu.index for gpu in fresh if gpu.host_id == host.pk}
        why = gpu_rule.words(gpu for gpu in all_sick[host.pk] if gpu.index in mine)
        audit.record(
            SYSTEM, "host.gpu_sick", host.public_id, now=now, organization_id=host.site.organization_id,
            after={"gpus": sorted(mine), "why": why},
        )  # fmt: skip
        drains.keep_out(host, (REASON + gpu_rule.words(all_sick[host.pk]))[:200], actor=SYSTEM, now=now)
        going = [p for p in drains.live([host.pk]) if mine & set(p.gpu_indices)]
        drains.take_off(going, now=now, actor="gpu health", reason=f"host drained: {why}"[:200])
        emit(TOLD, key=str(host.pk), payload={"host": host.pk})


def well(host: Host, *, actor: Actor, now: datetime, why: str) -> Host:
    """Its sick GPUs are well: by a benchmark that passed (`actor` SYSTEM), or by one of our own people's word. The host is back at work
    where it was out for that alone. MarketError illegal_transition where none is sick, forbidden for an operator.
    """
    if not actor.is_staff:
        raise MarketError("forbidden", "A benchmark that passes shows that a GPU is well again, or we do.")
    with transaction.atomic():
        acquire((Lock.SITE, host.site_id))
        rows = Host.objects.select_for_update(no_key=True, of=("self",)).select_related("site")
        fresh: Host = rows.get(pk=host.pk)
        sick = gpu_rule.sick_on([host.pk]).get(host.pk, [])
        if not sick:
            raise MarketError("illegal_transition", f"No GPU of {fresh.name} is sick.")
        Gpu.objects.filter(pk__in=[gpu.pk for gpu in sick]).update(healthy=True, well_at=now, sick_at=None)
        audit.record(
            actor, "host.gpu_well", fresh.public_id, now=now, organization_id=fresh.site.organization_id,
            before={"sick": gpu_rule.words(sick)}, after={"why": why[:200]},
        )  # fmt: skip
        if fresh.state in {Host.State.DRAINING, Host.State.MAINTENANCE} and fresh.state_reason.startswith(REASON):
            fresh = drains.undrain_host(fresh, actor=actor, now=now)
        else:
            drains.changed([fresh])  # what it can do has changed all the same
    return fresh


def barred(host: Host) -> str:
    """Why it cannot be put back to work by hand, and what clears that; empty: it can."""
    sick = gpu_rule.sick_on([host.pk]).get(host.pk, [])
    return f"not while {gpu_rule.words(sick)} {'is' if len(sick) == 1 else 'are'} sick. {drains.CURE}" if sick else ""


def tell_operator(host_id: int) -> None:
    """By mail: which GPUs, why, what runs there now, what to do. Twice is no harm."""
    host = Host.objects.select_related("site").get(pk=host_id)
    sick = gpu_rule.sick_on([host_id]).get(host_id, [])
    if not sick:
        return  # well again before the mail went
    running = drains.live([host_id]).count()
    letter = mails.Letter(
        subject=f"{host.name} drains: {len(sick)} GPU{'s' if len(sick) > 1 else ''} sick",
        paragraphs=(
            f"{host.name} at {host.site.name} takes nothing new: {gpu_rule.words(sick)}.",
            f"Jobs on these GPUs were asked to leave; {running} placement{'s' if running != 1 else ''} on the host run to their end.",
            REPAIR,
        ),
        facts=tuple((f"GPU {gpu.index}", gpu.last_error) for gpu in sick),
        path=f"/operator/marketplace/host/{host_id}/change/",
        label="To the host",
        why="You operate its site.",
    )
    mails.send(mails.addresses(host.site.organization_id, ("owner", "admin", "engineer")), letter)
