"""Month close: from start to all invoices open in PostgreSQL, with a worker killed on the way.

Two worker processes close the accounts between them, `billing.tasks.close_all` each; one is killed with SIGKILL after a
third of the invoices, and another takes its place. The peer is one SQL aggregate over the same usage rows. With --quick the
month is 1,000 accounts x 100 records, and `seconds_10k_accounts` is what its 1,000 accounts took, times ten.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

from benchmarks import books
from benchmarks.harness import Options, Report, require

MONTH = datetime(2026, 10, 1, tzinfo=UTC)
NEXT = datetime(2026, 11, 1, tzinfo=UTC)
WORKERS = 2


def worker(number: int) -> None:
    """One process: its share of the accounts. Prints its peak memory in MiB."""
    import django

    django.setup()
    from billing.tasks import close_all

    close_all(NEXT, now=datetime(2026, 11, 2, tzinfo=UTC), share=(number, WORKERS))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


# What a bulk load does without: triggers, and the guards of what is inserted one by one. A close inserts no usage.
_GUARDS = """
SELECT format('ALTER TABLE billing_usagerecord DROP CONSTRAINT %I', conname) FROM pg_constraint
WHERE conrelid = 'billing_usagerecord'::regclass AND contype IN ('u', 'x')
UNION ALL SELECT 'ALTER TABLE billing_usagerecord DISABLE TRIGGER USER'
"""


def seed(accounts: int, records: int) -> None:
    """Accounts with `records` records each, tiling the month's start; indexed when all are there."""
    from django.db import connection

    rows = books.market(accounts)
    start = int(MONTH.timestamp())
    seconds = min(3600, (int(NEXT.timestamp()) - start) // records)
    with connection.cursor() as cursor:
        cursor.execute(_GUARDS)
        for (statement,) in cursor.fetchall():
            cursor.execute(statement)
        cursor.execute("SELECT indexdef FROM pg_indexes WHERE indexname = 'usage_of_organization'")
        (index,) = cursor.fetchone()
        cursor.execute("DROP INDEX usage_of_organization")
        cursor.execute(
            "INSERT INTO billing_usagerecord (organization_id, contract_id, price_version_id, placement_id, meter, revision,"
            " start_s, end_s, rate, quantity, previous, source, event_id, payload_digest)"
            " SELECT o, c, v, p, 1, 0, %s + g * %s, %s + g * %s + %s, 1000, 1000 * %s, 0, 'bench', p || '-' || g, ''"
            " FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[]) AS m(o, c, v, p),"
            " generate_series(0, %s) g",
            [
                start,
                seconds,
                start,
                seconds,
                seconds,
                seconds,
                *(list(c) for c in zip(*rows, strict=True)),
                records - 1,
            ],
        )
        cursor.execute("ALTER TABLE billing_usagerecord ENABLE TRIGGER USER")
        cursor.execute(index)
        cursor.execute("ANALYZE billing_usagerecord")


def wrong(accounts: int) -> int:
    """Accounts whose invoices do not carry exactly their records' quantity, once; plus what breaks an invariant."""
    from django.db import connection

    from billing import reconcile

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT COUNT(*) FROM (SELECT organization_id, SUM(quantity - previous) q FROM billing_usagerecord GROUP BY 1) u"
            " FULL JOIN (SELECT i.organization_id, SUM(l.quantity) q, COUNT(DISTINCT i.id) n FROM billing_invoice i"
            " JOIN billing_invoiceline l ON l.invoice_id = i.id WHERE i.state = 'open' GROUP BY 1) b"
            " USING (organization_id) WHERE u.q IS DISTINCT FROM b.q OR b.n <> 1"
        )
        count: int = cursor.fetchone()[0]
        cursor.execute("SELECT COUNT(*) FROM billing_invoice")
        require(cursor.fetchone()[0] == accounts, "not every account has its invoice")
    return count + sum(reconcile.invariants().values())


def _start(number: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from benchmarks.close import worker; worker({number})"]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def run(options: Options) -> Report:
    accounts, records = (1000, 100) if options.quick else (10_000, 1000)
    with books.database() as environment:
        from django.db import connection

        from billing.models import Invoice

        seed(accounts, records)
        with connection.cursor() as cursor:
            start = time.perf_counter()
            cursor.execute(
                "SELECT organization_id, contract_id, price_version_id, SUM(quantity) FROM billing_usagerecord GROUP BY 1, 2, 3"
            )
            require(len(cursor.fetchall()) == accounts, "the aggregate saw another number of accounts")
            aggregate = time.perf_counter() - start
        start = time.perf_counter()
        workers = [_start(number, environment) for number in range(WORKERS)]
        while Invoice.objects.count() < accounts // 3:
            require(any(w.poll() is None for w in workers), "the workers ended early")
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        workers[0] = _start(0, environment)
        peaks = [int(w.communicate()[0].strip().splitlines()[-1]) for w in workers]
        taken = time.perf_counter() - start
        require(all(w.returncode == 0 for w in workers), "a worker failed")
        bad = wrong(accounts)
    scale = 10_000 / accounts
    return Report(
        "close",
        {"seconds_10k_accounts": taken * scale, "rss_mib": max(peaks), "doubled_or_lost": bad},
        peer={"aggregate_s": aggregate * scale},
        conditions={
            "accounts": accounts, "records_each": records, "workers": WORKERS, "killed": 1,
            "scaled_by": scale, "mirroring_to_stripe": "not part of it",
        },
        must={"seconds_10k_accounts": ("<=", 60), "rss_mib": ("<=", 512), "doubled_or_lost": ("<=", 0)},
    )  # fmt: skip
