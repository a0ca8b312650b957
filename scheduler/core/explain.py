"""Why a job waits: how many hosts survive each stage of the fit rule, what binds, and what would change it."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core import gang
from scheduler.core.fit_kernels import (
    ACTIVE,
    CPU,
    NGPU,
    NODE,
    NVME,
    Q_CPU,
    Q_GPUS,
    Q_MILLI,
    Q_NVME,
    Q_RAM,
    RAM,
    fit_kernel,
    vram_kernel,
)
from scheduler.core.jit import kernel
from scheduler.core.state import State
from scheduler.core.types import FIT_STAGES, I64, NO_NODE, REASONS, Decision, Level, Reason, Request

Bools = npt.NDArray[np.bool_]
_REASONS: Final = REASONS


class Look(NamedTuple):
    """One look at every host: hosts by reason, the least shortage by reason, the node that binds most hosts."""

    hosts: list[int]
    short: list[int]
    node: int


@kernel
def look_kernel(s: State, q: I64, allowed: Bools, hosts: I64, short: I64, nodes: I64) -> None:
    """Histogram of reasons [20], least shortage by reason [20] (unit of the resource; W at a node), hosts bound by
    node [N].
    """
    for h in range(len(s.rows)):
        row = s.rows[h]
        reason, _, delta, node = fit_kernel(row, s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)
        if not allowed[h] and (reason == 0 or 6 <= reason <= 14 or reason == 23):  # the stages after affinity
            reason = 22
        hosts[reason] += 1
        lack = np.int64(0)
        if reason == 7:
            lack = q[Q_CPU] - row[CPU]
        elif reason == 8:
            lack = q[Q_RAM] - row[RAM]
        elif reason == 9:
            lack = q[Q_NVME] - row[NVME]
        elif reason == 10:
            idle = 0
            for i in range(row[NGPU]):
                idle += s.gfree[h, i] >= 1000 and not (row[ACTIVE] >> i) & 1
            lack = q[Q_GPUS] - idle
        elif reason == 11:
            most = 0
            for i in range(row[NGPU]):
                most = max(most, s.gfree[h, i])
            lack = q[Q_MILLI] - most
        elif reason == 12:
            most = 0
            for i in range(row[NGPU]):
                most = max(most, s.vfree[h, i])
            lack = max(np.int64(1), np.int64(vram_kernel(row, q) - most))
        elif reason == 14:
            lack = (delta * s.k[node] - s.budget[node] + s.k[node] - 1) // s.k[node]
            nodes[node] += 1
        if lack > 0:
            short[reason] = lack if short[reason] == 0 else min(short[reason], lack)


def look(state: State, q: I64, allowed: Bools | None = None) -> Look:
    """One pass of the fit rule over every host; those not `allowed` are refused for affinity."""
    hosts, short = np.zeros(_REASONS, np.int64), np.zeros(_REASONS, np.int64)
    nodes = np.zeros(max(1, len(state.parent)), np.int64)
    everywhere = np.ones(len(state.rows), np.bool_)
    look_kernel(state, q, everywhere if allowed is None else allowed, hosts, short, nodes)
    return Look(hosts.tolist(), short.tolist(), int(nodes.argmax()) if nodes.any() else NO_NODE)


def explain(state: State, q: I64, request: Request, earliest: int = 0, where: gang.Where | None = None) -> Decision:
    """The decision for a job that waits, on the state as it stood when its turn was over."""
    if not len(state.rows):
        return Decision(request.job, False, Reason.EMPTY_CELL, change="no host in this cell")
    seen = look(state, q, where.allowed if where is not None else None)
    left, stages = len(state.rows), []
    for stage in FIT_STAGES:
        left -= seen.hosts[stage]
        stages.append((stage, left))
    counts = gang.room(state, q)
    if where is not None:
        counts = np.where(where.allowed, counts, 0)
    fitting = int(np.minimum(counts, request.replicas).sum())
    # The binding constraint: of the hosts that came furthest, what stopped them.
    stopped = [stage for stage in FIT_STAGES if seen.hosts[stage]]
    binding = stopped[-1] if stopped else Reason.OK
    reason, node, short = binding, NO_NODE, seen.short[binding]
    if seen.hosts[Reason.OK]:
        reason, binding, node, short = _gang_reason(state, q, request, counts, fitting, seen, where)
    elif binding == Reason.NO_WATTS:
        node = seen.node
    return Decision(
        request.job,
        False,
        reason,
        tuple(stages),
        binding,
        node,
        short,
        fitting,
        _change(reason, binding, node, short, request),
        earliest,
    )


def _gang_reason(
    state: State, q: I64, request: Request, counts: I64, fitting: int, seen: Look, where: gang.Where | None
) -> tuple[Reason, Reason, int, int]:
    """Single replicas fit, the gang does not: too few, not in one domain, or no watts for all."""
    if fitting < request.replicas:
        stopped = [stage for stage in FIT_STAGES if seen.hosts[stage] and stage > Reason.HELD_FOR_EARLIER_JOB]
        return Reason.GANG_INCOMPLETE, stopped[-1] if stopped else Reason.OK, NO_NODE, request.replicas - fitting
    t = request.topology
    members = where.members if where is not None else np.zeros(0, np.int64)
    of = gang.domains(state, gang.bound_level(state, q, request.replicas, t, members))
    if len(members):  # the replicas that were lost go where the rest of their gang is
        counts = np.where(np.isin(of, of[members]), counts, 0)
    best = int(np.bincount(of, weights=counts).max())
    if best < request.replicas:
        return Reason.TOPOLOGY, Reason.TOPOLOGY, NO_NODE, request.replicas - best
    if t.spread > Level.NONE and t.max_per_domain:
        sums = np.bincount(gang.domains(state, t.spread), weights=counts)
        most = int(np.minimum(sums, t.max_per_domain).sum())
        if most < request.replicas:
            return Reason.TOPOLOGY, Reason.TOPOLOGY, NO_NODE, request.replicas - most
    node = _tightest_node(state, counts)
    return Reason.NO_WATTS, Reason.NO_WATTS, node, seen.short[Reason.NO_WATTS]


def _tightest_node(state: State, counts: I64) -> int:
    """The node above fitting hosts with the least budget left."""
    nodes = {int(n) for n in np.unique(state.rows[counts > 0, NODE]) if n >= 0}
    above = set(nodes)
    for node in nodes:
        at = int(state.parent[node])
        while at >= 0:
            above.add(at)
            at = int(state.parent[at])
    return min(above, key=lambda n: (int(state.budget[n]), n), default=NO_NODE)


def _change(reason: Reason, binding: Reason, node: int, short: int, request: Request) -> str:
    """What is missing, as a fact; what would help is tried, not guessed (`changes`)."""
    level = request.topology.pack.name.lower() if request.topology.pack else "site"
    words = {
        Reason.NOT_IN_POOL: "the contract's listing has no host in this cell",
        Reason.WRONG_SITE: "the site asked for has no host that would do",
        Reason.WRONG_MODEL: "no host has a GPU model that it accepts",
        Reason.HOST_UNSCHEDULABLE: "the hosts that would fit are draining, in maintenance, unreachable or get no grants",
        Reason.HOST_RESERVED_FOR_OWNER: "the hosts that would fit are reserved for another organization",
        Reason.TAINTED: "the hosts that would fit have taints that it does not tolerate",
        Reason.LEAVES_TOO_SOON: "the hosts that would fit leave for maintenance before it would end",
        Reason.RESERVED_SOON: "the GPUs that would fit are reserved, and it may stand there when the reservation begins",
        Reason.AFFINITY: "the hosts that would fit stand where the job's affinity rules do not let it go",
        Reason.HELD_FOR_EARLIER_JOB: "the hosts that would fit are held for a job that waits longer",
        Reason.NO_CPU: f"the best host lacks {short} milli-CPU",
        Reason.NO_RAM: f"the best host lacks {short} MiB of memory",
        Reason.NO_NVME: f"the best host lacks {short} GiB of NVMe",
        Reason.NO_GPU: f"the best host lacks {short} idle GPU{'' if short == 1 else 's'}",
        Reason.NO_GPU_SHARE: f"the emptiest GPU lacks {short} milli-GPU",
        Reason.NO_VRAM: f"the best GPU lacks {short} MiB of memory",
        Reason.TOPOLOGY: f"the best {level} lacks room for {short} replica{'' if short == 1 else 's'}"
        if short
        else "no NVLink domain has so many idle GPUs",
        Reason.NO_WATTS: f"{short} W are missing at power node {node}"
        if short
        else f"watts are short at power node {node}",
        Reason.GANG_INCOMPLETE: f"room for {short} replica{'' if short == 1 else 's'} is missing: most hosts are stopped by "
        f"{binding.name}",
    }
    return words.get(reason, "")
