"""The market's auditors of money: nothing to say of a sound world, red when a rule is broken on purpose."""

from datetime import timedelta
from random import Random

import pytest

from benchmarks.auditor import Auditor as Safety
from benchmarks.fault_site import Machine, Work
from billing import drafts, upfront
from billing import resales as money
from billing.core import rating
from marketplace.models import (
    Amendment,
    Contract,
    Curtailment,
    Fill,
    HeldLower,
    PlacementEvent,
    Resale,
    Shortfall,
    StandingBid,
)
from marketplace.services import contracts, listings, price_tiers
from marketplace.tenancy import Actor
from sandbox.market import books, eased
from sandbox.market.held import Held
from sandbox.market.priced import Priced
from sandbox.market.promises import Promises
from sandbox.market.resold import Resold
from sandbox.market.site import Facility
from tests import factories
from tests.billing.conftest import World, _stripe_process, after, make_world, stripe_api
from tests.billing.test_kinds import DAY, MONTH, collect, market, sign
from tests.billing.test_maintenance import HOUR
from tests.billing.test_resales import bought, buyer, resold
from tests.factories import NOW
from tests.marketplace.reselling import ASK, Desk
from tests.sandbox.auditing import contracts_seen, promises

pytestmark = pytest.mark.django_db(transaction=True)
__all__ = ["_stripe_process", "buyer", "market", "promises", "stripe_api"]

STAFF = Actor(kind="staff")


# --- prices
TIERS = price_tiers.completed([
    {"kind": "reserved", "min_term_hours": 168, "price": 1_900_000},
    {"kind": "reserved", "min_term_hours": 168, "upfront_permille": 500, "price": 1_700_000},
    {"kind": "flexible", "min_term_hours": 24, "flexible_hours_per_month": 60, "price": 1_400_000},
])  # fmt: skip


def reserve(market: World, *, pays: bool = True) -> Contract:
    """A contract at the second of the tiers, and what is due at signing paid."""
    offered = {"price_tiers": TIERS, "runtime": "kata"}
    contract = sign(market, "reserved", 2, start=MONTH, end=MONTH + 10 * DAY, upfront_max=500, **offered)
    if pays:
        collect(upfront.issue(contract.pk, now=after(60)))
    contract.refresh_from_db()
    return contract


