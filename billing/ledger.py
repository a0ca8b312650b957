"""The books: balanced, append-only transactions. The only writer of postings.

A posting is debit-positive minor units on an account of one currency. PostgreSQL checks at commit that a transaction has
the declared number of postings and sums to zero in each currency (migration 0002).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db import connection, transaction
from django.db.models import Q, Sum

from billing.models import LedgerAccount, LedgerBalance, LedgerTransaction, Posting

Code = LedgerAccount.Code


@dataclass(frozen=True, slots=True)
class Entry:
    """`amount` minor units to the account (code, organization, currency); debit is positive."""

    code: str
    organization_id: int | None
    currency: str
    amount: int


@dataclass(frozen=True, slots=True)
class Booking:
    """A transaction to book, once per `key`. Entries of one account are summed; zero ones are left out."""

    key: str
    kind: str
    subject: str
    at: datetime
    entries: tuple[Entry, ...]

    def postings(self) -> dict[tuple[str, int | None, str], int]:
        totals: dict[tuple[str, int | None, str], int] = {}
        for entry in self.entries:
            account = (entry.code, entry.organization_id, entry.currency)
            totals[account] = totals.get(account, 0) + entry.amount
        return {account: amount for account, amount in totals.items() if amount}


def book(booking: Booking) -> bool:
    """Book one transaction; False where its key is booked already. See `book_many`."""
    return book_many([booking]) == 1


def book_many(bookings: Sequence[Booking]) -> int:
    """Book transactions in the running database transaction; returns how many were new.

    A key that was booked before is skipped, so that a retry doubles nothing. A booking whose entries cancel out is
    skipped too. Raises IntegrityError at commit where one does not sum to zero.
    """
    wanted = {booking.key: booking for booking in bookings}
    postings = {key: legs for key, booking in wanted.items() if (legs := booking.postings())}
    if not postings:
        return 0
    with transaction.atomic(), connection.cursor() as cursor:
        accounts = _accounts({account for legs in postings.values() for account in legs})
        cursor.execute(
            "INSERT INTO billing_ledgertransaction (key, kind, subject, posting_count, at)"
            " SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[])"
            " ON CONFLICT (key) DO NOTHING RETURNING id, key",
            [
                list(postings),
                [wanted[key].kind for key in postings],
                [wanted[key].subject for key in postings],
                [len(legs) for legs in postings.values()],
                [wanted[key].at for key in postings],
            ],
        )
        fresh = cursor.fetchall()
        headers: list[int] = []
        owners: list[int] = []
        amounts: list[int] = []
        for header, key in fresh:
            for account, amount in postings[key].items():
                headers.append(header)
                owners.append(accounts[account])
                amounts.append(amount)
        cursor.execute(
            "INSERT INTO billing_posting (transaction_id, account_id, amount_minor)"
            " SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[])",
            [headers, owners, amounts],
        )
    return len(fresh)


def _accounts(wanted: Iterable[tuple[str, int | None, str]]) -> dict[tuple[str, int | None, str], int]:
    """Ids of the accounts, opened where they do not exist yet."""
    rows = sorted(wanted, key=lambda row: (row[0], row[1] or 0, row[2]))
    columns: tuple[list[str], list[int | None], list[str]] = (
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
    )
    # Two joins by equality: one by IS NOT DISTINCT FROM cannot use an index or a hash, and grows with the square.
    query = (
        "WITH w AS (SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[]) AS w(code, organization_id, currency))"
        " SELECT a.id, a.code, a.organization_id, a.currency FROM w JOIN billing_ledgeraccount a"
        " USING (code, organization_id, currency) UNION ALL"
        " SELECT a.id, a.code, a.organization_id, a.currency FROM w JOIN billing_ledgeraccount a"
        " USING (code, currency) WHERE w.organization_id IS NULL AND a.organization_id IS NULL"
    )
    with connection.cursor() as cursor:
        cursor.execute(query, columns)
        found = {(code, owner, currency): pk for pk, code, owner, currency in cursor.fetchall()}
        if len(found) < len(rows):
            cursor.execute(
                "INSERT INTO billing_ledgeraccount (code, organization_id, currency)"
                " SELECT * FROM unnest(%s::text[], %s::bigint[], %s::text[]) ON CONFLICT DO NOTHING",
                columns,
            )
            cursor.execute(query, columns)
            found = {(code, owner, currency): pk for pk, code, owner, currency in cursor.fetchall()}
    return found


def balance(code: str, currency: str, organization_id: int | None = None) -> int:
    """The account's balance in minor units, debit positive: the projection plus what was posted since."""
    whose = Q(organization_id=organization_id) if organization_id is not None else Q(organization=None)
    account = LedgerAccount.objects.filter(whose, code=code, currency=currency).first()
    if account is None:
        return 0
    projection = LedgerBalance.objects.filter(account=account).first()
    postings = Posting.objects.filter(account=account)
    if projection is not None:
        postings = postings.filter(transaction__created_at__gte=projection.through)
    fresh: int = postings.aggregate(total=Sum("amount_minor"))["total"] or 0
    return fresh + (projection.balance_minor if projection is not None else 0)


def trial_balance() -> dict[str, int]:
    """The sum of all postings per currency; every value is 0, or the books are broken."""
    rows = Posting.objects.values("account__currency").annotate(total=Sum("amount_minor"))
    return {row["account__currency"]: row["total"] for row in rows}


def totals(currency: str) -> dict[str, int]:
    """Balance per account code over all organizations, in minor units of `currency`, debit positive."""
    rows = (
        Posting.objects.filter(account__currency=currency).values("account__code").annotate(total=Sum("amount_minor"))
    )
    return {row["account__code"]: row["total"] for row in rows}


def clock() -> datetime:
    """What the database's clock says, which stamps transactions: `project` is cut by it, whatever ours says."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT now()")
        row = cursor.fetchone()
    assert row is not None
    at: datetime = row[0]
    return at


def project(through: datetime) -> list[str]:
    """Rebuild every balance through `through` (by `clock`) and compare; returns one sentence per account that disagreed.

    `through` must lie further back than the longest transaction may last (we use an hour), so that nothing created
    before it is still uncommitted. A disagreeing projection is not overwritten: it is evidence.
    """
    wrong: list[str] = []
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            "SELECT p.account_id, SUM(p.amount_minor),"
            " COALESCE(SUM(p.amount_minor) FILTER (WHERE t.created_at < b.through), 0), b.balance_minor, b.through"
            " FROM billing_posting p JOIN billing_ledgertransaction t ON t.id = p.transaction_id"
            " LEFT JOIN billing_ledgerbalance b ON b.account_id = p.account_id"
            " WHERE t.created_at < %s GROUP BY p.account_id, b.balance_minor, b.through",
            [through],
        )
        rows = cursor.fetchall()
        for account, total, then, projected, stood in rows:
            if projected is not None and (then != projected or stood > through):
                wrong.append(f"ledger account {account}: projected {projected} through {stood}, postings say {then}")
                continue
            LedgerBalance.objects.update_or_create(
                account_id=account, defaults={"through": through, "balance_minor": total}
            )
    return wrong


def find(key: str) -> LedgerTransaction | None:
    """The booked transaction of a key, or None."""
    return LedgerTransaction.objects.filter(key=key).first()
