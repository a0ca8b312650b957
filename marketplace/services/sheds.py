"""A grid call that hashing alone cannot meet: what it takes of jobs, in the order of `scheduler.core.curtail`.

Spot leaves first, then flexible after its notice, then GPUs are held lower, and firm leaves only in an emergency, where its contract
names one (`emergency_notice_s`) and that notice is over. A drain's reason names the call: by it billing gives a contract its hours
back. Economic calls touch no job.

A flexible contract gives way for as many hours of a UTC month as it was signed with. A call whose hours there are not left any more
finds it firm.
"""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta

import numpy as np

from marketplace import ids
from marketplace.models import Contract, Curtailment, Host, Placement, PlacementEvent
from marketplace.services import jobs
from marketplace.services.budgets import node_budgets
from marketplace.services.power import Ledger, cap_gpus
from marketplace.services.power.ledger import FRESH
from scheduler.core import curtail
from scheduler.core import power as core

REASON = "curtailment "  # and the public id of the call


def relieve(ledger: Ledger, active: Iterable[Curtailment], *, now: datetime) -> list[int]:
    """Ask jobs to leave, and hold GPUs lower, so far as the machines that may still sleep are not enough for the calls that
    stand; returns the jobs asked. The caller holds the site's lock.
    """
    mandatory = [call for call in active if call.mandatory]
    calls = {c.node_id: c for c in sorted(mandatory, key=lambda c: -c.cap_w)}
    if not calls:
        return []
    need = _missing(ledger, calls, now)
    if not need.any():
        return []
    site_id, hosts = ledger.site_id, ledger.hosts
    at = {ledger.tree.index[pk]: call for pk, call in calls.items()}
    live = Placement.objects.filter(site_id=site_id, state__in=Placement.AT_SITE, release_requested_at=None)
    willing: dict[tuple[int, int], bool] = {}
    work = []
    for placement in live.select_related("contract"):
        path = ledger.tree.paths[ledger.tree.index[hosts[placement.host_id].power_node_id]]
        ranks = {n: _rank(placement.contract, at[n], now, willing) for n in path if n in at and need[n] > 0}
        since = int(placement.created_at.timestamp() * 1_000_000)
        gpus = frozenset(placement.gpu_indices)
        work.append(curtail.Work(placement.pk, placement.job_id, placement.host_id, gpus, curtail.STAYS, since, ranks))
    found = curtail.relief(ledger.tree, need, {pk: _shape(ledger, h) for pk, h in hosts.items()}, work, may_cap=True)
    asked: dict[int, list[int]] = defaultdict(list)
    for job, node in found.leave:
        asked[at[node].pk].append(job)  # type: ignore[arg-type]
    by_pk = {c.pk: c for c in calls.values()}
    moved: list[int] = []
    for call_pk, leaving in asked.items():
        moved += jobs.preempt(sorted(set(leaving)), now=now, actor="power", reason=REASON + by_pk[call_pk].public_id)
    caps: dict[int, int] = dict(found.caps)  # type: ignore[arg-type]
    cap_gpus(site_id, caps, calls={pk: _call_above(ledger, hosts[pk], at).pk for pk in caps}, now=now)
    ledger.forget_hosts()
    return moved


def _call_above(ledger: Ledger, host: Host, at: dict[int, Curtailment]) -> Curtailment:
    """Of the calls that stand over a host, the one at the deepest node."""
    path = ledger.tree.paths[ledger.tree.index[host.power_node_id]]
    return next(at[n] for n in path if n in at)


def _shape(ledger: Ledger, host: Host) -> curtail.HostShape:
    return curtail.HostShape(
        ledger.tree.index[host.power_node_id], host.reserved_w, host.parked_w, host.base_w, host.gpu_count, host.gpu_min_w,
        host.gpu_most_w, host.cap_control,
    )  # fmt: skip


def _missing(ledger: Ledger, calls: dict[int, Curtailment], now: datetime) -> core.Ints:
    """MW over the limit of each curtailed node, beyond what machines that may sleep would give."""
    budgets = node_budgets([ledger.site_id])
    need = np.zeros(len(ledger.tree.keys), np.int64)
    for pk in calls:
        n = ledger.tree.index[pk]
        need[n] = max(0, -int(ledger.free[n]) - 1000 * _passing_w(ledger, pk, now) - budgets[pk].reclaimable_mw)
    return need


def _passing_w(ledger: Ledger, pk: int, now: datetime) -> int:
    """Of a node's margin what its meter sees unexplained, while it reads no more than the limit. Mostly it is the cooling, which follows
    machines that lay down by tens of seconds: hashing gives for it, jobs only where the meter says that the call is not met.
    """
    node = ledger.nodes[pk]
    if node.measured_w is None or node.measured_at is None or now - node.measured_at > FRESH:
        return 0
    share = core.margin_w(node.cap_w, node.metering)
    return max(0, node.margin_w - share) if node.measured_w <= (node.limit_w or 0) else 0


def _rank(contract: Contract, call: Curtailment, now: datetime, willing: dict[tuple[int, int], bool]) -> int:
    """`curtail.rank` of its jobs. Who signed after the call was announced is told by signing."""
    told = now - max(call.created_at, contract.created_at)
    key = (contract.pk, call.pk)
    if contract.kind == "flexible" and key not in willing:
        willing[key] = hours_left(contract, call, now)
    agreed = curtail.Agreed(
        contract.kind, willing.get(key, False), contract.flexible_notice_s, contract.emergency_notice_s
    )
    return curtail.rank(curtail.Call(call.mandatory, call.emergency), agreed, int(told.total_seconds()))


def calls_of(contract: Contract) -> set[int]:
    """The calls, by id, for which jobs of the contract were asked to leave."""
    drained = PlacementEvent.objects.filter(
        placement__contract=contract, to_state="draining", reason__startswith=REASON
    )
    reasons = drained.order_by().values_list("reason", flat=True).distinct()
    return {pk for reason in reasons if (pk := ids.decode("cur", reason.split()[1])) is not None}


def contracts_of(call: Curtailment) -> set[int]:
    """The contracts, by id, of which jobs were asked to leave for the call."""
    drained = PlacementEvent.objects.filter(to_state="draining", reason=REASON + call.public_id)
    return set(drained.order_by().values_list("placement__contract_id", flat=True).distinct())


def hours_left(contract: Contract, call: Curtailment, now: datetime) -> bool:
    """Has a flexible contract hours of the month left for this call? One that it has left for before costs no further hours."""
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = (month + timedelta(days=32)).replace(day=1)
    gave = calls_of(contract)
    spans = sorted(
        (max(month, each.starts_at), min(after, each.over_at))
        for each in Curtailment.objects.filter(pk__in=gave | {call.pk}).exclude(state="cancelled")
    )
    spent, upto = timedelta(), month
    for start, end in spans:  # two calls of one hour take it once
        spent += max(timedelta(), end - max(start, upto))
        upto = max(upto, end)
    return call.pk in gave or spent <= timedelta(hours=contract.flexible_hours_per_month)
