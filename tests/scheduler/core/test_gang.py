"""Gangs against brute force: placed whole wherever the topology allows it, and nowhere else; and jobs tied to each other."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import gang
from scheduler.core.fit import fits_one, host_row, rounded_end, vram_of
from scheduler.core.fit_kernels import request_vector
from scheduler.core.pack import make_state
from scheduler.core.plan import plan
from scheduler.core.ties import Ties
from scheduler.core.types import FOREVER, Fleet, Level, Reason, Request, Tie, Topology
from tests.scheduler.core.cells import cell, check, queue

pytestmark = pytest.mark.serverless
LEVELS = (Level.HOST, Level.LEAF, Level.SPINE, Level.SITE)


def domain(fleet, level, host):
    """Plain twin of gang.domains."""
    if level <= Level.HOST:
        return host
    return int({Level.LEAF: fleet.leaf, Level.SPINE: fleet.spine, Level.SITE: fleet.site}[level][host])


def fits_how_often(fleet, host, request):
    """Replicas that go on the host one after another by the plain rule, at most as many as are asked for."""
    row, count = host_row(fleet, host), 0
    while count < request.replicas and (found := fits_one(row, request, ())).reason == Reason.OK:
        count += 1
        free = [f - request.gpu_milli * (i in found.gpus) for i, f in enumerate(row.gpu_free)]
        vram = [
            v - vram_of(request.vram, request.gpu_milli, row.vram_total) * (i in found.gpus)
            for i, v in enumerate(row.vram_free)
        ]
        active = row.gpu_active | sum(1 << i for i in found.gpus)
        row = row._replace(
            gpu_free=free, vram_free=vram, gpu_active=active, cpu_free=row.cpu_free - request.cpu,
            ram_free=row.ram_free - request.ram, nvme_free=row.nvme_free - request.nvme,
        )  # fmt: skip
    return count


def can_stand(fleet, request, allowed, members):
    """Whether the gang has a place at all: plain loops over every domain of the level that binds it."""
    t = request.topology
    room = {h: fits_how_often(fleet, h, request) for h in range(len(fleet)) if allowed[h]}
    bound = max(t.pack, Level.HOST) if t.required and t.pack > Level.NONE else Level.SITE
    best = 0
    for name in {domain(fleet, bound, h) for h in range(len(fleet))}:
        inside = {h: n for h, n in room.items() if domain(fleet, bound, h) == name}
        if members and name not in {domain(fleet, bound, m) for m in members}:
            continue
        if t.spread > Level.NONE and t.max_per_domain:
            each, there = Counter(), Counter(domain(fleet, t.spread, m) for m in members)
            for h, n in inside.items():
                each[domain(fleet, t.spread, h)] += n
            best = max(best, sum(min(n, max(0, t.max_per_domain - there[d])) for d, n in each.items()))
        else:
            best = max(best, sum(inside.values()))
    return best >= request.replicas


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_gang_stands_where_brute_force_finds_room_and_only_there(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.randrange(2, 16), watts=False)
    state = make_state(fleet)
    before = [column.copy() for column in state]
    for asked in queue(dice, 12):
        topology = Topology(
            pack=dice.choice((Level.NONE, *LEVELS)), required=dice.random() < 0.6, nvlink=dice.choice((0, 2)),
            spread=dice.choice((Level.NONE, Level.NONE, Level.HOST, Level.LEAF)), max_per_domain=dice.choice((0, 1, 2)),
        )  # fmt: skip
        if topology.required and topology.pack == Level.NONE:
            topology = replace(topology, required=False)
        request = replace(asked, replicas=dice.choice((1, 2, 3, 5)), topology=topology)
        allowed = np.array([dice.random() < 0.8 for _ in range(len(fleet))])
        home = dice.randrange(len(fleet))
        level = max(topology.pack, Level.HOST) if topology.required else Level.SITE
        kin = [h for h in range(len(fleet)) if domain(fleet, level, h) == domain(fleet, level, home)]
        members = [dice.choice(kin) for _ in range(dice.choice((0, 0, 1, 3)))]
        q = request_vector(request)
        where = gang.Where(allowed, np.array(members, np.int64))
        placed = gang.place_gang(state, q, request.replicas, topology, where)
        assert (placed is not None) == can_stand(fleet, request, allowed, members), (request, members)
        if placed is None:
            assert all((a == b).all() for a, b in zip(state, before, strict=True))
            continue
        hosts = placed.host.tolist()
        assert len(hosts) == request.replicas
        assert all(allowed[h] for h in hosts)
        everybody = hosts + members
        assert len({domain(fleet, Level.SITE, h) for h in everybody}) == 1
        if topology.required:
            assert len({domain(fleet, topology.pack, h) for h in everybody}) == 1
        if topology.spread > Level.NONE and topology.max_per_domain:
            each = Counter(domain(fleet, topology.spread, h) for h in hosts)
            there = Counter(domain(fleet, topology.spread, m) for m in members)
            assert all(n + there[d] <= topology.max_per_domain for d, n in each.items())
        gang.release_kernel(q, state, placed.host, placed.mask, request.replicas)
        assert all((a == b).all() for a, b in zip(state, before, strict=True))


def leaves(sizes, **more):
    """Hosts of 8 GPUs, `sizes[i]` of them in leaf i, two leaves a spine, all at one site."""
    names = [leaf for leaf, size in enumerate(sizes) for _ in range(size)]
    return Fleet.build(
        [{"host_id": i, "cpu_free": 64_000, "gpus": 8, "leaf": n, "spine": n // 2, **more} for i, n in enumerate(names)]
    )


def hosts_of(result, job):
    return [p.host for p in result.placements if p.job == job]


def test_spread_is_as_even_as_room_allows_and_counts_who_is_there():
    fleet = leaves((2, 2, 2))
    state = make_state(fleet)
    q = request_vector(Request(job=1, gpus=8))
    placed = gang.place_gang(state, q, 5, Topology(spread=Level.LEAF))
    assert sorted(Counter(h // 2 for h in placed.host.tolist()).values()) == [1, 2, 2]
    gang.release_kernel(q, state, placed.host, placed.mask, 5)
    where = gang.Where(np.ones(6, bool), np.array([0, 2], np.int64))
    placed = gang.place_gang(state, q, 1, Topology(spread=Level.LEAF), where)
    assert placed.host.tolist() == [4]


def test_pack_required_waits_for_the_smallest_domain_that_could_ever_hold_it():
    fleet = leaves((4, 4))
    fleet.gpu_free[0] = fleet.gpu_free[4] = 0  # three hosts of four are free in each leaf
    request = Request(job=1, replicas=4, gpus=8, topology=Topology(required=True))
    decision = plan(fleet, [request]).decisions[0]
    assert (decision.reason, decision.short) == (Reason.TOPOLOGY, 1)
    assert len(plan(fleet, [replace(request, topology=Topology())]).placements) == 4
    wider = plan(fleet, [replace(request, replicas=6)])  # no leaf has six hosts: the spine is the smallest that could
    assert len(wider.placements) == 6
    fleet.gpu_free[0] = 1000
    assert {int(fleet.leaf[h]) for h in hosts_of(plan(fleet, [request]), 1)} == {0}


def test_a_gang_that_fits_in_no_single_site_says_so():
    fleet = leaves((2, 2))
    fleet.site[2:] = fleet.spine[2:] = 1
    decision = plan(fleet, [Request(job=1, replicas=3, gpus=8)]).decisions[0]
    assert (decision.placed, decision.reason, decision.short) == (False, Reason.TOPOLOGY, 1)


def test_lost_replicas_come_back_into_the_gangs_own_domain():
    fleet = leaves((3, 4))
    fleet.gpu_free[0] = fleet.gpu_free[3] = fleet.gpu_free[4] = 0
    lost = Request(job=1, replicas=1, gpus=8, topology=Topology(Level.LEAF, required=True), members=(3, 4))
    assert set(hosts_of(plan(fleet, [lost]), 1)) < {5, 6}
    two = plan(fleet, [replace(lost, replicas=2)])
    assert sorted(hosts_of(two, 1)) == [5, 6]
    none = plan(fleet, [replace(lost, replicas=3)]).decisions[0]
    assert (none.reason, none.short) == (Reason.TOPOLOGY, 1)
    # Preferred only: the nearest room, here on the members' own leaf while there is some, elsewhere at the site else.
    near = replace(lost, topology=Topology(Level.LEAF))
    assert set(hosts_of(plan(fleet, [near]), 1)) < {5, 6}
    fleet.gpu_free[5] = fleet.gpu_free[6] = 0
    assert set(hosts_of(plan(fleet, [near]), 1)) < {1, 2}
    fleet.site[:3] = fleet.spine[:3] = 9
    assert plan(fleet, [near]).decisions[0].placed is False


def test_apart_from_what_stands_and_from_what_the_same_plan_places():
    fleet = leaves((2, 2, 2))
    stands = Tie(Level.LEAF, 1, (0,))
    one = Request(job=1, gpus=1, apart=(stands,), joins=(1,), queued_at=1)
    two = Request(job=2, gpus=1, apart=(stands,), joins=(1,), queued_at=2)
    three = Request(job=3, gpus=1, apart=(stands,), joins=(1,), queued_at=3)
    result = plan(fleet, [one, two, three])
    assert {h // 2 for h in hosts_of(result, 1) + hosts_of(result, 2)} == {1, 2}
    decision = next(d for d in result.decisions if d.job == 3)
    assert (decision.placed, decision.reason) == (False, Reason.AFFINITY)
    assert dict(decision.stages)[Reason.AFFINITY] == 0
    assert decision.change


def test_near_waits_for_its_group_and_goes_where_it_goes():
    fleet = leaves((2, 2))
    db = Request(job=1, gpus=8, joins=(7,), queued_at=2)
    web = Request(job=2, gpus=1, near=(Tie(Level.LEAF, 7),), queued_at=1)
    result = plan(fleet, [web])
    assert result.decisions[0].reason == Reason.AFFINITY  # nothing of the group anywhere
    later = replace(web, queued_at=3)
    result = plan(fleet, [db, later])
    assert {int(fleet.leaf[h]) for h in hosts_of(result, 1) + hosts_of(result, 2)} == {
        int(fleet.leaf[hosts_of(result, 1)[0]])
    }
    there = replace(web, near=(Tie(Level.HOST, 7, (3,)),))
    assert hosts_of(plan(fleet, [there]), 2) == [3]


def test_the_first_of_a_group_that_must_stand_together_is_not_held_up_by_itself():
    fleet = leaves((2, 3))
    first = Request(job=1, replicas=3, gpus=8, near=(Tie(Level.LEAF, 5),), joins=(5,))
    assert sorted(hosts_of(plan(fleet, [first]), 1)) == [2, 3, 4]
    assert plan(fleet, [replace(first, replicas=4)]).decisions[0].placed is False


def test_rows_of_one_machine_are_one_host_to_affinity():
    fleet = Fleet.build([{"host_id": 1, "cpu_free": 9, "gpus": 4, "pool": 1}, {"host_id": 1, "gpus": 4, "pool": 2}])
    request = Request(job=1, gpus=1, pool=2, apart=(Tie(Level.HOST, 1, (0,)),))
    assert plan(fleet, [request]).decisions[0].reason == Reason.AFFINITY


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_ties_hold_in_every_plan_under_any_seed(seed):
    dice = random.Random(seed)
    fleet, _ = cell(dice, dice.randrange(2, 16), watts=dice.random() < 0.5)
    stands = {g: tuple(sorted(dice.sample(range(len(fleet)), dice.randrange(0, 2)))) for g in range(3)}
    requests = []
    for r in queue(dice, 20):
        ties = [Tie(dice.choice(LEVELS), g, stands[g]) for g in range(3) if dice.random() < 0.3]
        near = dice.random() < 0.4
        joins = tuple(g for g in range(3) if dice.random() < 0.4)
        requests.append(replace(r, near=tuple(ties) if near else (), apart=() if near else tuple(ties), joins=joins))
    result = plan(fleet, requests, seed=seed % 3)
    check(fleet, result, requests)
    by_job = {r.job: r for r in requests}
    placed = {g: list(stands[g]) for g in range(3)}
    for job in dict.fromkeys(p.job for p in result.placements):  # in the order in which they were placed
        r, hosts = by_job[job], hosts_of(result, job)
        for tie in r.apart:
            theirs = {domain(fleet, tie.level, h) for h in placed[tie.group]}
            assert not theirs & {domain(fleet, tie.level, h) for h in hosts}
        for tie in r.near:
            theirs = {domain(fleet, tie.level, h) for h in placed[tie.group]}
            mine = {domain(fleet, tie.level, h) for h in hosts}
            assert mine <= theirs or (not theirs and tie.group in r.joins and len(mine) == 1)
        for g in r.joins:
            placed[g] += hosts


def test_ties_follow_the_order_of_the_state():
    fleet = leaves((1, 1, 1))
    order = np.array([2, 0, 1], np.int64)
    ties = Ties(fleet, make_state(fleet, order), order)
    where = ties.where(Request(job=1, gpus=1, apart=(Tie(Level.HOST, 0, (2,)),), members=(0,)))
    assert where.allowed.tolist() == [False, True, True]
    assert where.members.tolist() == [1]
    assert ties.where(Request(job=1)) is None


def test_taints_and_deadlines():
    fleet = leaves((2,))
    fleet.taints[0] = 0b10
    fleet.leaves[1] = 5000
    asked = Request(job=1, gpus=1, until=rounded_end(1000, 4000, [5000]))
    assert hosts_of(plan(fleet, [asked]), 1) == [1]
    longer = plan(fleet, [replace(asked, until=rounded_end(1000, 4001, [5000]))]).decisions[0]
    assert longer.reason == Reason.LEAVES_TOO_SOON
    assert dict(longer.stages)[Reason.TAINTED] == 1
    assert hosts_of(plan(fleet, [replace(asked, until=FOREVER, tolerates=0b10)]), 1) == [0]
    fleet.leaves[1] = 0
    fleet.taints[:] = 0b1
    assert plan(fleet, [replace(asked, tolerates=0b10)]).decisions[0].reason == Reason.TAINTED


@pytest.mark.parametrize(
    ("duration", "deadlines", "until"),
    [(60, [], 0), (60, [1060, 2000], 1060), (61, [1060, 2000], 2000), (2000, [1060, 2000], FOREVER), (0, [5], FOREVER)],
)
def test_an_end_is_rounded_up_to_the_next_deadline(duration, deadlines, until):
    assert rounded_end(1000, duration, deadlines) == until
    assert rounded_end(900, duration, deadlines, 100) == until  # a lag is time that it takes, too