def test_prices_by_term_and_share_are_sound_through_changes_and_more_gpus(market: World, promises: Promises):
    contract = reserve(market)
    assert (contract.price, contract.upfront_minor) == (1_700_000, 2 * 240 * 170 // 2)
    operator, buyer = factories.actor(market.operator), factories.actor(market.customer)
    dearer = [{**tier, "price": tier["price"] + 50_000} for tier in TIERS]
    for tiers in (dearer, [], dearer):
        listings.update(operator, market.listing, {"price_tiers": tiers}, now=after(HOUR))
    more = contracts.amendments.resize(buyer, contract, 3, now=after(2 * HOUR))
    contracts.accept_amendment(buyer, more, now=after(2 * HOUR))
    assert more.price == 1_950_000  # nothing more is due at signing
    flexible = sign(market, "flexible", 1, start=MONTH, end=MONTH + 2 * DAY, at=3 * HOUR)
    assert flexible.price == 1_600_000, "nobody said that it would bear more hours"
    auditor = Priced(promises)
    assert auditor.look() == auditor.books() == []
    assert promises.tally["price by term, share at signing and curtailment"]["kept"] == 2
    market.close(MONTH + 11 * DAY)
    assert Held(promises).look() == books._lines() == books._prepaid(last=True) == []


def test_a_price_that_is_not_the_cheapest_offered_is_found(market: World, promises: Promises, monkeypatch):
    plain = price_tiers.chosen
    monkeypatch.setattr(price_tiers, "chosen", lambda row, kind, _: plain(row, kind))
    sign(market, "reserved", 2, start=MONTH, end=MONTH + 10 * DAY, upfront_max=500, price_tiers=TIERS)
    (said,) = Priced(promises).look()
    assert "is reserved for 2000000, 0 permille" in said
    assert "asked [Offer(price=1700000, upfront=500" in said


def test_prices_of_another_version_are_found(market: World, promises: Promises):
    contract = reserve(market)
    later = listings.update(factories.actor(market.operator), market.listing, {"price_tiers": []}, now=after(HOUR))
    assert Priced(promises).look() == []
    Contract.objects.filter(pk=contract.pk).update(listing_version=later.version)
    assert any(f"version {later.version} of its offer asked" in said for said in Priced(promises).look())


@pytest.mark.parametrize("change", ["due", "unpaid", "unasked"])
def test_another_share_at_signing_is_found(market: World, promises: Promises, change):
    contract = reserve(market, pays=change != "unpaid")
    rows = Contract.objects.filter(pk=contract.pk)
    if change == "due":
        rows.update(upfront_minor=contract.upfront_minor - 1)
        assert any("500 permille of 81600 are 40800" in said for said in Priced(promises).look())
    elif change == "unpaid":
        rows.update(state="active")
    else:
        rows.update(upfront_minor=0)
    (said,) = Priced(promises).books()
    assert f"paid for it: {0 if change == 'unpaid' else 40800}" in said


def test_gpus_that_join_at_the_wrong_price_or_are_billed_at_it_are_found(market: World, promises: Promises):
    contract = reserve(market)
    buyer = factories.actor(market.customer)
    more = contracts.amendments.resize(buyer, contract, 3, now=after(2 * HOUR))
    contracts.accept_amendment(buyer, more, now=after(2 * HOUR))
    market.close(MONTH + 11 * DAY)
    assert Held(promises).look() == []
    type(more).objects.filter(pk=more.pk).update(price=1_700_000)
    assert any("its offer asked [1900000]" in said for said in Priced(promises).look())
    assert any("is billed its commitment at" in said for said in Held(promises).look())


def test_more_hours_of_curtailment_than_the_price_bears_are_found(market: World, promises: Promises):
    contract = sign(market, "flexible", 8, start=MONTH, end=MONTH + 10 * DAY, flexible_hours_per_month=6)
    placement = market.ran(MONTH, 6 * HOUR, gpus=8)
    auditor = Priced(promises)
    for day in range(2):
        site, begin = market.host.site, after(MONTH + day * DAY)
        call = Curtailment.objects.create(
            site=site, node=factories.a_node(site), reference=f"grid-{day}", cap_w=1, starts_at=begin,
            ends_at=begin + timedelta(hours=4), state="completed", ended_at=begin + timedelta(hours=3.5), created_by="grid",
        )  # fmt: skip
        PlacementEvent.objects.create(
            placement=placement,
            at=begin,
            from_state="running",
            to_state="draining",
            reason=f"curtailment {call.public_id}",
        )
        found = auditor.books()
        assert bool(found) == bool(day)
    assert contract.public_id in found[0]
    assert "bears 6 hours of curtailment a month; what it left for in December took 7:00:00" in found[0]


# --- resale
def test_a_sale_is_sound_and_its_seller_credited(market: World, buyer: World, promises: Promises):
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market))
    buyer.close(MONTH + 11 * DAY)
    market.close(MONTH + 11 * DAY)
    auditor = Resold(promises)
    assert auditor.look(after(MONTH)) == []
    assert auditor.books(last=True) == []
    assert books._prepaid(last=True) == books._lines() == books._ledger() == []
    assert Held(promises).look() == []
    assert promises.sold_on(after(MONTH))[market.contract.pk][0][2] == 2


def test_a_seller_who_is_not_credited_is_found(market: World, buyer: World, promises: Promises, monkeypatch):
    monkeypatch.setattr(money, "due", lambda _: {})
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market))
    buyer.close(MONTH + 11 * DAY)
    market.close(MONTH + 11 * DAY)
    (said,) = Resold(promises).books(last=True)
    assert "its seller was credited 0, his buyers' lines give him 13680" in said


def test_a_line_that_gives_its_seller_too_little_is_found(market: World, buyer: World, promises: Promises, monkeypatch):
    plain = money.share.split_resold
    monkeypatch.setattr(money.share, "split_resold", lambda minor, mine, his, fee, _: plain(minor, mine, his, fee, 200))
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market))
    buyer.close(MONTH + 11 * DAY)
    (said,) = Resold(promises).books(last=False)
    assert "gives 11520 to its seller, by the fee 13680" in said


