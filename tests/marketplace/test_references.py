"""What placements, events and grants refer to is there and stays, though no foreign key says so (migration 0011)."""

import threading

import pytest
from django.db import IntegrityError, connection, transaction

from marketplace.models import JobEvent, Placement, PlacementEvent, PowerGrant
from tests import factories as f
from tests.references import GONE, stays

REFERENCES = [
    (Placement, "job_id"), (Placement, "contract_id"), (Placement, "organization_id"), (Placement, "host_id"),
    (Placement, "site_id"), (Placement, "cell_id"), (PlacementEvent, "placement_id"), (JobEvent, "job_id"),
    (PowerGrant, "placement_id"), (PowerGrant, "host_id"), (PowerGrant, "site_id"),
]  # fmt: skip
each = pytest.mark.parametrize(("model", "column"), REFERENCES, ids=lambda x: x if isinstance(x, str) else x.__name__)


def world():
    site = f.site()
    host = f.host(site)
    contract = f.contract(f.listing(site, hosts=[host]))
    placement = f.placement(f.job(contract), host, [0])
    if not PowerGrant.objects.filter(placement=placement).exists():
        PowerGrant.objects.create(
            placement=placement, host=host, site=site, delta_w=1, state="granted", created_at=f.NOW
        )
    JobEvent.objects.create(job=placement.job, at=f.NOW, actor="t", to_state="queued")
    return placement


def a_row(model, placement):
    return model.objects.filter(**({"pk": placement.pk} if model is Placement else {})).order_by("id").last()


@pytest.mark.django_db
@each
def test_a_row_that_refers_to_nothing_is_refused(model, column):
    placement = world()
    row = a_row(model, placement)
    values = {fld.attname: getattr(row, fld.attname) for fld in model._meta.concrete_fields if not fld.primary_key}
    if model is Placement:
        values["rank"] = 77
    if model is PowerGrant:
        values["placement_id"] = f.placement(
            placement.job, placement.host, [1], rank=1, attempt=placement.attempt + 5
        ).pk
        PowerGrant.objects.filter(placement_id=values["placement_id"]).delete()
    with transaction.atomic():
        model.objects.bulk_create([model(**values)])
        transaction.set_rollback(True)
    wrong = {**values, column: GONE}
    with pytest.raises(IntegrityError, match="that is not there"), transaction.atomic():
        model.objects.bulk_create([model(**wrong)])
    with pytest.raises(IntegrityError, match="that is not there"), transaction.atomic():
        model.objects.filter(pk=row.pk).update(**{column: GONE})


@pytest.mark.django_db
@each
def test_what_is_referred_to_is_not_deleted_and_keeps_its_key(model, column):
    stays(model, column, getattr(a_row(model, world()), column))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("first", ["insert", "write and insert", "delete"])
def test_a_deletion_beside_an_insertion(first):
    """Whoever comes second sees the first: never an event of a placement that is gone. A row that the inserting transaction
    has written itself needs no lock besides (migration 0015).
    """
    placement = world()
    PlacementEvent.objects.all().delete()
    PowerGrant.objects.all().delete()
    began, go, told = threading.Event(), threading.Event(), []

    def delete():
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM marketplace_placement WHERE id = %s", [placement.pk])

    def insert():
        if first == "write and insert":
            Placement.objects.filter(pk=placement.pk).update(reason="moved")
        PlacementEvent.objects.bulk_create(
            [PlacementEvent(placement_id=placement.pk, at=f.NOW, actor="t", to_state="granted")]
        )

    one, two = (delete, insert) if first == "delete" else (insert, delete)

    def slowly():
        with transaction.atomic():
            one()
            began.set()
            assert go.wait(20)
        connection.close()

    def after():
        try:
            two()
        except IntegrityError as error:
            told.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=slowly), threading.Thread(target=after)]
    threads[0].start()
    assert began.wait(20)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive()  # it waits for the other's end
    go.set()
    for thread in threads:
        thread.join(20)
    assert len(told) == 1
    assert Placement.objects.filter(pk=placement.pk).exists() == (first != "delete")
