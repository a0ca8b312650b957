"""A PostgreSQL of its own and rows in bulk, for the benchmarks of money. fsync is on: durable means durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def database() -> Iterator[dict[str, str]]:
    """Start a throw-away PostgreSQL and Redis, set Django up on them, migrate; yields the environment for child processes."""
    from sandbox.servers import Cluster

    with Cluster() as cluster:
        environment = {
            **cluster.environment(as_owner=True), "DEVELOPMENT": "1", "DJANGO_SETTINGS_MODULE": "marketplace.settings",
            "LOG_LEVEL": "WARNING",
        }  # fmt: skip
        os.environ.update(environment)
        import django

        django.setup()
        from django.core.management import call_command
        from django.db import connections

        call_command("migrate", verbosity=0, skip_checks=True)
        try:
            yield environment
        finally:
            connections.close_all()


def clone(table: str, pk: int, copies: int, **columns: str) -> list[int]:
    """Insert `copies` of a row; `columns` are SQL expressions over the row `t` and the copy's number `g`. Returns the ids."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND column_name <> 'id'", [table]
        )
        names = [name for (name,) in cursor.fetchall()]
        values = ", ".join(columns.get(name, f't."{name}"') for name in names)
        listed = ", ".join(f'"{name}"' for name in names)
        cursor.execute(
            f"INSERT INTO {table} ({listed}) SELECT {values} FROM {table} t, generate_series(1, %s) g"
            " WHERE t.id = %s ORDER BY g RETURNING id",
            [copies, pk],
        )
        return [row[0] for row in cursor.fetchall()]


def market(customers: int, placements_each: int = 1) -> list[tuple[int, int, int, int]]:
    """Customers with a contract, a price and placements: (organization, contract, price version, placement) rows."""
    from django.db import connection

    from billing import usage
    from tests import factories

    world = factories.contract()
    host = factories.host(world.site)
    job = factories.job(world)
    placement = factories.placement(
        job, host, [0], state="released", running_at=factories.NOW, finished_at=factories.NOW
    )
    type(placement).objects.filter(pk=placement.pk).update(metered_through=factories.NOW)
    version = usage.price_versions(world)[0]
    organizations = clone("marketplace_organization", world.organization_id, customers, name="'Customer ' || g")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO billing_billingaccount (organization_id, currency, state, dunning, credit_limit_minor,"
            " payment_method, card_brand, card_last4, card_expires, created_at)"
            " SELECT id, 'USD', 'open', 'none', 0, '', '', '', '', now() FROM unnest(%s::bigint[]) id",
            [organizations],
        )
    numbered = "(SELECT (%s::bigint[])[g])" % ("'{" + ",".join(map(str, organizations)) + "}'")
    contracts = clone("marketplace_contract", world.pk, customers, organization_id=numbered)
    ids = "(SELECT ('{" + ",".join(map(str, contracts)) + "}'::bigint[])[g])"
    versions = clone("billing_priceversion", version.pk, customers, contract_id=ids)
    rows: list[tuple[int, int, int, int]] = []
    for turn in range(placements_each):
        made = clone(
            "marketplace_placement", placement.pk, customers, organization_id=numbered, contract_id=ids,
            attempt=f"{1000 + turn * customers} + g",
        )  # fmt: skip
        rows += list(zip(organizations, contracts, versions, made, strict=True))
    return rows