def test_sold_hours_that_fall_due_no_longer_are_found(market: World, buyer: World, promises: Promises, monkeypatch):
    """A holder who left early and is let off what he had sold."""
    monkeypatch.setattr(
        rating.Commitment,
        "parts",
        lambda self: (rating.Added(self.milli_gpus, self.term, self.price),),
    )
    sign(market, "reserved", 4, start=MONTH, end=MONTH + 10 * DAY)
    bought(buyer, resold(market, start=8, end=10))
    from marketplace.services import contracts

    contracts.terminate(factories.actor(market.customer), market.contract, now=after(MONTH + DAY))
    buyer.close(MONTH + 11 * DAY)
    market.close(MONTH + 11 * DAY)
    assert any("committed" in said for said in Held(promises).look())


def test_a_window_that_is_sold_twice_is_found(promises: Promises):
    desk = Desk()
    resale = desk.offer()
    desk.buy(desk.buyer(), resale)
    auditor = Resold(promises)
    assert auditor.look(NOW) == []
    assert [said for said in Safety().audit(NOW) if "promised" in said] == []
    Resale.objects.filter(pk=resale.pk).update(sold_gpus=2)
    assert any("says 2 sold; its sales are of 4" in said for said in auditor.look(NOW))
    desk.contract.reservation.blocks.update(gpu_indices=list(range(8)))
    assert any("is promised to contracts" in said for said in Safety().audit(NOW))
    held = contracts_seen()
    assert any("offered or sold on" in said for said in promises._held(held, NOW))


def test_a_window_that_ends_early_is_found_unless_we_ended_its_buyer(promises: Promises):
    desk = Desk()
    ended, early = (desk.buy(desk.buyer(), desk.offer(gpus=1), 1) for _ in range(2))
    contracts.close_out(STAFF, ended.organization_id, now=ended.starts_at + timedelta(hours=1), reason="screening")
    assert Resold(promises).look(NOW + timedelta(days=9)) == []
    Contract.objects.filter(pk=early.pk).update(state="ended", ended_at=early.starts_at + timedelta(hours=1))
    assert any("its buyer's contract ended" in said for said in Resold(promises).look(NOW + timedelta(days=9)))


def test_a_bid_that_pays_more_than_its_limit_and_one_nobody_looks_at_are_found(promises: Promises):
    from tests.races.test_bids import bid, look

    desk = Desk()
    row = bid(desk, desk.buyer(), ASK, auto_accept=True)
    desk.offer(gpus=1)
    assert look(desk).bought == 1
    assert Resold(promises).look(NOW) == []
    fill, late = Fill.objects.get(bid=row), timedelta(seconds=14)
    Fill.objects.filter(pk=fill.pk).update(starts_at=fill.starts_at + late, at=fill.starts_at + late)
    assert not [said for said in Resold(promises).look(NOW) if "its bid" in said], "who signs late begins late"
    Fill.objects.filter(pk=fill.pk).update(ends_at=fill.ends_at + late)
    assert any("another window than its bid was quoted" in said for said in Resold(promises).look(NOW))
    StandingBid.objects.filter(pk=row.pk).update(limit_price=ASK - 1, duration_s=1)
    found = Resold(promises).look(NOW)
    assert all(any(words in said for said in found) for words in ("over its bid's limit", "outside its bid's window"))
    bid(desk, desk.buyer(), ASK)
    desk.offer(gpus=1)
    assert any("suit each other" in said for said in Resold(promises).look(NOW + timedelta(hours=6)))


# --- GPUs held lower
def lowered(world: World, begin: float, seconds: float | None, gpu_w: int) -> Curtailment:
    """A call that holds the world's host to so many of 700 W a GPU; `seconds` None: it stands."""
    site, begins = world.host.site, after(begin)
    call = Curtailment.objects.create(
        site=site, node=factories.a_node(site), reference=f"deep-{begin}", cap_w=1, starts_at=begins,
        ends_at=begins + timedelta(days=1), state="active", created_by="grid",
    )  # fmt: skip
    over = None if seconds is None else after(begin + seconds)
    HeldLower.objects.create(curtailment=call, host=world.host, gpu_w=gpu_w, full_w=700, starts_at=begins, ends_at=over)
    return call


