"""Why a job that was placed stands where it does: the hosts that it could have had, and what spoke for the one chosen."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from scheduler.core import explain, gang
from scheduler.core import fit_kernels as fit
from scheduler.core.case import Case
from scheduler.core.fit_kernels import request_vector
from scheduler.core.jit import kernel
from scheduler.core.pack import make_state
from scheduler.core.preempt import held
from scheduler.core.score import TABLE_SCALE, Shape, Tables, shapes_of, tables_for
from scheduler.core.state import IDLE, NO, State, balance, fragmentation, give, refresh_all, score_host, take
from scheduler.core.ties import Ties
from scheduler.core.types import FIT_STAGES, I64, NO_NODE, WHOLE, Level, Placement, Plan, Reason, Request

DOMAINS: Final = (Level.HOST, Level.LEAF, Level.SPINE, Level.SITE)


class Term(NamedTuple):
    """One part of the score of the host taken, in milli-GPU; more is better."""

    name: str
    milli: float


class Choice(NamedTuple):
    """`hosts`: all that the cell has; `candidates`: those on which one replica fitted at the job's turn. `stages` as in
    Decision. `score`, `terms`: of the first replica's host, milli-GPU (jobs of one replica; a gang takes the tightest
    domain instead). `second`: the best score of any other host, None when there was none. `level`: the smallest domain
    of the fabric that holds all replicas, `domains`: how many of that level had room for all of them. `evicted`: jobs
    that had to leave for it.
    """

    placements: tuple[Placement, ...]
    hosts: int
    candidates: int
    stages: tuple[tuple[Reason, int], ...]
    score: float
    terms: tuple[Term, ...]
    second: float | None
    level: Level
    domains: int
    evicted: tuple[int, ...]


@kernel
def score_all(q: I64, s: State, t: Tables, out: I64) -> None:
    """The score of one replica on every host where the fit rule lets it, in 1/64 milli-GPU; out [H]."""
    for h in range(len(s.rows)):
        row = s.rows[h]
        reason = fit.fit_kernel(row, s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0]
        out[h] = NO
        if reason == 0:
            value, _ = score_host(h, q, s, t)
            out[h] = value


def choice(case: Case, made: Plan, job: int) -> Choice | None:
    """Why `made`, the plan of `case`, put the job where it did; None when it placed no such job.

    Hosts as they stood at the job's turn: after the placements and evictions before it, holds for waiting jobs left out.
    """
    mine = tuple(p for p in made.placements if p.job == job)
    request = next((r for r in case.requests if r.job == job), None)
    if not mine or request is None:
        return None
    shapes = case.policy.shapes
    mix = [Shape(*row) for row in shapes] if shapes is not None else shapes_of(case.requests)
    tables = tables_for(case.fleet, mix, case.policy.packer)
    state, where = _before(case, made, request, mine)
    refresh_all(state, tables)
    q = request_vector(request)
    seen = explain.look(state, q, None if where is None else where.allowed)
    left, stages = len(state.rows), []
    for stage in FIT_STAGES:
        left -= seen.hosts[stage]
        stages.append((stage, left))
    scores = np.zeros(len(state.rows), np.int64)
    score_all(q, state, tables, scores)
    if where is not None:
        scores[~where.allowed] = NO
    first = mine[0]
    mask = sum(1 << g for g in first.gpus)
    others = np.delete(scores, first.host)
    best = int(others.max()) if len(others) else NO
    level, domains = _domain(state, q, request, mine, where)
    terms = score_terms(state, q, first.host, mask, tables)
    return Choice(
        placements=mine,
        hosts=len(state.rows),
        candidates=seen.hosts[Reason.OK],
        stages=tuple(stages),
        score=sum(t.milli for t in terms),
        terms=terms,
        second=best / TABLE_SCALE if best > NO else None,
        level=level,
        domains=domains,
        evicted=tuple(dict.fromkeys(p.job for p in made.preemptions if p.for_job == job)),
    )


def _before(case: Case, made: Plan, request: Request, mine: tuple[Placement, ...]) -> tuple[State, gang.Where | None]:
    """The hosts at the job's turn, and which of them its affinity allowed."""
    state = make_state(case.fleet)
    ties, job = Ties(case.fleet, state), request.job
    first = made.placements.index(mine[0])
    earlier = made.placements[:first]
    turns = {p.job for p in earlier} | {job}
    gone = {p.placement for p in made.preemptions if p.for_job in turns}
    victims = held([r for r in case.running if r.placement in gone], lambda h: h)
    for row, vector, mask in zip(*victims, strict=True):
        give(row, vector, mask, state)
    asked = {r.job: r for r in case.requests}
    vectors = {p.job: request_vector(asked[p.job]) for p in earlier}
    for p in earlier:
        take(p.host, vectors[p.job], sum(1 << g for g in p.gpus), state)
        ties.placed(asked[p.job], [p.host])
    return state, ties.where(request)


