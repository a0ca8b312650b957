"""Maintenance as it is announced and changed: who is told, what it means, what may still be sold."""

from datetime import timedelta

import pytest

from marketplace.models import (
    AuditEvent,
    Curtailment,
    Host,
    MaintenanceNotice,
    OutboxMessage,
    Reservation,
)
from marketplace.services import availability, contracts, maintenance, quotes, search
from marketplace.services.forward import resales, sales
from scheduler import site_loop
from tests import factories
from tests.factories import NOW
from tests.marketplace.trade import accept, ask, refused
from tests.marketplace.works import DAY, END, HOUR, MINUTE, START, TERM, Yard, missed, told

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    return Yard()


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


def test_hours_on_offer_are_their_holders_until_somebody_takes_them(yard):
    """Before the announcement they are offered: their holder is told a week ahead, as he may have them again, and then others stand in."""
    contract = yard.contract(gpus=8)
    holder = factories.actor(yard.customer)
    made = resales.offer(holder, contract, resales.Asked(8, START - HOUR, END + HOUR, 1_500_000), now=NOW)
    (host,) = (h for h in yard.hosts if h.pk in yard.on(contract))
    soon = {"start": NOW + 3 * DAY, "end": NOW + 3 * DAY + HOUR}
    refused("notice_too_short", maintenance.announce, yard.operator, yard.draft(host, **soon), now=NOW)
    row = yard.announce(host)
    assert told(contract) == [("announced", 8, 8)]
    assert not row.reservations.filter(contract=contract).exists()  # nobody misses them
    resales.withdraw(holder, made, now=NOW + 4 * DAY)
    stands_in = row.reservations.get(contract=contract)
    assert (stands_in.starts_at, stands_in.ends_at) == (row.away_at, END)
    assert told(contract) == [("announced", 8, 8)]  # once


def test_a_sale_that_is_undone_comes_back_with_the_work_its_buyer_knew_of(yard):
    contract = yard.contract(gpus=8)
    seller, buyer = factories.actor(yard.customer), factories.actor(factories.organization())
    made = resales.offer(seller, contract, resales.Asked(8, START - HOUR, END + HOUR, 1_500_000), now=NOW)
    quote = quotes.quote(buyer, made.listing_id, quotes.Request("reserved", 8), now=NOW)
    bought = contracts.accept(buyer, quote.pk, now=NOW)
    (host,) = (h for h in yard.hosts if h.pk in yard.on(contract))
    row = yard.announce(host)
    assert (told(contract), told(bought)) == ([], [("announced", 8, 0)])
    contracts.clock(bought.pay_by)
    assert sales.undo(bought.pk, now=bought.pay_by)
    assert told(contract) == [("announced", 8, 8)]  # at once, though it is on offer again
    resales.withdraw(seller, made, now=bought.pay_by)
    assert row.reservations.filter(contract=contract, state="firm").exists()  # what stands in


def test_hours_that_nobody_took_are_missed_where_work_has_begun(yard):
    contract, *_ = [yard.contract(gpus=8) for _ in range(4)]  # no room beside
    holder = factories.actor(yard.customer)
    made = resales.offer(holder, contract, resales.Asked(8, START + 2 * HOUR, END + HOUR, 1_500_000), now=NOW)
    row = yard.announce(*(h for h in yard.hosts if h.pk in yard.on(contract)))
    for at in (row.away_at, START):
        maintenance.clock(at)
    assert missed(contract) == [(8, row.away_at, made.reservation.claims_at)]
    assert START < made.expires_at < made.starts_at
    resales.expire(made.expires_at)
    assert sum(((end - start) * gpus for gpus, start, end in missed(contract)), timedelta()) == 8 * (END - row.away_at)


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
