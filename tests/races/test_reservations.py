"""Sales, claims and ends of contracts at the moment at which the scheduler plans, commits or evicts, on real connections."""

import threading
from datetime import timedelta

import pytest

from marketplace.errors import MarketError
from marketplace.models import (
    Contract,
    Job,
    OutboxMessage,
    Placement,
    ReservationBlock,
)
from marketplace.services import contracts, job_terms, jobs
from scheduler import commit, cycle
from scheduler.core.types import Reason
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market, blocked, sold
from tests.threads import in_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize(
    ("starts_at", "why"),
    [(None, Reason.HOST_RESERVED_FOR_OWNER), (NOW + timedelta(hours=1), Reason.RESERVED_SOON)],
)
def test_gpus_that_were_sold_between_plan_and_commit_are_refused(starts_at, why):
    market = Market(hosts=2)
    job, beside = market.submit(gpus=8), market.submit(gpus=4)
    the_plan = market.planned()
    reserved = sold(market, 8, starts_at=starts_at, level="host")
    (at,) = ReservationBlock.objects.values_list("host_id", flat=True)
    hit = {p.job for p in the_plan[1].placements if the_plan[0].host_of[p.host] == at}
    outcome = commit.commit(*the_plan, now=NOW)
    assert outcome.conflicts == dict.fromkeys(hit, why)
    assert set(outcome.placed) == {job.pk, beside.pk} - hit
    assert not Placement.objects.filter(host=at).exclude(contract=reserved).exists()
    market.sound()


def test_a_contracts_own_job_is_refused_where_its_gpus_have_moved_meanwhile():
    market = Market(hosts=2)
    reserved = sold(market, 8, level="host")
    job = jobs.submit(f.actor(reserved.organization), reserved, {"command": ["true"], "gpus": 8}, now=NOW)
    the_plan = market.planned(job)
    block = ReservationBlock.objects.get()
    other = next(h for h in market.hosts if h.pk != block.host_id)
    ReservationBlock.objects.update(host=other)
    assert commit.commit(*the_plan, now=NOW).conflicts == {job.pk: Reason.HOST_RESERVED_FOR_OWNER}
    assert market.cycle().jobs_placed == 1
    assert Placement.objects.get(job=job).host_id == other.pk
    market.sound()


def test_who_stands_on_claimed_gpus_is_told_to_go_however_late_anybody_looks():
    market = Market()
    job = market.submit(gpus=8)
    spot = f.contract(market.contract.listing, f.organization(), kind="spot", limit_price=900_000)
    Job.objects.filter(pk=job.pk).update(contract=spot)
    market.cycle()
    market.report(job, "running")
    sold(market, 8, starts_at=NOW + timedelta(hours=1))
    assert cycle.waiting_cells(NOW) == []
    claimed = NOW + timedelta(minutes=75)  # nobody beat for a quarter of an hour, the claim's first minute among them
    assert cycle.waiting_cells(claimed) == [market.cell.pk]
    cycle.run(market.cell.pk, now=claimed)
    assert Placement.objects.get(job=job).state == "draining"
    assert cycle.waiting_cells(claimed) == []  # it has been told


def test_an_eviction_takes_no_job_that_has_left_meanwhile(monkeypatch):
    """Looked at on claimed GPUs, ended there, placed elsewhere before the eviction has its locks: it stays."""
    market = Market(hosts=2)
    job = market.submit(gpus=8)
    spot = f.contract(market.contract.listing, f.organization(), kind="spot", limit_price=900_000)
    Job.objects.filter(pk=job.pk).update(contract=spot)
    market.cycle()
    (at,) = Placement.objects.values_list("host_id", flat=True)
    f.miner(market.site)  # anything that makes no difference
    reserved = sold(market, 8, level="host")
    ReservationBlock.objects.update(host=at)
    look, moved = cycle._strangers, []

    def look_and_move(*args, **how):
        found = look(*args, **how)
        if not moved:
            moved.append(True)
            in_thread(lambda: ReservationBlock.objects.update(host=next(h for h in market.hosts if h.pk != at)))()
        return found

    monkeypatch.setattr(cycle, "_strangers", look_and_move)
    assert cycle.evict_for_reservations(market.cell.pk, now=NOW) == []
    assert Placement.objects.get(job=job).state == "granted"
    assert reserved.state == "active"


# --- a job submitted while its contract ends
@pytest.mark.parametrize("first", ["submit", "end"])
def test_a_job_submitted_while_its_contract_ends_is_refused_or_ended(monkeypatch, first):
    market = Market()
    stale = Contract.objects.get(pk=market.contract.pk)
    if first == "end":
        contracts.end([market.contract.pk], now=NOW)
        with pytest.raises(MarketError, match="contract"):
            jobs.submit(market.actor, stale, {"command": ["true"]}, now=NOW)
        assert not Job.objects.exists()
        return
    checked, go = threading.Event(), threading.Event()
    check = job_terms.check

    def check_and_wait(*args):
        check(*args)
        checked.set()
        for _ in range(2000):
            if blocked():
                return

    monkeypatch.setattr(job_terms, "check", check_and_wait)
    submitted = in_thread(market.submit)
    assert checked.wait(30)
    ended = in_thread(lambda: contracts.end([market.contract.pk], now=NOW))
    job = submitted()
    assert ended() == [market.contract.pk]
    go.set()
    assert OutboxMessage.objects.filter(topic=contracts.END_JOBS).count() == 1
    assert Contract.objects.get(pk=market.contract.pk).state == "ending"
    jobs.end_contract(market.contract.pk, now=NOW)
    job.refresh_from_db()
    assert job.state == "cancelled"
