"""Watts for hosts: reserved, granted, given back."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

import numpy as np
from django.conf import settings
from django.db import connection

from marketplace import arrays
from marketplace.arrays import Ints
from marketplace.models import Host, Placement, PowerGrant
from marketplace.services.budgets import NodeTable
from marketplace.services.power import held
from marketplace.services.power.freeze import FREEZE_STANDS
from marketplace.services.power.ledger import FRESH_S, Ledger, active_watts
from scheduler.core import power as core
from scheduler.core.recheck import Power


def _granted_use(host_ids: Iterable[int]) -> dict[int, list[list[int]]]:
    """Per host: GPU indices of each placement whose watts are granted and not yet given back."""
    use: dict[int, list[list[int]]] = defaultdict(list)
    rows = PowerGrant.objects.filter(host_id__in=list(host_ids), state=PowerGrant.State.GRANTED)
    for host_id, gpus in rows.values_list("host_id", "placement__gpu_indices"):
        use[host_id].append(gpus)
    return use


def _needed(host: Host, use: list[list[int]], extra: Sequence[int] | None = None) -> int:
    placements = [*use, list(extra)] if extra is not None else use
    active = {index for gpus in placements for index in gpus}
    return active_watts(host, active, cpu_only=any(not gpus for gpus in placements))


_USE = """
SELECT array_agg(host), array_agg(bits), array_agg(alone) FROM (
  SELECT g.host_id AS host, bit_or((SELECT coalesce(bit_or(1::bigint << i), 0) FROM unnest(p.gpu_indices) i)) AS bits,
    max((cardinality(p.gpu_indices) = 0)::int)::bigint AS alone
  FROM marketplace_powergrant g JOIN marketplace_placement p ON p.id = g.placement_id
  WHERE g.host_id = ANY(%(hosts)s) AND g.state = 'granted' GROUP BY 1) u
"""


_GIVES = f"""
SELECT s.id, s.mode = 'auto' AND NOT {FREEZE_STANDS}
  AND NOT EXISTS (SELECT 1 FROM marketplace_powernode n WHERE n.site_id = s.id AND n.metering = 'meter' AND n.measured_at < %(stale)s),
  NOT EXISTS (SELECT 1 FROM marketplace_powergrant g WHERE g.site_id = s.id AND g.state = 'shedding')
FROM marketplace_site s WHERE s.id = ANY(%(sites)s)
"""  # noqa: S608


def books(host_ids: Ints, host_sites: Ints, reserved_w: Ints, nodes: NodeTable, *, now: datetime) -> Power:
    """The books of locked hosts (ids ascending) and of their sites' nodes, for `recheck.book`.

    A site with older pending grants gives no further watts past them: first come, first served. One with a meter fallen silent
    grants nothing at all, not even what stands booked for a host still (`may_grant`, for many sites).
    """
    stale = now - timedelta(seconds=FRESH_S)
    sites = np.unique(host_sites)
    rows = arrays.execute(_GIVES, {"sites": sites, "stale": stale})
    gives = {pk: (grants and not settings.POWER_FREEZE, free) for pk, grants, free in rows}
    use, alone = np.zeros(len(host_ids), np.int64), np.zeros(len(host_ids), np.int64)
    with_use, bits, lone = arrays.columns(_USE, {"hosts": host_ids})
    if with_use is not None:
        at = np.searchsorted(host_ids, with_use)
        use[at], alone[at] = bits, lone
    may = np.array([gives.get(pk, (False, False)) for pk in host_sites.tolist()], np.int64).reshape(-1, 2)
    may_grant, may_raise = np.ascontiguousarray(may.T)
    return Power(use, alone, reserved_w.astype(np.int64), may_grant, may_raise, nodes.free_mw.copy())


def book_nodes(nodes: NodeTable, free_mw: Ints) -> None:
    """Write what `recheck.book` has booked at the nodes: from `nodes.free_mw` down to `free_mw`."""
    booked = nodes.free_mw - free_mw
    at = np.flatnonzero(booked)
    if len(at):
        arrays.execute(
            "UPDATE marketplace_powernode n SET reserved_mw = n.reserved_mw + u.mw FROM unnest(%s::bigint[], %s::bigint[]) u(id, mw)"
            " WHERE n.id = u.id",
            [nodes.ids[at], booked[at]],
        )


def limits(use: int, gpus: int, min_w: int, max_w: int, *, cap_control: bool) -> tuple[str, str]:
    """(W of each GPU as an array literal, power state) to command of a host on which work runs."""
    if not cap_control:
        return "{" + ",".join([str(max_w)] * gpus) + "}", Host.PowerState.FULL
    watts = [str(max_w if use >> i & 1 else min_w) for i in range(gpus)]
    return "{" + ",".join(watts) + "}", Host.PowerState.CAPPED


def _raise_host(ledger: Ledger, host: Host, use: list[list[int]], extra: Sequence[int], target: int) -> None:
    """Book the host's new watts and command its limits. The ledger has said yes."""
    if target > host.reserved_w:
        ledger.book(host.power_node_id, target - host.reserved_w, core.HOST)
        host.reserved_w = target
    active = {index for gpus in use for index in gpus} | set(extra)
    _command_limits(host, active, running=True)


