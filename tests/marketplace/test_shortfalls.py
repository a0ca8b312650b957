"""Reserved windows on hosts that are out of work, where none stand in: it is told, written down to the second, and not charged."""

from itertools import pairwise

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from marketplace.models import Gpu, Host, MaintenanceHost, Placement, Shortfall
from marketplace.services import (
    availability,
    conditions,
    contracts,
    drains,
    maintenance,
    quotes,
    sites,
)
from marketplace.services.contracts import healing
from marketplace.services.contracts.shortfalls import Stay, pieces
from marketplace.services.forward import resales
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.out_of_work import (
    END,
    LATER,
    LEASE,
    SECOND,
    START,
    heard,
    letters,
    lose,
    never_oversold,
    sicken,
    told,
    watched,
    well,
)
from tests.marketplace.works import DAY, HOUR, MINUTE, Yard, missed


@pytest.fixture
def yard(db):
    made = Yard()
    conditions.record(sites=[made.site.pk], now=NOW)
    return made


# --- none stand in
def full(yard, **fields):
    """A contract of one host, and somebody else's of the three others."""
    contract = yard.contract(gpus=8, level="host", **fields)
    other = yard.contract(gpus=24, customer=f.organization(), **fields)
    return contract, other, Host.objects.get(pk=next(iter(yard.on(contract))))


def test_hours_that_were_sold_on_are_missed_by_their_buyer_alone(yard):
    contract, _, host = full(yard)
    over, gone = LATER + DAY, LATER + HOUR
    resale = resales.offer(f.actor(contract.organization), contract, resales.Asked(4, LATER, over, 1_500_000), now=NOW)
    actor = f.actor(f.organization())
    quote = quotes.quote(actor, resale.listing_id, quotes.Request("reserved", 4), now=NOW)
    bought = contracts.accept(actor, quote.pk, now=NOW)
    contracts.confirm_payment(bought.pk, now=NOW)
    contracts.clock(LATER)
    sicken(yard, host, gone)
    contracts.clock(gone + 4 * SECOND)
    assert (missed(contract), missed(bought)) == ([(4, gone, END)], [(4, gone, over)])
    for late in (over, over + 5 * SECOND, over + HOUR):
        contracts.clock(late)
        assert (missed(contract), missed(bought)) == ([(4, gone, over), (8, over, END)], [(4, gone, over)])


def test_without_room_they_are_told_once_and_it_is_written_down_to_the_hosts_return(yard):
    contract, _, host = full(yard)
    f.member(contract.organization, "owner", f.user("owner@customer.example"))
    sicken(yard, host, LATER + 300 * SECOND)
    for seconds in (304, 314, 324):
        assert contracts.clock(LATER + seconds * SECOND).reservations_moved == 0
    since = LATER + 300 * SECOND
    assert missed(contract) == [(8, since, END)]
    assert contracts.missing(contract, since + MINUTE) == (8, since)
    said = "8 of its 8 GPUs cannot be used (a GPU is sick); not charged meanwhile; we go on looking for others"
    assert told(contract) == [said]
    (letter,) = letters()
    assert letter.subject == f"{contract.public_id}: some of its GPUs cannot be used"
    assert said in letter.body.replace("\n", " ")
    assert host.name not in letter.body  # its operator's names are its operator's
    back = LATER + HOUR + 3 * SECOND
    well(yard, host, back)
    contracts.clock(back + 8 * SECOND)
    assert missed(contract) == [(8, since, back)]
    assert contracts.missing(contract, back + 9 * SECOND) == (0, None)
    assert told(contract)[1:] == ["all of its GPUs can be used again"]
    contracts.clock(back + 18 * SECOND)
    assert len(told(contract)) == 2
    assert yard.on(contract) == {host.pk: 8}


def test_room_that_comes_later_ends_it(yard):
    contract, other, host = full(yard)
    sicken(yard, host, LATER)
    contracts.clock(LATER)
    contracts.terminate(f.actor(other.organization), other, now=LATER + HOUR)
    other.refresh_from_db()
    assert other.ends_at > LATER
    contracts.clock(other.ends_at - SECOND)
    assert yard.on(contract) == {host.pk: 8}
    contracts.clock(other.ends_at + SECOND)
    assert host.pk not in yard.on(contract)
    assert missed(contract) == [(8, LATER, other.ends_at + SECOND)]
    assert [words.split(" ")[1] for words in told(contract)] == ["of", "other"]


def test_two_falls_are_two_absences_and_a_return_between_two_ticks_is_seen(yard):
    contract, _, host = full(yard)
    at = [LATER + n * HOUR for n in range(6)]
    sicken(yard, host, at[0])
    contracts.clock(at[0])
    well(yard, host, at[1])
    sicken(yard, host, at[2])  # no tick in between
    contracts.clock(at[3])
    assert missed(contract) == [(8, at[0], at[1]), (8, at[2], END)]
    well(yard, host, at[4])
    contracts.clock(at[5])
    assert missed(contract) == [(8, at[0], at[1]), (8, at[2], at[4])]


