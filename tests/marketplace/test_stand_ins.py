"""Reserved windows on hosts that are out of work: others stand in, or it is told, written down to the second, and not charged."""

from datetime import timedelta
from itertools import pairwise, product
from uuid import uuid4

import pytest
from django.conf import settings
from django.core import mail
from django.db import transaction
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from marketplace import outbox, tasks
from marketplace.locks import Lock, acquire
from marketplace.models import ContractEvent, Gpu, Host, MaintenanceHost, Placement, ReservationBlock, Shortfall
from marketplace.services import (
    agents,
    availability,
    conditions,
    contracts,
    drains,
    gpu_health,
    leases,
    maintenance,
    sites,
)
from marketplace.services.contracts import healing, notices
from marketplace.services.contracts.shortfalls import Stay, pieces
from marketplace.tenancy import Actor
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.trade import accept, ask
from tests.marketplace.works import DAY, HOUR, MINUTE, Yard, missed

STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")
SECOND = timedelta(seconds=1)
START, END = NOW + 2 * DAY, NOW + 30 * DAY
LATER = START + 3 * HOUR
LEASE = timedelta(seconds=settings.SITE_LEASE_SECONDS)


@pytest.fixture
def yard(db):
    made = Yard()
    conditions.record(sites=[made.site.pk], now=NOW)
    return made


def heard(yard, now):
    """The site speaks: it is not silent, and none of its hosts is lost."""
    type(yard.agent).objects.update(last_sync_at=now)
    Host.objects.exclude(state="lost").update(beat_at=now)


def sicken(yard, host, now, gpu=3):
    heard(yard, now)
    event = {
        "id": str(uuid4()), "at": now, "kind": "gpu_error", "subject": host.name, "data": {"gpu": gpu, "kind": "xid", "code": 79},
    }  # fmt: skip
    agents.observe(yard.agent, {"agent_time": now, "boot": str(uuid4()), "sequence": 1, "events": [event]}, now=now)


def lose(yard, host, beat, now):
    heard(yard, now)
    Host.objects.filter(pk=host.pk).update(state="lost", state_reason="no beat", beat_at=beat)
    conditions.record(hosts=[host.pk], now=now)


def watched(yard, last, now):
    """The site has spoken last at `last`, its lease is a quarter of an hour, and its loop looks now."""
    type(yard.agent).objects.update(last_sync_at=last, lease_until=last + LEASE)
    Host.objects.exclude(state="lost").update(beat_at=last)
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        leases.watch(yard.site, now=now)


def well(yard, host, now):
    heard(yard, now)
    gpu_health.well(Host.objects.get(pk=host.pk), actor=STAFF, now=now, why="replaced")


def hosts_of(yard, contract):
    return [yard.hosts.index(Host.objects.get(pk=pk)) for pk in sorted(yard.on(contract))]


def told(contract):
    return list(ContractEvent.objects.filter(contract=contract, actor=healing.ACTOR).values_list("reason", flat=True))


def letters():
    """Mails of what is looked at here."""
    assert tasks.contracts
    outbox.drain(topic=notices.NOTICE)
    endings = tuple(notices.SUBJECTS[what].removeprefix("{id}: ") for what in notices.WORK)
    return [letter for letter in mail.outbox if letter.subject.endswith(endings)]


def never_oversold(yard):
    """No GPU is promised twice at any instant."""
    blocks = ReservationBlock.objects.filter(reservation__state="firm").select_related("reservation")
    for a, b in product(blocks, blocks):
        if a.pk < b.pk and a.host_id == b.host_id and set(a.gpu_indices) & set(b.gpu_indices):
            assert a.reservation.ends_at <= b.reservation.claims_at or b.reservation.ends_at <= a.reservation.claims_at
    for block in blocks:
        assert max(block.gpu_indices) < 8


# --- others stand in
def test_a_window_that_has_begun_moves_off_a_sick_host_and_loses_no_second_unpaid(yard):
    contract = yard.contract(gpus=8)
    (was,) = contract.reservation.blocks.all()
    sicken(yard, was.host, LATER)
    assert contracts.clock(LATER + 7 * SECOND).reservations_moved == 1
    (now,) = contract.reservation.blocks.all()
    assert now.host_id != was.host_id
    assert now.gpu_indices == list(range(8))
    assert missed(contract) == [(8, LATER, LATER + 7 * SECOND)]
    assert told(contract) == ["8 other GPUs stand in for its own (a GPU is sick); what was missing is not charged"]
    f.member(contract.organization, "engineer", f.user("eng@customer.example"))
    (letter,) = letters()
    assert letter.subject == f"{contract.public_id}: other GPUs stand in"
    assert letter.to == ["eng@customer.example"]
    assert contracts.clock(LATER + 17 * SECOND).reservations_moved == 0
    well(yard, was.host, LATER + HOUR)
    contracts.clock(LATER + HOUR)
    assert contract.reservation.blocks.get().host_id == now.host_id  # it stays where it is
    assert missed(contract) == [(8, LATER, LATER + 7 * SECOND)]
    assert len(told(contract)) == 1
    room = availability.largest(yard.listing, now=LATER + HOUR, starts_at=LATER + HOUR, ends_at=END, level="host")
    assert room == 8  # the host that is back is for sale
    never_oversold(yard)


