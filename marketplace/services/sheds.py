"""A grid call that hashing alone cannot meet: whose jobs leave for it. Spot first, then flexible after its notice; firm never.

The order of a call: hashing (scheduler.site_loop) -> spot -> flexible -> firm only where the contract names such an emergency,
and no contract of ours does. A drain's reason names the call: billing gives a flexible contract its hours back by it.

A flexible contract gives way for as many hours of a UTC month as it was signed with. A call whose hours there are not left any more
finds it firm.
"""

from collections import defaultdict
from datetime import datetime, timedelta

import numpy as np

from marketplace import ids
from marketplace.models import Contract, Curtailment, Host, Placement, PlacementEvent
from marketplace.services import jobs
from marketplace.services.budgets import node_budgets
from marketplace.services.power import Ledger, active_watts
from scheduler.core import power as core

ORDER = ("spot", "flexible")
REASON = "curtailment "  # and the public id of the call


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
    willing: dict[tuple[int, int], bool] = {}
    for kind in ORDER:
        for placement in live:
            left = [p for p in stay[placement.host_id] if p.job_id != placement.job_id]
            if placement.contract.kind != kind or len(left) == len(stay[placement.host_id]):
                continue
            path = ledger.tree.paths[ledger.tree.index[hosts[placement.host_id].power_node_id]]
            call = _call(ledger, need, path, calls)
            if call is None or (kind == "flexible" and not _gives_way(placement.contract, call, now, willing)):
                continue
            asked[call.pk].append(placement.job_id)
            for pk in [h for h, there in stay.items() if any(p.job_id == placement.job_id for p in there)]:
                stay[pk] = [p for p in stay[pk] if p.job_id != placement.job_id]
                _lower(ledger, need, hosts[pk], booked, stay[pk])
    by_pk = {c.pk: c for c in calls.values()}
    moved: list[int] = []
    for call_pk, leaving in asked.items():
        moved += jobs.preempt(sorted(set(leaving)), now=now, actor="power", reason=REASON + by_pk[call_pk].public_id)
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


def _gives_way(contract: Contract, call: Curtailment, now: datetime, willing: dict[tuple[int, int], bool]) -> bool:
    """Is its notice over, and are the call's hours left of those that it accepts this month? `willing` remembers the second."""
    key = (contract.pk, call.pk)
    if key not in willing:
        willing[key] = _hours_left(contract, call, now)
    return willing[key] and now >= call.created_at + timedelta(seconds=contract.flexible_notice_s)


def calls_of(contract: Contract) -> set[int]:
    """The calls, by id, for which jobs of the contract were asked to leave."""
    drained = PlacementEvent.objects.filter(
        placement__contract=contract, to_state="draining", reason__startswith=REASON
    )
    reasons = drained.order_by().values_list("reason", flat=True).distinct()
    return {pk for reason in reasons if (pk := ids.decode("cur", reason.split()[1])) is not None}


def _hours_left(contract: Contract, call: Curtailment, now: datetime) -> bool:
    """A call that it has left for before costs no further hours."""
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = (month + timedelta(days=32)).replace(day=1)
    gave = calls_of(contract)
    spans = sorted(
        (max(month, each.starts_at), min(after, each.ends_at, each.settled_at or each.ends_at))
        for each in Curtailment.objects.filter(pk__in=gave | {call.pk}).exclude(state="cancelled")
    )
    spent, upto = timedelta(), month
    for start, end in spans:  # two calls of one hour take it once
        spent += max(timedelta(), end - max(start, upto))
        upto = max(upto, end)
    return call.pk in gave or spent <= timedelta(hours=contract.flexible_hours_per_month)
