"""What runs: jobs, and placements with what they take of their hosts and of the power tree."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from marketplace.models import Contract, Host, Job, Placement, PowerGrant, Site
from marketplace.services import feeds, site_minutes
from marketplace.services.power import Ledger
from scheduler.core import power
from tests.factories import places
from tests.factories.rows import NOW, created, number

_UNGRANTED = ("intended", "shedding")


def job(contract: Contract, *, state: str = "queued", **fields: Any) -> Job:
    """One replica with one whole GPU, queued at NOW."""
    made = Job.objects.create(
        organization=contract.organization,
        contract=contract,
        cell=contract.cell,
        state=state,
        **{
            "name": f"job {next(number)}",
            "command": ["python3", "-c", "print('ok')"],
            "vcpu_milli": 8_000,
            "ram_mib": 32_768,
            "created_at": NOW,
            "queued_at": NOW,
            **fields,
        },
    )
    created(Job, made)
    return made


def placement(
    job: Job, host: Host, gpu_indices: Sequence[int] | None = None, *, state: str = "intended", **fields: Any
) -> Placement:
    """A replica on a host, as a committed plan leaves it: free columns taken, watts booked once granted (not while `intended`,
    `shedding`), with its grant.
    """
    host.refresh_from_db()
    final = state in Placement.FINAL
    indices = list(range(job.gpus) if gpu_indices is None else gpu_indices)
    columns = {
        "attempt": job.attempt + 1,
        "rank": fields.pop("rank", job.placements.count()),
        "gpu_milli": job.gpu_milli,
        "vram_mib": job.vram_mib or host.vram_mib * job.gpu_milli // 1000,
        "vcpu_milli": job.vcpu_milli,
        "ram_mib": job.ram_mib,
        "nvme_gib": job.nvme_gib,
        "created_at": NOW,
        **fields,
    }
    delta = 0
    if not final:
        for i in indices:
            host.gpu_free[i] -= columns["gpu_milli"]
            host.vram_free[i] -= columns["vram_mib"]
        host.vcpu_free -= columns["vcpu_milli"]
        host.ram_free -= columns["ram_mib"]
        host.nvme_free -= columns["nvme_gib"]
        host.cpu_only_active += not indices
        delta = reserved_w(host) - host.reserved_w
        if state not in _UNGRANTED:
            host.reserved_w += delta
            places.reserve(host.power_node, delta, "gpu")
            if host.cap_control:
                host.power_state = host.desired_power_state = "capped"
                host.desired_limits_w = [host.gpu_max_w if f < 1000 else host.gpu_min_w for f in host.gpu_free]
        host.save()
    made = Placement.objects.create(
        job=job,
        contract=job.contract,
        organization=job.organization,
        host=host,
        site=host.site,
        cell=host.cell,
        gpu_indices=indices,
        state=state,
        **{"watts_delta": max(delta, 0), "granted_at": None if state in _UNGRANTED else NOW, **columns},
    )
    created(Placement, made)
    granted = state not in _UNGRANTED
    PowerGrant.objects.create(
        placement=made,
        host=host,
        site=host.site,
        delta_w=max(delta, 0),
        state="released" if final else "granted" if granted else "shedding",
        created_at=made.created_at,
        granted_at=made.created_at if granted else None,
        released_at=made.created_at if final else None,
    )
    return made


def reserved_w(host: Host) -> int:
    """What the host's free columns say it may draw, W."""
    return power.host_reserved_w(
        gpus=host.gpu_count,
        active_gpus=sum(free < 1000 for free in host.gpu_free),
        standby_w=host.standby_w,
        parked_w=host.parked_w,
        base_w=host.base_w,
        gpu_min_w=host.gpu_min_w,
        gpu_max_w=host.gpu_max_w,
        cap_control=host.cap_control,
        powered=host.power_state != "off",
        cpu_only=host.cpu_only_active > 0,
    )


def accounted(site: Site, *, now: datetime) -> None:
    """A turn's accounting alone: the time since the row's last sample."""
    site_minutes.record(site, Ledger.of(site.pk), feeds.rates(site, now=now), now=now)
