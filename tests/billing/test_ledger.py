from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from billing import ledger, reconcile
from billing.ledger import Booking, Entry
from billing.models import LedgerBalance, LedgerTransaction, Posting
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def booking(key="k", amounts=(100, -100), currency="USD", codes=("receivable", "revenue", "platform_fee")):
    entries = tuple(Entry(code, None, currency, amount) for code, amount in zip(codes, amounts, strict=False))
    return Booking(key, "test", "ivc_1", NOW, entries)


def check_now() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")


def refused(match: str):
    return pytest.raises(IntegrityError, match=match)


def test_a_booking_is_made_once_and_balances():
    customer = factories.organization()
    entries = (Entry("receivable", customer.pk, "USD", 250), Entry("platform_fee", None, "USD", -250))
    assert ledger.book(Booking("one", "invoice", "ivc_1", NOW, entries))
    assert not ledger.book(Booking("one", "invoice", "ivc_1", NOW, entries))
    check_now()
    assert ledger.balance("receivable", "USD", customer.pk) == 250
    assert ledger.balance("platform_fee", "USD") == -250
    assert ledger.trial_balance() == {"USD": 0}
    assert LedgerTransaction.objects.get().posting_count == 2


def test_entries_of_one_account_are_summed_and_nothing_is_booked_for_nothing():
    entries = (Entry("revenue", None, "USD", 5), Entry("revenue", None, "USD", -5))
    assert not ledger.book(Booking("zero", "t", "", NOW, entries))
    assert ledger.book(booking(amounts=(100, -60, -40), codes=("receivable", "revenue", "revenue")))
    check_now()
    assert Posting.objects.count() == 2


@pytest.mark.parametrize("amounts", [(100, -99), (100,), (5, 5)])
def test_what_does_not_balance_is_refused(amounts):
    with refused("does not sum to zero|declares"), transaction.atomic():
        ledger.book(booking(amounts=amounts))
        check_now()


def test_each_currency_balances_by_itself():
    entries = (Entry("receivable", None, "USD", 100), Entry("revenue", None, "EUR", -100))
    with refused("does not sum to zero"), transaction.atomic():
        ledger.book(Booking("fx", "t", "", NOW, entries))
        check_now()


def test_a_header_without_postings_is_refused():
    with refused("declares 2 postings and has 0"), transaction.atomic():
        LedgerTransaction.objects.create(key="empty", kind="t", posting_count=2, at=NOW)
        check_now()


def test_late_postings_changes_and_deletions_are_refused():
    ledger.book(booking())
    check_now()
    header, posting = LedgerTransaction.objects.get(), Posting.objects.first()
    with refused("is complete"), transaction.atomic():
        Posting.objects.bulk_create(
            [
                Posting(transaction=header, account_id=posting.account_id, amount_minor=7),
                Posting(transaction=header, account_id=posting.account_id, amount_minor=-7),
            ]
        )
    for statement in (
        "UPDATE billing_posting SET amount_minor = 1",
        "DELETE FROM billing_posting",
        "UPDATE billing_ledgertransaction SET posting_count = 9",
        "UPDATE billing_ledgeraccount SET currency = 'EUR'",
    ):
        with refused("append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(statement)


def test_many_bookings_in_one_statement_with_some_known():
    ledger.book(booking("k3"))
    assert ledger.book_many([booking(f"k{i}") for i in range(10)]) == 9
    check_now()
    assert ledger.balance("receivable", "USD") == 1000


def test_projections_are_rebuilt_compared_and_never_overwritten_when_wrong():
    ledger.book(booking("a"))
    through = LedgerTransaction.objects.get().created_at + timedelta(microseconds=1)
    assert ledger.project(through) == []
    assert LedgerBalance.objects.count() == 2
    assert ledger.balance("receivable", "USD") == 100
    LedgerBalance.objects.filter(balance_minor=100).update(balance_minor=90)
    (sentence,) = ledger.project(through + timedelta(hours=1))
    assert "projected 90" in sentence
    assert "say 100" in sentence
    assert LedgerBalance.objects.filter(balance_minor=90).exists()


def test_projections_are_cut_by_the_clock_that_stamps_the_transactions():
    """Ours may be hours ahead of the database's: what is booked after a look must not count as gone before it."""
    ahead = timezone.now() + timedelta(days=400)
    ledger.book(booking("a"))
    assert reconcile.check_ledger(ahead) == 0
    ledger.book(booking("b"))
    assert reconcile.check_ledger(ahead + timedelta(hours=1)) == 0
    assert ledger.balance("receivable", "USD") == 200
