"""Balanced ledger transactions a second in batches of 500, and one transaction of 20,000 postings; beside bare inserts.

The peer writes the same rows into tables without keys to check, triggers or constraints: what the guards cost.
"""

from __future__ import annotations

import time

from benchmarks import books
from benchmarks.harness import Options, Report, require

BATCH = 500
LEGS = 20_000


def run(options: Options) -> Report:
    batches = 12 if options.quick else 120
    with books.database():
        from django.db import connection, transaction
        from django.utils import timezone

        from billing import ledger
        from billing.ledger import Booking, Code, Entry
        from billing.models import LedgerTransaction, Posting
        from tests import factories

        one = factories.organization()
        organizations = books.clone("marketplace_organization", one.pk, LEGS - 1, name="'Customer ' || g")
        now = timezone.now()

        def sale(key: str, customer: int, operator: int) -> Booking:
            entries = (
                Entry(Code.RECEIVABLE, customer, "USD", 1000),
                Entry(Code.OPERATOR_ACCRUED, operator, "USD", -850),
                Entry(Code.PLATFORM_FEE, None, "USD", -150),
            )
            return Booking(key, "invoice", "", now, entries)

        work = [
            [
                sale(f"{batch}-{i}", organizations[(batch * BATCH + i) % 2000], organizations[-1 - i % 20])
                for i in range(BATCH)
            ]
            for batch in range(batches)
        ]
        start = time.perf_counter()
        for bookings in work:
            ledger.book_many(bookings)
        ours = time.perf_counter() - start
        require(LedgerTransaction.objects.count() == batches * BATCH, "not every transaction was booked")
        require(Posting.objects.count() == 3 * batches * BATCH, "not every posting was booked")

        def wide(key: str) -> Booking:
            legs = [Entry(Code.OPERATOR_PAYABLE, pk, "USD", -1) for pk in organizations]
            return Booking(key, "payout", "", now, (*legs, Entry(Code.STRIPE_CLEARING, None, "USD", LEGS - 1)))

        ledger.book(wide("accounts are opened"))
        start = time.perf_counter()
        ledger.book(wide("timed"))
        single = time.perf_counter() - start
        require(Posting.objects.filter(transaction__key="timed").count() == LEGS, "the wide transaction is not there")
        require(not any(ledger.trial_balance().values()), "the ledger does not sum to zero")

        with connection.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE bare_header (id bigserial, key text, kind text, subject text, n int, at timestamptz)"
            )
            cursor.execute("CREATE TABLE bare_posting (id bigserial, header bigint, account bigint, amount bigint)")
            start = time.perf_counter()
            for bookings in work:
                with transaction.atomic():
                    cursor.execute(
                        "INSERT INTO bare_header (key, kind, subject, n, at) SELECT k, 'invoice', '', 3, now()"
                        " FROM unnest(%s::text[]) k RETURNING id",
                        [[booking.key for booking in bookings]],
                    )
                    headers = [pk for (pk,) in cursor.fetchall() for _ in range(3)]
                    cursor.execute(
                        "INSERT INTO bare_posting (header, account, amount)"
                        " SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[])",
                        [headers, [entry.organization_id or 0 for b in bookings for entry in b.entries],
                         [entry.amount for b in bookings for entry in b.entries]],
                    )  # fmt: skip
            theirs = time.perf_counter() - start
    count = batches * BATCH
    return Report(
        "ledger",
        {"transactions_per_s": count / ours, "postings_20k_s": single},
        peer={"bare_inserts_per_s": count / theirs, "share_of_bare": theirs / ours},
        conditions={"transactions": count, "postings_each": 3, "batch": BATCH, "fsync": True},
        must={"transactions_per_s": (">=", 5000), "postings_20k_s": ("<=", 1)},
    )