def test_what_still_runs_there_is_used_and_what_left_is_not(yard):
    contract, _, host = full(yard)
    job = f.job(contract, state="running", gpus=2, attempt=1)
    stays = f.placement(job, host, [0, 1], state="running", attempt=1, running_at=START, created_at=START)
    sicken(yard, host, LATER)
    contracts.clock(LATER)
    assert missed(contract) == [(6, LATER, END)]
    Placement.objects.filter(pk=stays.pk).update(state="released", finished_at=LATER + HOUR)
    contracts.clock(LATER + HOUR + 9 * SECOND)
    assert missed(contract) == [(6, LATER, LATER + HOUR), (8, LATER + HOUR, END)]


def test_on_a_host_without_a_beat_nothing_is_used_from_its_last_one_on(yard):
    contract, _, host = full(yard)
    job = f.job(contract, state="running", gpus=2, attempt=1)
    f.placement(job, host, [0, 1], state="running", attempt=1, running_at=START, created_at=START)
    lose(yard, host, LATER, LATER + 3 * MINUTE)
    contracts.clock(LATER + 3 * MINUTE)
    assert missed(contract) == [(8, LATER, END)]
    assert "(a host does not answer)" in told(contract)[0]


def test_a_window_that_begins_on_a_sick_host_is_told_before_and_missing_from_its_first_second(yard):
    contract, _, host = full(yard)
    sicken(yard, host, START - 2 * DAY + HOUR)
    contracts.clock(START - 30 * HOUR)
    assert told(contract) == []  # far away
    for hours in (20, 10, 1):
        contracts.clock(START - hours * HOUR)
    (said,) = told(contract)
    assert said.startswith("what it is promised from")
    assert missed(contract) == []
    contracts.clock(START + 4 * SECOND)
    assert missed(contract) == [(8, START, END)]
    assert len(told(contract)) == 2 + 0


def test_a_drain_by_hand_counts_as_well_and_one_by_an_hour_only_from_then_on(yard):
    contract, _, host = full(yard)
    heard(yard, LATER)
    drains.drain_host(host, actor=yard.operator, now=LATER, reason="private words", by=LATER + HOUR)
    contracts.clock(LATER)
    assert missed(contract) == []
    heard(yard, LATER + HOUR)
    conditions.record(hosts=[host.pk], now=LATER + HOUR)
    contracts.clock(LATER + HOUR)
    assert missed(contract) == [(8, LATER + HOUR, END)]
    assert "private words" not in "".join(told(contract))


def test_maintenance_counts_its_own_hours_and_nothing_twice(yard):
    contract, _, host = full(yard)
    heard(yard, LATER)
    row = yard.announce(host, start=START + 10 * DAY, end=START + 10 * DAY + 4 * HOUR)
    taken, over = row.starts_at - 15 * MINUTE, row.ends_at
    sicken(yard, host, taken - HOUR)
    contracts.clock(taken - HOUR)
    assert missed(contract) == [(8, taken - HOUR, END)]
    heard(yard, taken)
    maintenance.clock(taken)
    assert MaintenanceHost.objects.get(host=host).taken_at == taken
    contracts.clock(taken + 5 * SECOND)
    assert missed(contract) == [(8, taken - HOUR, taken), (8, taken, over)]
    heard(yard, over)
    for at in (row.starts_at, over):
        maintenance.clock(at)
        contracts.clock(at)
    assert missed(contract)[2:] == [(8, over, END)]  # still sick
    well(yard, host, over + HOUR)
    contracts.clock(over + HOUR)
    assert missed(contract) == [(8, taken - HOUR, taken), (8, taken, over), (8, over, over + HOUR)]


def test_at_a_site_that_is_silent_past_its_lease_nothing_was_there_since_its_last_word(yard):
    contract, other, host = full(yard)
    job = f.job(contract, state="running", gpus=2, attempt=1)
    f.placement(job, host, [0, 1], state="running", attempt=1, running_at=START, created_at=START)
    watched(yard, LATER, LATER + LEASE)
    contracts.clock(LATER + LEASE)
    assert missed(contract) == []  # its agent is within its lease, and its work goes on
    watched(yard, LATER, LATER + LEASE + SECOND)
    assert contracts.clock(LATER + LEASE + SECOND).reservations_moved == 0
    assert missed(contract) == [(8, LATER, END)]
    assert sum(gpus for gpus, *_ in missed(other)) == 24
    (said,) = told(contract)
    assert said.startswith("8 of its 8 GPUs cannot be used (its site does not answer); not charged meanwhile")
    assert availability.largest(yard.listing, now=LATER + LEASE, starts_at=END, ends_at=END + DAY, level="site") == 0
    back = LATER + 2 * HOUR
    Host.objects.update(beat_at=back)
    watched(yard, back, back + 5 * SECOND)
    contracts.clock(back + 12 * SECOND)
    assert missed(contract) == [(8, LATER, back + 5 * SECOND)]
    assert told(contract)[1:] == ["all of its GPUs can be used again"]
    assert yard.on(contract) == {host.pk: 8}
    never_oversold(yard)


