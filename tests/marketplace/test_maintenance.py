"""Maintenance from its announcement to its end: who is told, what stands in, which hosts go and come back, what is not charged."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from django.db import transaction
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.models import (
    AuditEvent,
    Curtailment,
    Host,
    Maintenance,
    MaintenanceHost,
    MaintenanceNotice,
    MaintenanceShortfall,
    OutboxMessage,
    Reservation,
)
from marketplace.services import availability, drains, maintenance, placements, search
from marketplace.services.maintenance.planning import Away, Block, Piece, shortfalls
from marketplace.services.maintenance.reads import joined
from scheduler import site_loop
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import accept, ask, refused

pytestmark = pytest.mark.django_db
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
START, END = NOW + 10 * DAY, NOW + 10 * DAY + 4 * HOUR
TERM = (NOW + 2 * DAY, NOW + 30 * DAY)


class Yard:
    """A site of four 8-GPU hosts in two racks, offered in one listing."""

    def __init__(self, hosts=4, leaves=("leaf-1", "leaf-1", "leaf-2", "leaf-2")):
        self.site = factories.site()
        self.agent, _ = factories.agent(self.site, last_sync_at=NOW, lease_until=NOW + 90 * DAY)
        self.hosts = [factories.host(self.site, leaf=leaf) for leaf in leaves[:hosts]]
        self.listing = factories.listing(self.site, hosts=self.hosts)
        self.operator = factories.actor(self.site.organization)
        self.customer = factories.organization()

    def contract(self, gpus=8, term=TERM, customer=None, **fields):
        customer = customer or self.customer
        return accept(customer, ask(customer, self.listing, gpus=gpus, start=term[0], end=term[1], **fields))

    def on(self, contract):
        """{host: GPUs} of its own."""
        return {b.host_id: len(b.gpu_indices) for b in contract.reservation.blocks.all()}

    def draft(self, *hosts, start=START, end=END, now=NOW, **fields):
        asked = {"scope": "hosts", "hosts": list(hosts), "text": "New fans.", **fields}
        return maintenance.draft(self.operator, self.site, starts_at=start, ends_at=end, now=now, **asked)

    def announce(self, *hosts, now=NOW, **fields):
        return maintenance.announce(self.operator, self.draft(*hosts, now=now, **fields), now=now)

    def states(self):
        return [Host.objects.get(pk=host.pk).state for host in self.hosts]

    def runs(self, contract, host, **fields):
        job = factories.job(contract, state="running", gpus=8, attempt=1, **fields)
        return job, factories.placement(job, host, state="running", attempt=1, running_at=NOW)

    def gone(self, placement, now):
        """The agent's word that the replica has left, and a turn of the site's loop."""
        placement.refresh_from_db()
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            row = {"pk": placement.pk, "generation": placement.generation, "state": "exited", "exit_code": 143}
            placements.observe(self.agent, [row], now=now)
        site_loop.run(self.site.pk, now=now)


@pytest.fixture
def yard():
    return Yard()


def told(contract):
    return list(
        MaintenanceNotice.objects.filter(contract=contract)
        .order_by("version")
        .values_list("what", "gpus", "short_gpus")
    )


def missed(contract):
    rows = MaintenanceShortfall.objects.filter(contract=contract).order_by("starts_at")
    return [(row.gpus, row.starts_at, row.ends_at) for row in rows]


# --- what it means, and who is told
def test_a_dry_run_says_who_is_short_of_what_and_changes_nothing(yard):
    whole, half = yard.contract(gpus=16), yard.contract(gpus=8)
    rack = Host.objects.get(pk=next(iter(yard.on(whole)))).leaf
    row = yard.draft(scope="domain", hosts=[], domain=rack)
    found = maintenance.dry_run(yard.operator, row, now=NOW)
    there = {t.contract: (t.gpus, t.short, t.kept) for t in found.touched}
    assert there[whole] == (16, 8, 8)  # the one host that nobody holds stands in
    assert half not in there
    assert found.sentence.startswith("2 hosts with 16 GPUs; 1 contract touched, 8 GPUs short from")
    assert (found.short_from, found.short_until) == (row.away_at, END)
    row.refresh_from_db()
    assert row.state == "draft"
    assert not Reservation.objects.filter(maintenance=row).exists()
    assert not MaintenanceNotice.objects.exists()


def test_announcing_tells_everybody_who_is_touched_once(yard, mailoutbox):
    firm = yard.contract(gpus=8)
    loose = factories.contract(yard.listing)
    for contract in (firm, loose):
        factories.member(contract.organization, "owner")
    (host,) = yard.on(firm)
    yard.runs(loose, yard.hosts[0])
    elsewhere = yard.contract(gpus=8, customer=factories.organization())
    hosts = [h for h in yard.hosts if h.pk == host or h == yard.hosts[0]]
    row = yard.announce(*hosts, impact="Jobs there move.")
    assert (row.state, row.noticed_until) == ("announced", END)
    assert told(firm) == [("announced", 8, 0)]  # another host stands in
    assert told(loose) == [("announced", 8, 0)]
    assert told(elsewhere) == []
    assert firm.events.last().reason.startswith(f"notice: {row.public_id} announced")
    assert AuditEvent.objects.get(verb="maintenance.announced").organization == yard.site.organization
    messages = OutboxMessage.objects.filter(topic=maintenance.NOTICE)
    assert messages.count() == 2
    for message in messages:
        maintenance.send_notice(**{k + "_id" if k != "version" else k: v for k, v in message.payload.items()})
    (mail,) = [m for m in mailoutbox if firm.public_id in m.body]
    assert "others stand in for all of them" in mail.body
    assert "Jobs there move." in mail.body
    assert loose.public_id not in mail.body
    refused("illegal_transition", maintenance.announce, yard.operator, row, now=NOW)
    assert maintenance.clock(START - DAY)["tell"] == 0  # nobody new


def test_whoever_comes_after_the_announcement_is_told_a_day_before(yard):
    row = yard.announce(*yard.hosts[:2])
    spot = factories.contract(yard.listing, kind="spot", limit_price=2_000_000)
    yard.runs(spot, yard.hosts[0])
    assert maintenance.clock(START - DAY - MINUTE)["tell"] == 0
    assert [maintenance.clock(START - DAY)["tell"] for _ in range(2)] == [1, 0]
    assert told(spot) == [("announced", 8, 0)]
    brief = factories.contract(yard.listing)  # it is sure to be gone by then
    yard.runs(brief, yard.hosts[1], max_seconds=3600)
    assert not maintenance.clock(START - 23 * HOUR)["tell"]
    assert (told(brief), row.state) == ([], "announced")


def test_firm_contracts_are_told_a_week_before_or_it_is_an_emergency_with_a_reason(yard):
    contract = yard.contract(gpus=8)
    (host,) = (h for h in yard.hosts if h.pk in yard.on(contract))
    soon = {"start": NOW + 3 * DAY, "end": NOW + 3 * DAY + HOUR}
    row = yard.draft(host, **soon)
    error = refused("notice_too_short", maintenance.announce, yard.operator, row, now=NOW)
    assert error.extra["contracts"] == [contract.public_id]
    assert error.extra["earliest"] == NOW + 7 * DAY
    refused("invalid_request", maintenance.change, yard.operator, row, now=NOW, emergency=True)
    row = maintenance.change(yard.operator, row, now=NOW, emergency=True, emergency_reason="A pump leaks.")
    row = maintenance.announce(yard.operator, row, now=NOW)
    assert (row.state, row.noticed_until) == ("announced", None)
    free = next(h for h in yard.hosts if h.pk != host.pk and not h.reservation_blocks.exists())
    assert yard.announce(free, **soon).noticed_until == soon["end"]  # nobody firm is there


# --- capacity
def test_nothing_is_sold_over_it_and_everything_around_it(yard):
    yard.announce(*yard.hosts)
    reasons = refused("no_capacity", ask, yard.customer, yard.listing, start=START - DAY, end=START + DAY)
    later = reasons.extra["alternatives"]["later"]
    assert later["starts_at"] >= END
    ask(yard.customer, yard.listing, start=START - DAY, end=START - HOUR)
    ask(yard.customer, yard.listing, start=END + HOUR, end=END + DAY)
    assert availability.largest(yard.listing, now=NOW, starts_at=START, ends_at=END) == 0
    shown = search.search(yard.operator, search.Filters(kind="reserved", start=START, end=END), now=NOW)
    assert [r.stock.gpus for r in shown.rows] in ([], [0])
    shown = search.search(yard.operator, search.Filters(kind="reserved", start=END + HOUR, end=END + DAY), now=NOW)
    assert [r.stock.gpus for r in shown.rows] == [24]  # the quote's hold is there


def test_search_and_the_market_agree_while_it_goes_on_and_afterwards(yard):
    yard.announce(yard.hosts[0])

    def both(now, start):
        window = {"starts_at": start, "ends_at": start + HOUR}
        exact = availability.largest(yard.listing, now=now, kind="on_demand", **window)
        (found,) = search.search(
            yard.operator, search.Filters(kind="on_demand", start=start, end=start + HOUR), now=now
        ).rows
        assert found.stock.gpus == exact
        return exact

    assert both(NOW, START) == 24
    maintenance.clock(START - 15 * MINUTE)
    site_loop.run(yard.site.pk, now=START - 14 * MINUTE)
    assert yard.states() == ["maintenance", "active", "active", "active"]
    assert both(START, START) == 24
    assert both(START, END) == 32  # it comes back, and is sold again from then on
    maintenance.clock(START)
    maintenance.clock(END)
    assert both(END, END) == 32


def test_a_quote_of_before_is_taken_around_it_or_refused(yard):
    early = ask(yard.customer, yard.listing, gpus=8, start=TERM[0], end=TERM[1])
    (host,) = (b.host for b in early.reservation.blocks.all())
    yard.announce(host)
    contract = accept(yard.customer, early)
    assert host.pk not in yard.on(contract)
    all_of_it = ask(factories.organization(), yard.listing, gpus=8, start=END + DAY, end=END + 2 * DAY)
    yard.announce(*yard.hosts, start=END + DAY, end=END + DAY + HOUR)
    refused("capacity_gone", accept, all_of_it.organization, all_of_it)


# --- hosts go and come back
def test_from_the_announcement_to_work_again(yard):
    contract = yard.contract(gpus=32)
    job, placement = yard.runs(contract, yard.hosts[0])
    row = yard.announce(yard.hosts[0])
    assert told(contract) == [("announced", 8, 8)]
    assert not maintenance.clock(START - 16 * MINUTE)["take"]
    away = START - 15 * MINUTE
    assert maintenance.clock(away)["take"] == 1
    placement.refresh_from_db()
    job.refresh_from_db()
    assert (placement.release_requested_at, job.state) == (away, "preempting")
    assert placement.state == "draining"
    host = Host.objects.get(pk=yard.hosts[0].pk)
    assert (host.state, host.back_at) == ("draining", END)
    yard.gone(placement, away + MINUTE)
    job.refresh_from_db()
    assert (job.state, job.restarts) == ("requeued", 0)
    assert yard.states() == ["maintenance", "active", "active", "active"]
    assert not maintenance.clock(START - MINUTE)
    assert maintenance.clock(START)["begin"] == 1
    assert missed(contract) == [(8, away, END)]
    Host.objects.update(beat_at=END)
    assert maintenance.clock(END + 7 * timedelta(seconds=1))["end"] == 1
    assert not maintenance.clock(END + MINUTE)
    assert yard.states() == ["active"] * 4
    row.refresh_from_db()
    assert (row.state, row.settled_at) == ("completed", END + timedelta(seconds=7))
    assert missed(contract) == [(8, away, END + timedelta(seconds=7))]  # to the moment when it was back
    assert maintenance.covers([host.pk], NOW, END + DAY) == {host.pk: [(away, END)]}
    assert maintenance.covers([host.pk], START, START + HOUR) == {host.pk: [(START, START + HOUR)]}


def test_others_stand_in_while_it_goes_on(yard):
    contract = yard.contract(gpus=8)
    (own,) = yard.on(contract)
    row = yard.announce(Host.objects.get(pk=own))
    meanwhile = Reservation.objects.get(maintenance=row, contract=contract)
    (block,) = meanwhile.blocks.all()
    assert (block.host_id != own, len(block.gpu_indices)) == (True, 8)
    assert (meanwhile.starts_at, meanwhile.ends_at) == (row.away_at, END)
    assert yard.on(contract) == {own: 8}  # afterwards it is where it was
    taken = availability.largest(yard.listing, now=NOW, starts_at=START, ends_at=END)
    assert taken == 32 - 8 - 8
    maintenance.clock(START)
    assert missed(contract) == []


def test_a_contract_that_wants_one_rack_has_its_stand_ins_there():
    yard = Yard(hosts=4, leaves=("leaf-1", "leaf-1", "leaf-1", "leaf-2"))
    contract = yard.contract(gpus=16, level="leaf")
    first = Host.objects.get(pk=min(yard.on(contract)))
    row = yard.announce(first)
    (block,) = Reservation.objects.get(maintenance=row, contract=contract).blocks.all()
    assert block.host.leaf == "leaf-1"
    yard.announce(*(h for h in yard.hosts if h.leaf == "leaf-1"), start=END + DAY, end=END + DAY + HOUR)
    assert told(contract)[-1] == ("announced", 16, 8)  # the whole block may go to another rack, which has one host


def test_a_job_with_a_long_grace_is_asked_early_enough(yard):
    contract = factories.contract(yard.listing)
    _, slow = yard.runs(contract, yard.hosts[0], checkpoint_grace_s=3600)
    yard.announce(yard.hosts[0], yard.hosts[1])
    maintenance.clock(START - HOUR - 3 * MINUTE)
    assert yard.states()[:2] == ["active", "active"]
    maintenance.clock(START - HOUR - 2 * MINUTE)
    slow.refresh_from_db()
    assert slow.release_requested_at == START - HOUR - 2 * MINUTE
    assert yard.states()[:2] == ["draining", "active"]
    maintenance.clock(START - 15 * MINUTE)
    assert yard.states()[:2] == ["draining", "draining"]


def test_a_host_in_two_comes_back_when_neither_has_it(yard):
    host = yard.hosts[0]
    first = yard.announce(host)
    second = yard.announce(host, start=START + HOUR, end=END + 2 * HOUR)
    for at in (START, START + HOUR):
        maintenance.clock(at)
        site_loop.run(yard.site.pk, now=at)
    assert yard.states()[0] == "maintenance"
    maintenance.clock(END)
    first.refresh_from_db()
    assert first.state == "completed"
    host.refresh_from_db()
    assert (host.state, host.back_at) == ("maintenance", second.ends_at)
    maintenance.finish(yard.operator, Maintenance.objects.get(pk=second.pk), now=END + HOUR)
    assert yard.states()[0] == "active"
    assert maintenance.covers([host.pk], NOW, END + DAY) == {host.pk: [(START, END + HOUR)]}


def test_only_what_it_took_comes_back_and_only_what_is_well(yard):
    by_hand, silent, shrank, good = yard.hosts
    drains.drain_host(by_hand, actor=yard.operator, now=NOW, reason="a fan")
    yard.announce(*yard.hosts)
    maintenance.clock(START)
    site_loop.run(yard.site.pk, now=START)
    assert yard.states() == ["maintenance"] * 4
    Host.objects.filter(pk=silent.pk).update(beat_at=START)
    Host.objects.filter(pk=shrank.pk).update(state="draining", state_reason="the inventory shrank under what runs here")
    Host.objects.filter(pk=good.pk).update(beat_at=END)
    maintenance.clock(END)
    assert yard.states() == ["maintenance", "lost", "draining", "active"]


def test_put_back_by_hand_it_stays_at_work_and_is_missed_no_more(yard):
    contract = yard.contract(gpus=32)
    yard.announce(yard.hosts[0])
    maintenance.clock(START)
    drains.undrain_host(yard.hosts[0], actor=yard.operator, now=START + HOUR)
    maintenance.put_back(yard.site.cell_id, now=START + HOUR)
    maintenance.clock(START + 2 * HOUR)
    assert yard.states()[0] == "active"
    assert missed(contract) == [(8, START, START + HOUR)]
    drains.drain_host(yard.hosts[0], actor=yard.operator, now=START + 2 * HOUR, reason="no")
    maintenance.clock(END)
    assert yard.states()[0] == "draining"


# --- changed, extended, over early, cancelled
def test_cancelled_while_it_empties_its_hosts(yard):
    contract = yard.contract(gpus=32)
    _, placement = yard.runs(contract, yard.hosts[0])
    row = yard.announce(yard.hosts[0])
    maintenance.clock(START - 15 * MINUTE)
    maintenance.cancel(yard.operator, row, now=START - 10 * MINUTE)
    assert yard.states() == ["active"] * 4
    assert told(contract)[-1][0] == "cancelled"
    assert missed(contract) == [(8, START - 15 * MINUTE, START - 10 * MINUTE)]
    yard.gone(placement, START - 5 * MINUTE)
    assert not maintenance.clock(START)
    assert yard.states() == ["active"] * 4
    assert availability.largest(yard.listing, now=NOW, starts_at=END + 30 * DAY, ends_at=END + 31 * DAY) == 32
    refused("illegal_transition", maintenance.cancel, yard.operator, row, now=START)


def test_moved_it_is_announced_anew_and_inside_its_window_it_is_not(yard):
    contract = yard.contract(gpus=32)
    row = yard.announce(yard.hosts[0])
    later = NOW + 5 * DAY
    shorter = {"starts_at": START + HOUR, "ends_at": END}
    row = maintenance.change(yard.operator, row, now=later, **shorter)
    assert (row.version, row.noticed_until, told(contract)[-1]) == (2, END, ("changed", 8, 8))
    refused(
        "notice_too_short",
        maintenance.change,
        yard.operator,
        row,
        now=later,
        starts_at=START + 2 * HOUR,
        ends_at=END + HOUR,
    )
    refused("conflict", maintenance.change, yard.operator, row, now=later, expected_version=1, text="Other fans.")
    row = maintenance.change(yard.operator, row, now=later, starts_at=START + 21 * DAY, ends_at=END + 21 * DAY)
    assert told(contract)[-1][0] == "cancelled"  # then its contract is over
    assert availability.largest(yard.listing, now=NOW, starts_at=row.starts_at, ends_at=row.ends_at) == 24


def test_an_extension_without_notice_owes_what_it_takes(yard):
    contract = yard.contract(gpus=32)
    row = yard.announce(yard.hosts[0])
    maintenance.clock(START)
    at = START + HOUR
    refused("notice_too_short", maintenance.extend, yard.operator, row, END + HOUR, now=at)
    row = maintenance.extend(yard.operator, row, END + HOUR, now=at, reason="A part is late.")
    assert (row.ends_at, row.noticed_until) == (END + HOUR, END)
    assert told(contract)[-1] == ("changed", 8, 8)
    assert Host.objects.get(pk=yard.hosts[0].pk).back_at == END + HOUR
    maintenance.clock(END)
    assert yard.states()[0] == "draining"
    Host.objects.update(beat_at=END + HOUR)
    maintenance.clock(END + HOUR)
    assert yard.states()[0] == "active"
    assert sum((end - start for _, start, end in missed(contract)), timedelta()) == END + HOUR - START
    assert maintenance.covers([yard.hosts[0].pk], NOW, END + DAY)[yard.hosts[0].pk] == [(START, END)]


def test_what_stands_in_goes_on_when_it_is_extended(yard):
    contract = yard.contract(gpus=8)
    (own,) = yard.on(contract)
    row = yard.announce(Host.objects.get(pk=own))
    maintenance.clock(START)
    maintenance.extend(yard.operator, row, END + HOUR, now=START + HOUR, reason="A part is late.")
    (stands,) = Reservation.objects.filter(maintenance=row, contract=contract)
    assert stands.ends_at == END + HOUR
    maintenance.finish(yard.operator, row, now=START + 2 * HOUR)
    stands.refresh_from_db()
    assert stands.state == "released"
    assert missed(contract) == []


def test_work_on_power_holds_the_node_to_its_watts(yard):
    row = yard.announce(scope="site", hosts=[], category="power", cap_w=200_000)
    call = Curtailment.objects.get(source="maintenance")
    assert (call.cap_w, call.starts_at, call.ends_at, call.node.parent) == (200_000, START, END, None)
    maintenance.cancel(yard.operator, row, now=NOW)
    call.refresh_from_db()
    assert call.state == "cancelled"
    refused("invalid_request", yard.draft, yard.hosts[0], category="power", cap_w=1)
    refused("invalid_request", yard.draft, scope="site", hosts=[], category="power", cap_w=1 << 40)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"scope": "domain", "hosts": [], "domain": "leaf-9"}, "/domain"),
        ({"scope": "site", "hosts": [], "domain": "leaf-1"}, "/domain"),
        ({"scope": "node", "hosts": []}, "/node"),
        ({"scope": "hosts", "hosts": []}, "/hosts"),
        ({"start": END, "end": START}, "/ends_at"),
        ({"start": NOW - HOUR}, "/starts_at"),
        ({"start": START + timedelta(seconds=1)}, "/starts_at"),
        ({"end": START + 32 * DAY}, "/ends_at"),
    ],
)
def test_what_is_wrong_with_a_draft_is_named(yard, fields, pointer):
    hosts = fields.get("hosts", yard.hosts[:1])
    error = refused("invalid_request", yard.draft, *hosts, **{k: v for k, v in fields.items() if k != "hosts"})
    assert pointer in error.fields


def test_a_node_means_all_under_it(yard):
    pdu = yard.site.power_nodes.get(name="pdu-2")
    Host.objects.filter(pk=yard.hosts[3].pk).update(power_node=pdu)
    row = yard.announce(scope="node", hosts=[], node=pdu)
    assert list(row.hosts.values_list("host_id", flat=True)) == [yard.hosts[3].pk]
    row = yard.announce(scope="node", hosts=[], node=yard.site.power_nodes.get(name="tx-1"), start=END, end=END + HOUR)
    assert row.hosts.count() == 4
    refused("forbidden", maintenance.cancel, factories.actor(factories.organization()), row, now=NOW)


# --- pure
def at(hour):
    return datetime(2027, 1, 1, tzinfo=UTC) + timedelta(hours=hour)


def test_a_shortfall_is_what_is_away_less_what_stands_in():
    own = [Block(1, 10, 8, at(0), at(20), stands_in=False), Block(1, 11, 8, at(0), at(20), stands_in=False)]
    away = {10: [Away(5, at(2), at(6))], 11: [Away(6, at(4), at(8))]}
    assert shortfalls(own, away) == [Piece(1, 5, 8, at(2), at(6)), Piece(1, 6, 8, at(4), at(8))]
    assert shortfalls([*own, Block(1, 12, 8, at(2), at(6), stands_in=True)], away) == [
        Piece(1, 5, 8, at(4), at(6)),
        Piece(1, 6, 8, at(6), at(8)),
    ]
    assert shortfalls(own[:1], {10: [Away(5, at(2), at(6)), Away(6, at(4), at(8))]}) == [
        Piece(1, 5, 8, at(2), at(6)),
        Piece(1, 6, 8, at(6), at(8)),
    ]


hours = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda t: (at(t[0]), at(t[0] + t[1])))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), hours, st.booleans()), max_size=8),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), hours), max_size=6),
)
@settings(max_examples=60)
def test_shortfalls_hour_by_hour(held, gone):
    blocks = [Block(c, h, n, a, b, stands_in=s) for c, h, n, (a, b), s in held]
    away = {}
    for host, number, (a, b) in gone:
        away.setdefault(host, []).append(Away(number, a, b))
    pieces = shortfalls(blocks, away)
    for hour in range(45):
        for contract in (1, 2, 3):
            here = [b for b in blocks if b.contract == contract and b.start <= at(hour) < b.end]
            lost = sum(b.gpus for b in here if any(a.start <= at(hour) < a.end for a in away.get(b.host, ())))
            want = max(0, lost - sum(b.gpus for b in here if b.stands_in))
            assert sum(p.gpus for p in pieces if p.contract == contract and p.start <= at(hour) < p.end) == want


@given(st.lists(hours, max_size=8))
@settings(max_examples=60)
def test_joined_windows_are_disjoint_and_the_same_instants(windows):
    out = joined(windows)
    assert all(a[1] < b[0] for a, b in pairwise(out))
    for hour in range(45):
        assert any(a <= at(hour) < b for a, b in out) == any(a <= at(hour) < b for a, b in windows)


def test_rows_are_taken_before_they_are_given_back(yard):
    yard.announce(yard.hosts[0])
    assert MaintenanceHost.objects.filter(taken_at=None, given_back_at=None).count() == 1