def test_only_what_is_out_moves_and_it_stays_in_its_leaf(yard):
    contract = yard.contract(gpus=12, level="leaf")
    assert hosts_of(yard, contract) in ([0, 1], [2, 3])
    small = next(pk for pk, gpus in yard.on(contract).items() if gpus == 4)
    stays = yard.on(contract).keys() - {small}
    sicken(yard, Host.objects.get(pk=small), LATER)
    contracts.clock(LATER)
    assert yard.on(contract) == {**dict.fromkeys(stays, 8), small: 4}, "no host of the other leaf may stand in"
    assert missed(contract) == [(4, LATER, END)]
    other = Yard(leaves=("leaf-1", "leaf-1", "leaf-1", "leaf-2"))
    conditions.record(sites=[other.site.pk], now=NOW)
    contract = other.contract(gpus=12, level="leaf")
    small = next(pk for pk, gpus in other.on(contract).items() if gpus == 4)
    sicken(other, Host.objects.get(pk=small), LATER)
    contracts.clock(LATER)
    assert small not in other.on(contract)
    assert sorted(other.on(contract).values()) == [4, 8]
    assert {Host.objects.get(pk=pk).leaf for pk in other.on(contract)} == {"leaf-1"}


def test_as_many_as_there_are_stand_in_but_what_must_stand_in_one_host_is_not_torn_apart(yard):
    rivals = [accept(yard.customer, ask(yard.customer, yard.listing, gpus=4, end=END)) for _ in range(5)]
    loose = yard.contract(gpus=8)
    whole = [pk for pk, gpus in yard.on(loose).items()]
    assert len(rivals) == 5
    at = Host.objects.get(pk=whole[0])
    sicken(yard, at, LATER)
    contracts.clock(LATER)
    held = ReservationBlock.objects.filter(reservation__contract=loose)
    assert sum(len(b.gpu_indices) for b in held) == 8
    gone = held.filter(host=at).first()
    short = len(gone.gpu_indices) if gone else 0
    assert missed(loose) == ([(short, LATER, END)] if short else [])
    assert gone is None or 3 not in gone.gpu_indices  # the sick one went first
    never_oversold(yard)


def test_in_one_host_means_all_or_nothing(yard):
    yard.contract(gpus=8)
    accept(yard.customer, ask(yard.customer, yard.listing, gpus=4, level="host", end=END))
    Host.objects.filter(pk=yard.hosts[3].pk).update(listing=None)
    tight = yard.contract(gpus=8, level="host", term=(START, END))
    free = availability.largest(yard.listing, now=NOW, starts_at=START, ends_at=END, level="site")
    (was,) = tight.reservation.blocks.all()
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    assert yard.on(tight) == {was.host_id: 8}
    assert missed(tight) == [(8, LATER, END)]
    assert free == 4  # which are no use to it


def test_it_is_not_moved_onto_hosts_that_nobody_hears_nor_onto_what_others_hold(yard):
    contract = yard.contract(gpus=8, level="host")
    rival = yard.contract(gpus=16)
    (was,) = contract.reservation.blocks.all()
    last = next(h for h in yard.hosts if h.pk not in {*yard.on(contract), *yard.on(rival)})
    lose(yard, last, LATER - 5 * MINUTE, LATER - MINUTE)
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    assert yard.on(contract) == {was.host_id: 8}
    Host.objects.filter(pk=last.pk).update(state="active", beat_at=LATER)
    contracts.clock(LATER + MINUTE)  # still no word of it in the history: it counts as lost
    assert yard.on(contract) == {was.host_id: 8}
    heard(yard, LATER + 2 * MINUTE)
    conditions.record(hosts=[last.pk], now=LATER + 2 * MINUTE)
    contracts.clock(LATER + 2 * MINUTE)
    assert yard.on(contract) == {last.pk: 8}
    never_oversold(yard)


def test_where_spot_must_leave_first_its_notice_is_not_charged_either(yard):
    contract = yard.contract(gpus=8)
    (was,) = contract.reservation.blocks.all()
    spot = f.contract(yard.listing, kind="spot", gpu_count=32)
    for host in yard.hosts:
        if host.pk != was.host_id:
            f.placement(
                f.job(spot, state="running", gpus=8, attempt=1), host, state="running", attempt=1, running_at=NOW
            )
    sicken(yard, was.host, LATER)
    contracts.clock(LATER)
    clear = LATER + timedelta(seconds=availability.lead_s(yard.listing))
    assert missed(contract) == [(8, LATER, clear)]
    for seconds in (10, 20, 1000):
        contracts.clock(LATER + timedelta(seconds=seconds))
    assert missed(contract) == [(8, LATER, clear)]


# --- none stand in
def full(yard, **fields):
    """A contract of one host, and somebody else's of the three others."""
    contract = yard.contract(gpus=8, level="host", **fields)
    other = yard.contract(gpus=24, customer=f.organization(), **fields)
    return contract, other, Host.objects.get(pk=next(iter(yard.on(contract))))


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
