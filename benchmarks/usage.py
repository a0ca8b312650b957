"""Usage records stored a second: batches of 1,000 by two writers, every constraint on, fsync on; beside raw COPY.

The work: distinct hourly intervals of 2,000 placements through `billing.usage.insert` (the statement that metering and
ingest use). The peer: the same columns by `COPY` into the same table, by the same two writers.
"""

from __future__ import annotations

import multiprocessing
import time

from benchmarks import books
from benchmarks.harness import Options, Report, require

BATCH = 1000
PLACEMENTS = 2000
START = 1_790_000_000 // 3600 * 3600


def rows_of(market: list[tuple[int, int, int, int]], hour: int, label: str) -> list[tuple[object, ...]]:
    """One record per placement for an hour, as usage.Row's fields."""
    start = START + hour * 3600
    return [
        (organization, contract, placement, version, 1, 0, start, start + 3600, 1000, 3_600_000, 0, "bench",
         f"{label}-{placement}-{hour}")
        for organization, contract, version, placement in market
    ]  # fmt: skip


def insert(market: list[tuple[int, int, int, int]], hours: range) -> None:
    """One writer of ours."""
    import django

    django.setup()
    from django.db import transaction

    from billing import usage

    for hour in hours:
        rows = [usage.Row(*values) for values in rows_of(market, hour, "insert")]  # type: ignore[arg-type]
        for first in range(0, len(rows), BATCH):
            with transaction.atomic():
                usage.insert(rows[first : first + BATCH])


def copy(market: list[tuple[int, int, int, int]], hours: range) -> None:
    """One writer of the peer: a transaction per batch too."""
    import django

    django.setup()
    from django.db import connection, transaction

    columns = (
        "organization_id, contract_id, placement_id, price_version_id, meter, revision, start_s, end_s, rate, quantity,"
        " previous, source, event_id, payload_digest"
    )
    for hour in hours:
        rows = rows_of(market, hour, "copy")
        for first in range(0, len(rows), BATCH):
            statement = f"COPY billing_usagerecord ({columns}) FROM STDIN"
            with transaction.atomic(), connection.cursor() as cursor, cursor.copy(statement) as stream:
                for row in rows[first : first + BATCH]:
                    stream.write_row((*row, "0" * 64))


def _two_writers(target: object, market: list[tuple[int, int, int, int]], hours: range) -> float:
    """Seconds until two processes, each with half of the placements, have written all hours."""
    from django.db import connections

    connections.close_all()
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(3)
    half = len(market) // 2
    writers = [
        spawn.Process(target=_write, args=(gate, target, part, hours)) for part in (market[:half], market[half:])
    ]
    for writer in writers:
        writer.start()
    gate.wait()
    start = time.perf_counter()
    for writer in writers:
        writer.join()
    taken = time.perf_counter() - start
    require(all(writer.exitcode == 0 for writer in writers), "a writer failed")
    return taken


def _write(gate: object, target: object, market: list[tuple[int, int, int, int]], hours: range) -> None:
    target(market[:1], range(900_000, 900_000))  # type: ignore[operator]  # imports and set-up, before the clock
    gate.wait()  # type: ignore[attr-defined]
    target(market, hours)  # type: ignore[operator]


def run(options: Options) -> Report:
    hours = 40 if options.quick else 300
    with books.database():
        from billing.models import UsageRecord

        market = books.market(PLACEMENTS)
        ours = _two_writers(insert, market, range(hours))
        require(UsageRecord.objects.count() == hours * PLACEMENTS, "not every record was stored")
        theirs = _two_writers(copy, market, range(hours, 2 * hours))
        require(UsageRecord.objects.count() == 2 * hours * PLACEMENTS, "COPY did not store every record")
        again = _two_writers(insert, market, range(hours // 4))
        require(UsageRecord.objects.count() == 2 * hours * PLACEMENTS, "a repeated batch stored something")
    count = hours * PLACEMENTS
    return Report(
        "usage",
        {"records_per_s": count / ours, "share_of_copy": theirs / ours},
        peer={"copy_per_s": count / theirs, "replayed_per_s": count / 4 / again},
        conditions={"records": count, "batch": BATCH, "writers": 2, "fsync": True, "constraints": "all, both sides"},
        must={"records_per_s": (">=", 20_000)},
    )