def test_a_window_that_begins_while_its_site_is_silent_is_told_before_and_missing_from_its_start(yard):
    contract, *_ = full(yard)
    watched(yard, START - 2 * HOUR, START - HOUR)
    contracts.clock(START - HOUR)
    (said,) = told(contract)
    assert said.startswith("what it is promised from")
    contracts.clock(START + 4 * SECOND)
    assert missed(contract) == [(8, START, END)]


def test_a_site_that_is_switched_off_owes_its_windows_too(yard):
    contract, *_ = full(yard)
    heard(yard, LATER)
    sites.set_site_mode(yard.site, "off", actor=yard.operator, now=LATER)
    contracts.clock(LATER + SECOND)
    assert missed(contract) == [(8, LATER, END)]
    assert "(its site is switched off)" in told(contract)[0]
    heard(yard, LATER + HOUR)
    sites.set_site_mode(yard.site, "auto", actor=yard.operator, now=LATER + HOUR)
    contracts.clock(LATER + HOUR + SECOND)
    assert missed(contract) == [(8, LATER, LATER + HOUR)]


def test_who_has_left_the_contract_or_not_begun_it_misses_nothing(yard):
    contract, other, host = full(yard)
    sicken(yard, host, LATER)
    contracts.clock(LATER)
    type(contract).objects.filter(pk=contract.pk).update(state="ended")
    other.reservations.update(state="released")  # there would be room
    contracts.clock(LATER + HOUR)
    assert yard.on(contract) == {host.pk: 8}
    assert len(told(contract)) == 1
    assert not Shortfall.objects.filter(contract=other).exists()
    assert Gpu.objects.filter(healthy=False).count() == 1


def test_a_sound_market_costs_the_clock_no_more_than_a_few_questions(yard, django_assert_max_num_queries):
    full(yard)
    with django_assert_max_num_queries(3):
        assert healing.heal(LATER) == 0


# --- who reads it
def test_page_and_api_say_how_many_are_missing_since_when_and_that_nothing_is_charged(yard, client):
    contract, other, host = full(yard)
    now = timezone.now().replace(microsecond=0)
    for start, end, of in ((now - HOUR, now + HOUR, contract), (now - 3 * HOUR, now - 2 * HOUR, other)):
        Shortfall.objects.create(contract=of, host=host, gpus=3, starts_at=start, ends_at=end)
    said = {}
    for row, who in (
        (contract, contract.organization),
        (other, other.organization),
        (contract, yard.site.organization),
    ):
        api = f.client(who).get(f"/api/v1/contracts/{row.public_id}").json()
        listed = next(r for r in f.client(who).get("/api/v1/contracts").json()["data"] if r["id"] == row.public_id)
        assert [listed[k] for k in ("missing_gpus", "missing_since")] == [
            api[k] for k in ("missing_gpus", "missing_since")
        ]
        client.force_login(f.member(who).user)
        said[row.pk, who.pk] = (
            api["missing_gpus"],
            api["missing_since"],
            client.get(f"/contracts/{row.public_id}").content.decode(),
        )
    gpus, since, page = said[contract.pk, contract.organization_id]
    assert (gpus, since) == (3, (now - HOUR).isoformat().replace("+00:00", "Z"))
    assert "3 of its 8 GPUs cannot be used" in page
    assert "You are not charged for them" in page
    gpus, since, page = said[other.pk, other.organization_id]  # it was, and is over
    assert (gpus, since, "cannot be used" in page) == (0, None, False)
    gpus, _, page = said[contract.pk, yard.site.organization_id]
    assert gpus == 3
    assert "They are not charged to the customer" in page
    assert f.client(f.organization()).get(f"/api/v1/contracts/{contract.public_id}").status_code == 404


# --- the arithmetic
@pytest.mark.serverless
@given(
    st.sets(st.integers(0, 3), min_size=1),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.booleans()), max_size=3),
    st.lists(st.tuples(st.sets(st.integers(0, 5)), st.integers(0, 12), st.integers(1, 6)), max_size=4),
)
def test_missing_hour_by_hour(own, out, stays):
    spans = [(NOW + a * HOUR, NOW + (a + n) * HOUR, dead) for a, n, dead in out]
    work = [Stay(frozenset(gpus), NOW + a * HOUR, NOW + (a + n) * HOUR) for gpus, a, n in stays]
    found = pieces(own, spans, work)
    for hour in range(20):
        at = NOW + hour * HOUR
        here = [dead for a, b, dead in spans if a <= at < b]
        used = {g for s in work if s.start <= at < s.end for g in s.gpus} if not any(here) else set()
        gpus = len(own - used) if here else 0
        assert sum(n for n, a, b in found if a <= at < b) == gpus
    assert all(n > 0 and a < b for n, a, b in found)
    assert all((n, b) != (m, c) for (n, _, b), (m, c, _) in pairwise(found))