def eased_world() -> World:
    """Over the end of a month: a third of a GPU by use, and 4 of a commitment, one of which joined for more and one of which is away."""
    world = make_world(price=2_490_000)
    held = factories.contract(
        world.listing, world.customer, kind="reserved", gpu_count=4, starts_at=after(MONTH - DAY), ends_at=after(MONTH + DAY),
        price=1_990_000, overage_price=2_990_000,
    )  # fmt: skip
    Amendment.objects.create(
        contract=held, kind="resize", state="accepted", added_gpus=1, price=2_110_000, effective_at=after(MONTH - HOUR),
        created_at=NOW, answer_by=NOW,
    )  # fmt: skip
    Shortfall.objects.create(
        contract=held, host=world.host, gpus=1, starts_at=after(MONTH - 600), ends_at=after(MONTH + 600)
    )
    world.ran(MONTH - HOUR, 2 * HOUR, gpu_milli=333)
    world.ran(MONTH - HOUR, 2 * HOUR, gpus=5, contract=held)
    lowered(world, MONTH - 1_201.5, 1_000, 500)
    lowered(world, MONTH - 100, 1_300.25, 300)
    lowered(world, MONTH + HOUR - 7, None, 600)
    for at in (MONTH - 900, MONTH, MONTH + 300, MONTH + 2 * HOUR):
        world.close(at)
    return world


def test_what_gpus_held_lower_gave_is_credited_to_the_second_and_to_the_cent(promises: Promises):
    world = eased_world()
    auditor = eased.HeldLower(promises)
    assert auditor.books() == books._lines() == Held(promises).look() == []
    assert promises.tally[eased.CREDITED]["kept"] == world.customer.invoices.filter(lines__kind="held_lower").count()
    by_use = {key: n for key, n in auditor._due().items() if key[0] == world.contract.pk}
    # 333 milli-GPUs: at 500 of 700 W 286 thousandths, at 300 W 572, at 600 W 143, each rounded up
    first, second = (1_000 * 96 + 100 * 191, 1_200 * 191 + 7 * 48)
    assert [n for _, n in sorted(by_use.items())] == [first, second]


@pytest.mark.parametrize("fails", ["missing", "too little", "of one month", "the cheapest", "twice"])
def test_credits_for_gpus_held_lower_that_are_wrong_are_found(promises: Promises, monkeypatch, fails):
    plain, by_price, dear = drafts.held_lower.spells, rating.withheld, rating.withheld_by_price
    if fails == "missing":
        monkeypatch.setattr(drafts.held_lower, "spells", lambda *_, **__: {})
    elif fails == "too little":
        monkeypatch.setattr(rating, "withheld", lambda milli, gpu_w, full_w: by_price(milli, gpu_w + 1, full_w))
    elif fails == "of one month":  # nothing of what began before the month that is closed
        later = int(after(MONTH).timestamp())
        monkeypatch.setattr(
            drafts.held_lower, "spells",
            lambda *a, **k: {c: [s for s in mine if s.span.start >= later] for c, mine in plain(*a, **k).items()},
        )  # fmt: skip
    elif fails == "the cheapest":
        monkeypatch.setattr(
            rating, "withheld_by_price",
            lambda c, w: {min((p.price for p in c.parts()), key=lambda p: p.millionths): sum(dear(c, w).values())},
        )  # fmt: skip
    else:
        monkeypatch.setattr(drafts.held_lower, "spells", lambda *a, **k: {c: m * 2 for c, m in plain(*a, **k).items()})
    world = eased_world()
    found = eased.HeldLower(promises).books()
    wrong = {c.pk for c in Contract.objects.all() if any(c.public_id in said for said in found)}
    mine = {world.contract.pk}
    assert wrong == set(
        Contract.objects.exclude(pk__in=mine if fails == "the cheapest" else ()).values_list("pk", flat=True)
    )
    assert any("no line says so" in said for said in found) == (fails in {"missing", "of one month", "the cheapest"})


def test_work_on_less_power_that_no_row_speaks_of_is_found(promises: Promises):
    world = make_world()
    machine = Machine(
        world.host.name, "pdu-1", 8, 81_920, 4_600, 1_100, 200, 700, cap_control=True, limits=[500] * 4 + [200] * 4,
        state="capped",
    )  # fmt: skip
    work = Work(7, machine.name, (0, 1, 2, 3), 1000, 81_920, 60, state="running")
    site = Facility(world.host.site_id, 1, Random(1), {machine.name: machine}, {}, {}, NOW, work={7: work})
    auditor = eased.HeldLower(promises)
    (said,) = auditor.look([site])
    assert "at 500 of 700 W a GPU" in said
    lowered(world, 0, None, 500)
    assert auditor.look([site]) == []