def score_terms(state: State, q: I64, host: int, mask: int, t: Tables) -> tuple[Term, ...]:
    """The score of one replica on a host in its parts, each the difference that it makes there (milli-GPU).

    fragmentation: free GPU that the typical mix can no longer use. hole: what the free share of the GPU was worth,
    less what is left of it (shares). balance: GPU left without the CPU or memory to serve it. spec: how much others
    insist on this model. slots: idle GPUs together that requests for several will want. opening: breaking into an empty
    host. Other packers have one term of their own.
    """
    row, gfree = state.rows[host], state.gfree[host]
    need, milli, count = int(q[fit.Q_GPUS]), int(q[fit.Q_MILLI]), int(row[fit.NGPU])
    if t.mode:
        value, _ = score_host(host, q, state, t)
        return (Term("fgd" if t.mode == 1 else "best fit", float(value) if t.mode == 1 else value / TABLE_SCALE),)
    one = slice(host, host + 1)
    after = state._replace(
        rows=state.rows[one].copy(),
        gfree=state.gfree[one].copy(),
        vfree=state.vfree[one].copy(),
        nvl=state.nvl[one].copy(),
    )
    after.rows[0, fit.NODE] = NO_NODE  # watts are not scored
    taken = mask
    if not taken and need:
        idle = [i for i in range(count) if gfree[i] >= WHOLE]
        taken = sum(1 << i for i in idle[:need])
    take(0, q, taken, after)
    frag = (int(fragmentation(row, gfree, t)) - int(fragmentation(after.rows[0], after.gfree[0], t))) / t.total
    was = float(balance(float(row[fit.TOTAL]), float(row[fit.CPU]), float(row[fit.RAM]), t))
    left = after.rows[0]
    terms = {"fragmentation": t.w_frag * frag}
    if need == 1 and milli < WHOLE:
        before = int(gfree[mask.bit_length() - 1])
        terms["hole"] = float(t.hole[before - milli] - t.hole[before])
    terms["balance"] = was - float(balance(float(left[fit.TOTAL]), float(left[fit.CPU]), float(left[fit.RAM]), t))
    together, still = int(state.counted[host, IDLE]), int((after.gfree[0, :count] >= WHOLE).sum())
    still = min(together, still, int(left[fit.CPU]) // t.slot_cpu)
    terms["slots"] = float(state.worth[still] - state.worth[together])
    model = max(int(row[fit.MODEL]), 0)
    terms["spec"] = -float(t.spec[model]) * need * milli
    empty = count > 0 and int((gfree[:count] >= WHOLE).sum()) == count and row[fit.CPU_ONLY] == 0
    terms["opening"] = -t.opening if need <= 1 and empty else 0.0
    return tuple(Term(name, value) for name, value in terms.items())


def _domain(
    state: State, q: I64, request: Request, mine: tuple[Placement, ...], where: gang.Where | None
) -> tuple[Level, int]:
    """The smallest domain that holds all replicas, and how many domains of that level had room for all of them."""
    rows = [p.host for p in mine]
    room = np.minimum(gang.room(state, q), request.replicas)
    if where is not None:
        room = np.where(where.allowed, room, 0)
    for level in DOMAINS:
        of = gang.domains(state, level)
        if len(set(of[rows].tolist())) == 1:
            sums = np.bincount(of, weights=room)
            return level, int((sums >= request.replicas).sum())
    return Level.NONE, 1
