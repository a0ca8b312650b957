"""A grid call that hashing alone cannot meet: whose jobs leave for it. Spot first, then flexible after its notice; firm never.

The order of a call: hashing (scheduler.site_loop) -> spot -> flexible -> firm only where the contract names such an emergency,
and no contract of ours does. A drain's reason begins with "curtailment": billing gives a flexible contract its hours back by it.
"""

from collections import defaultdict
from datetime import datetime, timedelta

import numpy as np

from marketplace.models import Curtailment, Host, Placement
from marketplace.services import jobs
from marketplace.services.budgets import node_budgets
from marketplace.services.power import Ledger, active_watts
from scheduler.core import power as core

ORDER = ("spot", "flexible")


def relieve(site_id: int, *, now: datetime) -> list[int]:
    """Ask jobs to leave so far as the machines that may still sleep are not enough; returns them. The caller holds the
    site's lock.
    """
    calls = {c.node_id: c for c in Curtailment.objects.filter(site_id=site_id, state="active").order_by("-cap_w")}
    if not calls:
        return []
    ledger = Ledger.of(site_id)
    need = _missing(ledger, calls)
    if not need.any():
        return []
    hosts = {h.pk: h for h in Host.objects.filter(site_id=site_id)}
    live = list(
        Placement.objects.filter(site_id=site_id, state__in=Placement.AT_SITE)
        .select_related("contract", "job")
        .order_by("-created_at", "-pk")
    )
    stay: dict[int, list[Placement]] = defaultdict(list)  # of each host, those not asked to leave
    for placement in live:
        if placement.release_requested_at is None:
            stay[placement.host_id].append(placement)
    booked = {pk: host.reserved_w for pk, host in hosts.items()}
    for pk, host in hosts.items():  # what is on its way down already
        _lower(ledger, need, host, booked, stay[pk])
    asked: dict[int, list[int]] = defaultdict(list)
    for kind in ORDER:
        for placement in live:
            left = [p for p in stay[placement.host_id] if p.job_id != placement.job_id]
            if placement.contract.kind != kind or len(left) == len(stay[placement.host_id]):
                continue
            path = ledger.tree.paths[ledger.tree.index[hosts[placement.host_id].power_node_id]]
            call = _call(ledger, need, path, calls)
            if call is None or (kind == "flexible" and now < call.created_at + _notice(placement)):
                continue
            asked[call.pk].append(placement.job_id)
            for pk in [h for h, there in stay.items() if any(p.job_id == placement.job_id for p in there)]:
                stay[pk] = [p for p in stay[pk] if p.job_id != placement.job_id]
                _lower(ledger, need, hosts[pk], booked, stay[pk])
    by_pk = {c.pk: c for c in calls.values()}
    moved: list[int] = []
    for call_pk, ids in asked.items():
        moved += jobs.preempt(
            sorted(set(ids)), now=now, actor="power", reason=f"curtailment {by_pk[call_pk].public_id}"
        )
    return moved


def _missing(ledger: Ledger, calls: dict[int, Curtailment]) -> core.Ints:
    """MW over the limit of each curtailed node, beyond what machines that may sleep would give."""
    budgets = node_budgets([ledger.site_id])
    need = np.zeros(len(ledger.tree.keys), np.int64)
    for pk in calls:
        n = ledger.tree.index[pk]
        need[n] = max(0, -int(ledger.free[n]) - budgets[pk].reclaimable_mw)
    return need


def _lower(ledger: Ledger, need: core.Ints, host: Host, booked: dict[int, int], stay: list[Placement]) -> None:
    """Take from `need` what the host gives up when only `stay` stay; `booked` follows."""
    gpus = {i for p in stay for i in p.gpu_indices}
    target = min(booked[host.pk], active_watts(host, gpus, cpu_only=any(not p.gpu_indices for p in stay)))
    for n in ledger.tree.paths[ledger.tree.index[host.power_node_id]]:
        need[n] = max(0, int(need[n]) - (booked[host.pk] - target) * int(ledger.tree.k[n, core.HOST]))
    booked[host.pk] = target


def _call(ledger: Ledger, need: core.Ints, path: tuple[int, ...], calls: dict[int, Curtailment]) -> Curtailment | None:
    """The call that still lacks watts under this path, nearest first."""
    return next((calls[ledger.tree.keys[n]] for n in path if need[n] > 0), None)  # type: ignore[index]


def _notice(placement: Placement) -> timedelta:
    return timedelta(seconds=placement.contract.flexible_notice_s)
