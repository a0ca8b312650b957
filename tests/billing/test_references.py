"""What usage records refer to is there and stays, though no foreign key says so (migration 0005)."""

import threading
from dataclasses import replace

import pytest
from django.db import IntegrityError, connection, transaction

from billing import usage
from billing.models import UsageRecord
from tests import factories as f
from tests.references import GONE, stays

COLUMNS = ["organization_id", "contract_id", "placement_id", "price_version_id"]
pytestmark = pytest.mark.django_db


@pytest.fixture
def row():
    site = f.site()
    host = f.host(site)
    contract = f.contract(f.listing(site, hosts=[host]))
    placement = f.placement(f.job(contract), host, [0])
    version = usage.price_versions(contract)[0]
    return usage.Row(
        contract.organization_id, contract.pk, placement.pk, version.pk, 1, 0, 0, 3600, 1000, 3_600_000, 0, "t", "t-1"
    )


def test_a_record_of_what_is_there_is_taken(row):
    assert usage.insert([row]) == {"t-1"}
    assert usage.insert([row]) == set()


@pytest.mark.parametrize("column", COLUMNS)
def test_a_record_that_refers_to_nothing_is_refused(row, column):
    wrong = replace(row, **{column: GONE}, start_s=7200, end_s=9000, event_id="t-2")
    with pytest.raises(IntegrityError, match=f"{column} refers to a row"), transaction.atomic():
        usage.insert([row, wrong])
    assert not UsageRecord.objects.exists()


def test_a_record_of_another_contract_than_its_placements_is_looked_at_by_itself(row):
    other = f.contract()
    assert usage.insert([replace(row, organization_id=other.organization_id, contract_id=other.pk)]) == {"t-1"}


@pytest.mark.parametrize("column", COLUMNS)
def test_what_is_referred_to_is_not_deleted(row, column):
    usage.insert([row])
    stays(UsageRecord, column, getattr(row, column))


@pytest.mark.django_db(transaction=True)
def test_two_writers_of_the_same_records_in_opposite_order_store_each_once(row):
    """One waits for what the other has just written, and leaves out what is there."""
    rows = [replace(row, start_s=3600 * i, end_s=3600 * (i + 1), event_id=f"t-{i}") for i in range(200)]
    gate, fresh = threading.Barrier(2), []

    def write(mine):
        try:
            gate.wait(20)
            fresh.append(usage.insert(mine))
        finally:
            connection.close()

    threads = [threading.Thread(target=write, args=(mine,)) for mine in (rows, rows[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert UsageRecord.objects.count() == 200
    assert len(fresh) == 2
    assert not fresh[0] & fresh[1]
    assert fresh[0] | fresh[1] == {r.event_id for r in rows}
