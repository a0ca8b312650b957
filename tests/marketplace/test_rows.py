"""Statements written once give the rows that the ORM gives."""

import pytest
from django.utils import timezone

from marketplace.models import Contract, IdempotencyKey
from marketplace.rows import Read
from tests import factories

pytestmark = pytest.mark.django_db

CONTRACT = Read(Contract, "WHERE t.id = %s", "listing", "site")


def values(row):
    return {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}


def test_a_row_is_the_orms_with_the_rows_it_refers_to(django_assert_num_queries):
    listing = factories.listing(factories.site())
    made = factories.contract(listing, factories.organization())
    was = Contract.objects.select_related("listing", "site").get(pk=made.pk)
    with django_assert_num_queries(1):
        found = CONTRACT.first([made.pk])
        assert found == was
        assert values(found) == values(was)
        assert values(found.listing) == values(was.listing)
        assert values(found.site) == values(was.site)
    found.save()  # it is known to be in the database
    assert Contract.objects.count() == 1


def test_no_row_is_none():
    assert CONTRACT.first([0]) is None


@pytest.mark.parametrize("body", [{"a": [1, {"b": None}]}, [], None, "text"])
def test_values_are_turned_as_the_orm_turns_them(body):
    organization = factories.organization()
    row = IdempotencyKey.objects.create(
        organization=organization,
        key="k",
        route="POST /",
        body_digest="d",
        status=200,
        body=body,
        created_at=timezone.now(),
    )
    found = Read(IdempotencyKey, "WHERE t.organization_id = %s AND t.key = %s").first([organization.pk, "k"])
    assert values(found) == values(IdempotencyKey.objects.get(pk=row.pk))


def test_a_reference_that_may_be_null_is_refused():
    with pytest.raises(AssertionError, match="missing"):
        Read(Contract, "", "quote").first([])
