"""Statements that the server prepares: Django's connection, transaction and count of statements; what a request costs in them."""

import pytest
from django.db import connection, transaction
from django.db.utils import IntegrityError

from marketplace import prepared
from marketplace.models import IdempotencyKey
from tests import factories

QUERY = "SELECT id, name FROM marketplace_cell WHERE name = %s"


@pytest.mark.django_db
def test_it_is_djangos_connection_and_counted(django_assert_num_queries):
    cell = factories.cell()
    with django_assert_num_queries(3):
        assert prepared.row(QUERY, [cell.name]) == (cell.pk, cell.name)
        assert prepared.rows(QUERY, ["none of that name"]) == []
        assert prepared.count("UPDATE marketplace_cell SET name = name WHERE id = %s", [cell.pk]) == 1


@pytest.mark.django_db(transaction=True)
def test_the_server_keeps_the_statement_from_its_third_call_on():
    for _ in range(3):
        prepared.rows(QUERY, ["x"])
    kept = prepared.rows("SELECT statement FROM pg_prepared_statements")
    assert [text for (text,) in kept if "FROM marketplace_cell WHERE name" in text] == [QUERY.replace("%s", "$1")]


@pytest.mark.django_db
def test_errors_are_djangos_and_what_is_undone_is_undone():
    cell = factories.cell()
    with pytest.raises(IntegrityError), transaction.atomic():
        prepared.count("UPDATE marketplace_cell SET region = NULL WHERE id = %s", [cell.pk])
    assert prepared.row(QUERY, [cell.name]) == (cell.pk, cell.name)


@pytest.mark.django_db(transaction=True)
def test_a_server_that_has_gone_is_noticed_without_a_question(django_assert_num_queries):
    prepared.rows("SELECT 1")
    assert connection.is_usable()
    (pid,) = prepared.row("SELECT pg_backend_pid()")
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 2000)", [pid])
    other.close()
    assert not connection.is_usable()
    connection.close()
    assert prepared.row("SELECT 1") == (1,)


@pytest.mark.django_db(transaction=True)
def test_a_job_is_eight_statements(django_assert_num_queries):
    site = factories.site(pdus=1)
    listing = factories.listing(site, hosts=[factories.host(site, power_node="pdu-1")])
    contract = factories.contract(listing, factories.organization())
    api = factories.client(key=factories.key(contract.organization)[1])
    body = {"contract": contract.public_id, "command": ["true"]}

    def post(key):
        return api.post("/api/v1/jobs", body, format="json", HTTP_IDEMPOTENCY_KEY=key)

    post("first")  # that the key is used is written, the cycle's message waits
    # Whose key; BEGIN; what the key answered; contract and hosts; job and event; the cycle's message; the answer; COMMIT.
    with django_assert_num_queries(8):
        made = post("second")
    with django_assert_num_queries(4):  # whose key; BEGIN; what the key answered; COMMIT
        again = post("second")
    assert made.status_code == again.status_code == 201, made.content
    assert made.json() == again.json()
    assert IdempotencyKey.objects.count() == 2