def _command_limits(host: Host, active: set[int], *, running: bool) -> None:
    limits = [host.gpu_most_w if i in active else host.gpu_min_w for i in range(host.gpu_count)]
    state = Host.PowerState.CAPPED if running else Host.PowerState.PARKED
    if not host.cap_control:
        limits, state = [host.gpu_max_w] * host.gpu_count, Host.PowerState.FULL
    if (limits, state) != (host.desired_limits_w, host.desired_power_state):
        host.desired_limits_w, host.desired_power_state = limits, state
        host.desired_generation += 1


def _save_hosts(hosts: Iterable[Host]) -> None:
    rows = [
        (h.reserved_w, h.desired_limits_w, h.desired_power_state, h.desired_generation, h.call_gpu_w, h.pk)
        for h in sorted(hosts, key=lambda h: h.pk)
    ]
    if not rows:
        return
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE marketplace_host SET reserved_w = %s, desired_limits_w = %s, desired_power_state = %s, desired_generation = %s,"
            " call_gpu_w = %s WHERE id = %s",
            rows,
        )


def grant_pending(ledger: Ledger, *, now: datetime) -> list[int]:
    """Give waiting grants their watts, oldest first, as far as they fit; returns the placements granted.

    A later small grant may pass an earlier large one only under nodes where the earlier asks for nothing. Those who wait on
    one host keep their place in the queue together: for what the host is short of with all of them.
    """
    pending = list(
        PowerGrant.objects.filter(site_id=ledger.site_id, state=PowerGrant.State.SHEDDING, placement__state="shedding")
        .select_related("placement")
        .order_by("id")
    )
    if not pending:
        return []
    hosts = ledger.hosts
    use = _granted_use({g.host_id for g in pending})
    granted: list[int] = []
    touched: set[int] = set()
    queued: dict[int, list[list[int]]] = defaultdict(list)  # host -> GPUs of each that was refused
    kept: dict[int, int] = defaultdict(int)  # host -> W kept for those
    for row in pending:
        host, gpus = hosts[row.host_id], row.placement.gpu_indices
        target = _needed(host, use[host.pk], gpus)
        if ledger.refuses(host.power_node_id, max(0, target - host.reserved_w)) is None:
            _raise_host(ledger, host, use[host.pk], gpus, target)
            use[host.pk].append(gpus)
            touched.add(host.pk)
            granted.append(row.placement_id)
        else:
            queued[host.pk].append(gpus)
        if queued[host.pk]:
            short = max(0, _needed(host, [*use[host.pk], *queued[host.pk]]) - host.reserved_w)
            ledger.keep(host.power_node_id, short - kept[host.pk])
            kept[host.pk] = short
    PowerGrant.objects.filter(placement_id__in=granted, state=PowerGrant.State.SHEDDING).update(
        state=PowerGrant.State.GRANTED, granted_at=now
    )
    for pk, watts in kept.items():  # kept from those behind in this queue, not booked
        ledger.keep(hosts[pk].power_node_id, -watts)
    ledger.save()
    _save_hosts(hosts[pk] for pk in touched)
    return granted


