"""Why a placed job stands where it does: the score's terms add up to the score, and the best host is the one taken."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import choice
from scheduler.core.case import Case
from scheduler.core.fit_kernels import request_vector
from scheduler.core.score import TABLE_SCALE, Shape, tables_for
from scheduler.core.state import refresh_all, score_host
from scheduler.core.types import Fleet, Kind, Level, Policy, Reason, Request, Running
from tests.scheduler.core import cells

pytestmark = pytest.mark.serverless
HOST = {"gpus": 8, "vram": 80_000, "cpu_free": 96_000, "ram_free": 500_000}
MIX = ((4000, 8192, 1, 500, 0, 5), (8000, 65_536, 1, 1000, 0, 10), (64_000, 400_000, 8, 1000, 0, 3))


def test_the_host_taken_and_what_it_was_chosen_from():
    half = {**HOST, "gpu_free": [0] * 4 + [1000] * 4, "gpu_active": 15, "cpu_free": 48_000, "ram_free": 250_000}
    fleet = Fleet.build([{**HOST, "host_id": 1}, {**half, "host_id": 2}, {**HOST, "host_id": 3, "cpu_free": 10}])
    case = Case(fleet, [Request(job=1, gpus=1, cpu=8000, ram=65_536)], [], Policy(shapes=MIX))
    made = case.plan()
    why = choice.choice(case, made, 1)
    assert (made.placements[0].host, why.candidates, why.hosts) == (1, 2, 3)
    assert dict(why.stages)[Reason.NO_CPU] == 2
    assert why.second < why.score
    terms = {t.name: t.milli for t in why.terms}
    assert terms["opening"] == 0, "the host was open already"
    assert set(terms) == {"fragmentation", "balance", "spec", "slots", "opening"}
    assert choice.choice(case, made, 2) is None


def test_a_gang_stands_in_the_smallest_domain_and_says_of_how_many():
    rows = [{**HOST, "host_id": i, "leaf": i // 4, "spine": i // 8} for i in range(16)]
    case = Case(Fleet.build(rows), [Request(job=1, replicas=3, gpus=8)], [], Policy(shapes=MIX))
    why = choice.choice(case, case.plan(), 1)
    assert (why.level, why.domains, len(why.placements)) == (Level.LEAF, 4, 3)


def test_who_left_for_it_is_named_and_the_hosts_are_those_of_its_turn():
    full = {
        **HOST,
        "host_id": 1,
        "gpu_free": [0] * 8,
        "gpu_active": 255,
        "cpu_free": 0,
        "ram_free": 0,
        "vram_free": [0] * 8,
    }
    victim = Running(
        placement=5, job=9, org=2, kind=Kind.SPOT, host=0, gpus=tuple(range(8)), cpu=96_000, ram=500_000, vram=80_000
    )
    case = Case(Fleet.build([full]), [Request(job=1, gpus=8, cpu=1000)], [victim], Policy(shapes=MIX))
    why = choice.choice(case, case.plan(), 1)
    assert (why.evicted, why.candidates) == ((9,), 1)


@given(st.integers(0, 10**6))
def test_no_candidate_scored_more_and_the_terms_are_the_score(seed):
    dice = random.Random(seed)
    fleet, _ = cells.cell(dice, hosts=9, watts=False)
    requests = [r for r in cells.queue(dice, jobs=12) if r.replicas == 1]
    case = Case(fleet, requests, [], Policy(shapes=MIX), seed % 5)
    made = case.plan()
    tables = tables_for(fleet, [Shape(*row) for row in MIX], "tailrace")
    for place in made.placements:
        request = next(r for r in requests if r.job == place.job)
        why = choice.choice(case, made, place.job)
        assert why.candidates >= 1
        assert dict(why.stages)[Reason.NO_WATTS] == why.candidates
        if request.tied:
            continue
        assert why.second is None or why.second <= why.score + 1 / 32
        state, _ = choice._before(case, made, request, (place,))
        refresh_all(state, tables)
        score, _ = score_host(place.host, request_vector(request), state, tables)
        assert abs(why.score - score / TABLE_SCALE) < 1 / 32, "the terms add up to what the planner compared"
