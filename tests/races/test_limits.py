"""Cells that commit at the same moment for one organization: its GPU limit holds over all of them, and no job is lost."""

import threading

import pytest

from marketplace.errors import MarketError
from marketplace.models import Contract, Job, Organization, OrganizationSlice, OutboxMessage, Placement
from marketplace.services import accounts, slices, spending
from marketplace.tenancy import Actor
from scheduler import commit, cycle, why
from scheduler.core.types import Reason
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market, blocked
from tests.threads import at_once, in_thread

pytestmark = pytest.mark.django_db(transaction=True)


def two_cells(limit, hosts=1):
    """Markets in two cells, whose jobs are one organization's."""
    one, two = Market(hosts), Market(hosts)
    organization = one.contract.organization
    Organization.objects.filter(pk=organization.pk).update(gpu_limit=limit)
    two.contract = f.contract(two.contract.listing, organization, gpu_count=64)
    two.actor = one.actor
    assert one.cell.pk != two.cell.pk
    return one, two


def held():
    live = Placement.objects.exclude(state__in=Placement.FINAL)
    return sum(p.milli_gpus for p in live)


def shared():
    return sum(OrganizationSlice.objects.values_list("milli", flat=True))


def test_two_cells_with_one_remainder():
    """Both have planned on it; whoever commits second is refused, waits, and is told why."""
    one, two = two_cells(limit=8)
    mine, other = one.submit(gpus=6), two.submit(gpus=6)
    plans = [one.planned(), two.planned()]
    outcomes = at_once([lambda p=p: commit.commit(*p, now=NOW) for p in plans])
    assert sorted((len(o.placed), list(o.conflicts.values())) for o in outcomes) == [
        (0, [Reason.ORGANIZATION_LIMIT]),
        (1, []),
    ]
    assert held() == 6000
    assert sorted(Job.objects.values_list("state", flat=True)) == ["placed", "queued"]
    waits = Job.objects.get(pk__in=[mine.pk, other.pk], state="queued")
    cycle.run(waits.cell_id, now=NOW)
    waits.refresh_from_db()
    told = why.explain(waits)
    assert (told["reason"], told["binding"]) == ("organization_limit", "the organization limit of GPUs is reached")
    assert "the organization limit is 8 GPUs; 6 are in use, and it needs 6" in told["text"]
    assert "limit" in {change["kind"] for change in told["changes"]}
    for market in (one, two):
        market.sound()
    placed = Job.objects.get(state="placed")
    at, waiting = (one, two) if placed.cell_id == one.cell.pk else (two, one)
    at.report(placed, "running")
    at.report(placed, "exited", exit_code=0)
    waiting.cycle()
    assert Job.objects.get(pk=waits.pk).state == "placed"
    assert held() == 6000 <= shared() <= 8000


def test_a_rival_that_has_placed_but_not_committed_is_waited_for(monkeypatch):
    """The second commit begins while the first has written its placements and not ended: it must not see the old remainder."""
    one, two = two_cells(limit=8)
    one.submit(gpus=6)
    two.submit(gpus=6)
    plans = [one.planned(), two.planned()]
    placed, place, waited = threading.Event(), commit._place, []

    def place_and_wait(*args):
        place(*args)
        if not placed.is_set():
            placed.set()
            for _ in range(2000):
                if blocked():
                    waited.append(True)
                    return

    monkeypatch.setattr(commit, "_place", place_and_wait)
    first = in_thread(lambda: commit.commit(*plans[0], now=NOW))
    assert placed.wait(30)
    second = commit.commit(*plans[1], now=NOW)
    assert len(first().placed) == 1
    assert waited
    assert (second.placed, list(second.conflicts.values())) == ([], [Reason.ORGANIZATION_LIMIT])
    assert held() == 6000


@pytest.mark.parametrize("grown", [False, True])
def test_a_slice_that_is_taken_away_between_plan_and_commit(monkeypatch, grown):
    """The cell believes that its slice holds the plan; before it locks the row, another cell takes what is not held of it."""
    one, two = two_cells(limit=8)
    other = two.submit(gpus=6)
    organization = one.contract.organization_id
    OrganizationSlice.objects.create(organization_id=organization, cell=one.cell, milli=8000)
    mine = one.submit(gpus=4)
    plans = [one.planned(), two.planned()]
    looked = slices.beyond

    def look_then_rival(cell_id, wanted):
        monkeypatch.setattr(slices, "beyond", looked)
        found = looked(cell_id, wanted)
        assert found == []
        if not grown:
            assert in_thread(lambda: commit.commit(*plans[1], now=NOW))().placed == [other.pk]
        return found

    monkeypatch.setattr(slices, "beyond", look_then_rival)
    outcome = commit.commit(*plans[0], now=NOW)
    assert (outcome.placed, outcome.conflicts) == (
        ([mine.pk], {}) if grown else ([], {mine.pk: Reason.ORGANIZATION_LIMIT})
    )
    assert held() <= 8000
    assert shared() <= 8000
    assert Job.objects.get(pk=mine.pk).state == ("placed" if grown else "queued")


def test_many_cells_cycles_at_once_fill_the_limit_and_lose_nothing():
    one, two = two_cells(limit=10, hosts=2)
    for _ in range(6):
        one.submit(gpus=2)
        two.submit(gpus=2)
    for _ in range(4):
        at_once([one.cycle, two.cycle, one.cycle, two.cycle])
    assert held() == 10_000 == shared()
    assert Job.objects.filter(state="placed").count() == 5
    for market in (one, two):
        market.sound()


