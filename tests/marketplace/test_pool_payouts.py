"""What a pool says that it paid, over a real socket: a receipt once, zero and other figures refused, trouble told; nobody else's."""

from datetime import UTC, datetime, timedelta

import pytest
from django.core import mail
from django.db import IntegrityError, connection, transaction

from marketplace.errors import MarketError
from marketplace.models import AuditEvent, OutboxMessage, PoolFeed, Receipt
from marketplace.services import feeds, outbound, pool_payouts, profit, receipts
from sandbox.feeds import Feeds
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
URL = "/api/v1/pool-feeds"


@pytest.fixture
def pool():
    """It says what was true at its `now`."""

    def clock():
        return made.now.timestamp()

    made = Feeds(clock=clock, bearer="s3cret")
    made.now = NOW
    with made.httpd.beside():
        yield made


@pytest.fixture
def site():
    return f.site()


def add(site, pool, **more):
    values = {"name": "sandbox pool", "url": f"{pool.httpd.url}/pool/payouts?phs=2", "secret": "s3cret", **more}
    return pool_payouts.add(f.actor(site.organization), site, now=NOW, **values)


def look(row, at):
    taken = pool_payouts.ask(row.pk, now=at)
    row.refresh_from_db()
    return taken


def test_the_clock_writes_a_message_for_each_feed_that_is_due(site, pool):
    row, other = add(site, pool), add(site, pool, name="other pool")
    add(site, pool, name="switched off", enabled=False)
    assert pool_payouts.tick(NOW) == pool_payouts.tick(NOW) == 2
    asked = OutboxMessage.objects.filter(topic=pool_payouts.ASK)
    assert sorted(asked.values_list("key", flat=True)) == sorted([str(row.pk), str(other.pk)])
    look(row, NOW)
    assert pool_payouts.tick(NOW + timedelta(minutes=1)) == 1
    pool_payouts.remove(f.actor(site.organization), row, now=NOW)
    assert pool_payouts.ask(row.pk, now=NOW + DAY) == 0, "gone since"


def test_payouts_become_receipts_once_and_the_hours_are_told(site, pool):
    row = add(site, pool)
    assert look(row, NOW) == 32
    assert (row.error, row.heard_at, row.paid_until) == ("", NOW, NOW.replace(hour=0))
    newest = Receipt.objects.order_by("-end").first()
    assert (newest.source, newest.reference, newest.kind) == ("sandbox pool", "20261101", "hashing")
    assert newest.end - newest.start == DAY
    worth = newest.amount_sat * pool.market.price(newest.end.timestamp()) / 100  # of a satoshi, millionths
    assert newest.amount_microusd == pytest.approx(worth, abs=5_000)
    assert OutboxMessage.objects.filter(topic=profit.TOPIC).count() == 32
    assert look(row, NOW + timedelta(minutes=59)) == 0, "it is not due"
    assert row.asked_at == NOW
    assert look(row, NOW + HOUR) == 0
    pool.now = NOW + DAY
    assert look(row, NOW + DAY) == 1
    assert Receipt.objects.count() == 33
    assert not AuditEvent.objects.filter(verb="receipt.received").exclude(actor=f"pool feed {row.public_id}").exists()


def test_the_pools_own_file_of_a_day_is_the_same_receipt(site, pool):
    """What was typed in before the feed came is known to it by the pool's name and number."""
    day = pool.market.payouts((NOW - DAY).timestamp(), NOW.timestamp(), 2)[-1]
    start, end = (datetime.fromisoformat(day[name]) for name in ("start", "end"))
    receipts.receive(
        site, actor=f.actor(site.organization), now=NOW, kind="hashing", source="sandbox pool", reference=day["id"], start=start,
        end=end, amount_sat=day["sat"], amount_microusd=round(float(day["usd"]) * 1_000_000),
    )  # fmt: skip
    assert look(add(site, pool), NOW) == 31
    assert Receipt.objects.filter(reference=day["id"]).count() == 1


def test_zero_and_other_figures_are_refused_and_told_once(site, pool):
    row = add(site, pool)
    f.member(site.organization, role="owner")
    pool.set_fault("zero")
    assert look(row, NOW) == 0
    assert "pays 0 sat" in row.error
    assert row.heard_at is None
    pool.set_fault("")
    assert look(row, NOW + HOUR) == 32
    assert (row.error, row.told_at) == ("", None)
    pool.set_fault("restated")
    for n in (2, 3):
        assert look(row, NOW + n * HOUR) == 0
        assert "another amount_sat than on record (rcp_" in row.error
    assert Receipt.objects.count() == 32, "what is on record stays"
    told = OutboxMessage.objects.filter(topic=pool_payouts.TROUBLE)
    assert told.count() == 2, "once of the zero, once of the other figures"
    pool_payouts.tell_operator(row.pk)
    assert "on record" in mail.outbox[0].body
    letter = pool_payouts.letter(row, NOW + 3 * HOUR)
    assert letter.subject == f"sandbox pool at {site.name}: a payout was refused"