def release(placements: Sequence[Placement], *, now: datetime) -> None:
    """The placements are over: their hosts' limits go down. The watts stay booked until the host reads them back."""
    PowerGrant.objects.filter(placement_id__in=[p.pk for p in placements]).exclude(
        state=PowerGrant.State.RELEASED
    ).update(state=PowerGrant.State.RELEASED, released_at=now)
    hosts = {
        h.pk: h
        for h in Host.objects.filter(pk__in={p.host_id for p in placements})
        .order_by("pk")
        .select_for_update(no_key=True)
    }
    use = _granted_use(hosts)
    for host in hosts.values():
        active = {index for gpus in use[host.pk] for index in gpus}
        _command_limits(host, active, running=bool(use[host.pk]))
    _save_hosts(hosts.values())


def lower_hosts(ledger: Ledger) -> int:
    """Book less for hosts that have read back lower limits; returns the watts given back."""
    hosts = [
        h
        for h in ledger.hosts.values()
        if h.cap_control and h.applied_generation >= h.desired_generation and h.reserved_w > _needed(h, [])
    ]
    if not hosts:
        return 0
    use = _granted_use(h.pk for h in hosts)
    changed = []
    for host in hosts:
        target = _needed(host, use[host.pk])
        if host.call_gpu_w is not None and use[host.pk]:  # a job that came since may have raised it again
            target = max(target, host.base_w + sum(host.desired_limits_w))
        if target < host.reserved_w:
            ledger.book(host.power_node_id, target - host.reserved_w, core.HOST)
            host.reserved_w = target
            changed.append(host)
    freed = -sum(min(0, mw) for pk, mw in ledger.changes.items() if ledger.nodes[pk].parent_id is None) // 1000
    ledger.save()
    _save_hosts(changed)
    return freed


def cap_gpus(site_id: int, wanted: Mapping[int, int], *, calls: Mapping[int, int], now: datetime) -> list[int]:
    """Hold the GPUs of hosts (id -> W each) lower, each for a call of the grid (host id -> call id). The watts stay booked until the
    host has read the limits back (`lower_hosts`); from now on the time is credited (`held`). Returns the hosts that changed: none
    where they stand so low already.
    """
    hosts = list(Host.objects.filter(pk__in=wanted, site_id=site_id).order_by("pk").select_for_update(no_key=True))
    use = _granted_use(h.pk for h in hosts)
    changed = []
    for host in hosts:
        watts = max(host.gpu_min_w, wanted[host.pk])
        if host.cap_control and use[host.pk] and watts < host.gpu_most_w:
            host.call_gpu_w = watts
            _command_limits(host, {i for gpus in use[host.pk] for i in gpus}, running=True)
            changed.append(host)
    _save_hosts(changed)
    held.begin(changed, calls, now=now)
    return [host.pk for host in changed]


def uncap_gpus(ledger: Ledger, *, under: Iterable[int]) -> list[int]:
    """Give GPUs their watts back as far as they fit, but not below the nodes `under` (ids), where a call still stands."""
    capped = [h for h in ledger.hosts.values() if h.call_gpu_w is not None]
    if not capped:
        return []
    use, still = _granted_use(h.pk for h in capped), set(under)
    changed = []
    for host in capped:
        path = {ledger.tree.keys[n] for n in ledger.tree.paths[ledger.tree.index[host.power_node_id]]}
        if still & path and use[host.pk]:
            continue
        before, host.call_gpu_w = host.call_gpu_w, None
        target = _needed(host, use[host.pk])
        if ledger.refuses(host.power_node_id, max(0, target - host.reserved_w)) is not None:
            host.call_gpu_w = before
            continue
        if use[host.pk]:
            _raise_host(ledger, host, use[host.pk], (), target)
        changed.append(host)
    ledger.save()
    _save_hosts(changed)
    held.lift(changed)
    return [host.pk for host in changed]