def test_an_organization_within_its_slice_takes_no_lock_of_its_own(monkeypatch):
    one, _ = two_cells(limit=1000, hosts=2)
    taken = []
    acquire = commit.acquire
    monkeypatch.setattr(commit, "acquire", lambda *wanted: (taken.append(wanted), acquire(*wanted)))
    for _ in range(2):
        one.submit(gpus=4)
        assert one.cycle().jobs_placed == 1
    kinds = [{kind.name for kind, _ in wanted} for wanted in taken]
    assert kinds == [{"CELL", "ORG", "SITE"}, {"CELL", "SITE"}]


STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")


def raised(organization, limit, seen):
    return accounts.set_gpu_limit(organization, limit, seen=seen, actor=STAFF, reason="asked", now=NOW)


def test_a_limit_that_is_raised_lets_go_what_waited_for_it():
    one, two = two_cells(limit=8, hosts=2)
    one.submit(gpus=8)
    two.submit(gpus=8)
    one.cycle()
    two.cycle()
    assert held() == 8000
    OutboxMessage.objects.all().delete()
    raised(one.contract.organization, 16, 8)
    assert set(OutboxMessage.objects.values_list("payload__cell", flat=True)) == {two.cell.pk}
    two.cycle()
    assert held() == 16_000 == shared()


def test_two_who_raise_a_limit_at_once_and_a_cell_that_commits():
    """One of them has read what the other has changed; whoever plans meanwhile keeps to one of the limits."""
    one, _ = two_cells(limit=8, hosts=2)
    for _ in range(2):
        one.submit(gpus=8)
    home = one.contract.organization
    answers = at_once([lambda: raised(home, 9, 8), lambda: raised(home, 16, 8), one.cycle])
    assert sorted(a if isinstance(a, str) else type(a).__name__ for a in answers[:2]) == ["Organization", "conflict"]
    home.refresh_from_db()
    assert held() <= home.gpu_limit * 1000
    with pytest.raises(MarketError) as refused:
        accounts.set_gpu_limit(home, 99, seen=home.gpu_limit, actor=one.actor, reason="", now=NOW)
    assert refused.value.code == "forbidden"


def test_jobs_without_gpus_ask_for_no_slice():
    one, _ = two_cells(limit=0)
    one.submit(gpus=0)
    assert one.cycle().jobs_placed == 1
    assert not OrganizationSlice.objects.exists()


def test_a_limit_that_was_lowered_holds_for_what_comes_after():
    one, two = two_cells(limit=16, hosts=2)
    one.submit(gpus=4)
    two.submit(gpus=4)
    one.cycle()
    two.cycle()
    Organization.objects.update(gpu_limit=9)
    late = one.submit(gpus=2)
    one.cycle()
    assert Job.objects.get(pk=late.pk).state == "queued"
    small = two.submit(gpus=1)
    two.cycle()
    assert Job.objects.get(pk=small.pk).state == "placed"
    assert held() == 9000
    assert shared() == 9000


# --- what an hour costs
def test_two_cells_with_one_remainder_of_an_hourly_limit():
    one, two = two_cells(limit=64)
    for market in (one, two):
        market.contract = f.contract(
            market.contract.listing, one.contract.organization, kind="on_demand", price=2_000_000
        )
    spending.set_limits(one.actor, one.contract.organization, hourly_minor=1500, now=NOW)
    mine, other = one.submit(gpus=6), two.submit(gpus=6)
    plans = [one.planned(), two.planned()]
    outcomes = at_once([lambda p=p: commit.commit(*p, now=NOW) for p in plans])
    assert sorted((len(o.placed), list(o.conflicts.values())) for o in outcomes) == [
        (0, [Reason.HOURLY_LIMIT]),
        (1, []),
    ]
    assert held() == 6000
    waits = Job.objects.get(pk__in=[mine.pk, other.pk], state="queued")
    cycle.run(waits.cell_id, now=NOW)
    assert Job.objects.get(pk=waits.pk).decision.reason == "HOURLY_LIMIT"
    spending.set_limits(one.actor, one.contract.organization, hourly_minor=2400, now=NOW)
    cycle.run(waits.cell_id, now=NOW)
    assert Job.objects.get(pk=waits.pk).state == "placed"


def test_a_budget_stops_what_is_new_and_nothing_else():
    """What runs goes on; what a running gang lost is placed again; a reserved contract's work costs nothing more."""
    one, _ = two_cells(limit=64, hosts=2)
    organization = one.contract.organization
    held_contract = one.contract
    use = one.contract = f.contract(held_contract.listing, organization, kind="on_demand", gpu_count=64)
    runs = one.submit(gpus=2)
    one.cycle()
    one.report(runs, "running", running_at=NOW)
    spending.set_limits(one.actor, organization, monthly_minor=0, now=NOW)
    new = one.submit(gpus=1)
    Contract.objects.filter(pk=held_contract.pk).update(kind="reserved")
    one.contract = held_contract
    paid = one.submit(gpus=1)
    one.cycle()
    states = dict(Job.objects.values_list("pk", "state"))
    assert states == {runs.pk: "running", new.pk: "queued", paid.pk: "placed"}
    assert Job.objects.get(pk=new.pk).decision.reason == "BUDGET_USED"
    spending.set_limits(one.actor, organization, monthly_minor=None, now=NOW)
    one.cycle()
    assert Job.objects.get(pk=new.pk).state == "placed"
    assert use.pk == Job.objects.get(pk=new.pk).contract_id