def test_silence_changes_nothing_and_is_told_when_it_is_overdue(site, pool):
    row = add(site, pool, stale_after_s=86_400)
    look(row, NOW)
    pool.set_fault("down")
    assert look(row, NOW + 2 * HOUR) == 0
    assert row.error == "no answer that can be understood: HTTP 503"
    assert not OutboxMessage.objects.filter(topic=pool_payouts.TROUBLE).exists(), "the next poll may be answered"
    assert (row.heard_at, Receipt.objects.count()) == (NOW, 32)
    pool.set_fault("stale")  # it answers, and has nothing newer
    look(row, NOW + 13 * HOUR)
    assert pool_payouts.overdue(row, NOW + 13 * HOUR)
    assert OutboxMessage.objects.filter(topic=pool_payouts.TROUBLE).count() == 1
    assert "overdue" in pool_payouts.letter(row, NOW + 13 * HOUR).subject
    pool.set_fault("")
    pool.now = NOW + DAY
    assert look(row, NOW + DAY) == 1
    assert (row.error, row.told_at) == ("", None)


def test_a_wrong_token_is_told_and_never_shown(site, pool):
    row = add(site, pool, secret="other")
    assert look(row, NOW) == 0
    assert row.error.endswith("HTTP 401")
    assert b"other" not in bytes(row.secret)
    assert "other" not in str(list(AuditEvent.objects.values_list("after", flat=True)))


GOOD = {"id": "7", "start": "2026-11-01T00:00:00Z", "end": "2026-11-02T00:00:00Z", "sat": 1000}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sat": 0}, "pays 0 sat"), ({"sat": -5}, "pays -5 sat"), ({"sat": "5"}, "sat '5'"), ({"sat": True}, "True"),
        ({"usd": 0.1}, "text"),
        ({"usd": "0"}, "pays 1000 sat, 0 USD"), ({"usd": "nan"}, "nan"), ({"id": ""}, "without an id"), ({"id": "x" * 81}, "80 characters"),
        ({"start": "2026-11-01T00:00:00"}, "offset"), ({"end": "soon"}, "soon"), ({"sat": 22 * 10**14}, "pays 22"),
    ],
)  # fmt: skip
def test_a_payout_that_makes_no_sense_is_named(change, why):
    with pytest.raises(pool_payouts.RefusedPayoutError, match=why):
        pool_payouts.read(GOOD | change)
    with pytest.raises(pool_payouts.RefusedPayoutError):
        pool_payouts.read([GOOD])


def test_without_dollars_it_is_worth_what_bitcoin_was_at_its_end(site, pool, monkeypatch):
    row = add(site, pool)
    said = [GOOD, GOOD | {"id": "8", "end": "2026-11-03T00:00:00Z"}]
    monkeypatch.setattr(pool_payouts, "_ask", lambda *_: said)
    assert look(row, NOW) == 0
    assert "payout 7: names no usd, and no price" in row.error
    assert "payout 8: names no usd" in row.error
    at = datetime(2026, 11, 1, 23, 40, tzinfo=UTC)
    feeds.store("btc_usd_cents", 10_000_000, source="x", observed_at=at, now=at)
    assert look(row, NOW + HOUR) == 1, "the other one is for a time that is not over"
    assert Receipt.objects.get().amount_microusd == 1_000_000
    feeds.store("btc_usd_cents", 20_000_000, source="x", observed_at=at + timedelta(minutes=9), now=at)
    assert look(row, NOW + 2 * HOUR) == 0
    assert "payout 7" not in row.error, "worked out once"


def test_a_receipt_is_never_changed_nor_deleted_by_whatever_sql(site, pool):
    look(add(site, pool), NOW)
    for sql in (
        "UPDATE marketplace_receipt SET amount_microusd = 0",
        "UPDATE marketplace_receipt SET reference = reference",
        "DELETE FROM marketplace_receipt",
    ):
        with pytest.raises(IntegrityError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(sql)
    assert Receipt.objects.exclude(amount_microusd=0).count() == 32


def test_feeds_are_kept_with_their_rules_and_their_name(site, pool, settings):
    row = add(site, pool)
    actor = f.actor(site.organization)
    for wrong, field in (
        ({"poll_s": 5}, "/poll_s"), ({"stale_after_s": 60}, "/stale_after_s"), ({"url": "ftp://x"}, "/url"), ({"name": "y"}, "/name"),
    ):  # fmt: skip
        with pytest.raises(MarketError) as refused:
            pool_payouts.update(actor, row, now=NOW, **wrong)
        assert field in refused.value.fields
    with pytest.raises(MarketError) as refused:
        add(site, pool)
    assert refused.value.code == "conflict"
    settings.GRID_PRIVATE_HOSTS = False
    assert "https" in outbound.refused(row.url)
    look(row, NOW + DAY)
    assert "private network" in row.error
    pool_payouts.remove(actor, row, now=NOW)
    assert not PoolFeed.objects.exists()


def test_by_api_and_nobody_elses(site, pool):
    api, stranger = f.client(site.organization, role="owner"), f.client(f.organization(is_operator=True), role="owner")
    body = {"site": site.public_id, "name": "a pool", "url": f"{pool.httpd.url}/pool/payouts", "secret": "s3cret"}
    made = api.post(URL, body, format="json")
    assert made.status_code == 201, made.content
    said = made.json()
    assert (said["object"], said["has_secret"], said["overdue"], said["error"]) == ("pool_feed", True, False, "")
    assert "s3cret" not in made.content.decode()
    at = f"{URL}/{said['id']}"
    assert api.patch(at, {"poll_s": 600}, format="json").json()["poll_s"] == 600
    assert api.patch(at, {"poll_s": 5}, format="json").status_code == 400
    assert stranger.get(at).status_code == stranger.delete(at).status_code == 404
    assert stranger.get(URL).json()["data"] == []
    assert stranger.post(URL, body, format="json").status_code == 404
    assert api.delete(at).status_code == 204
