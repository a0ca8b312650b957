"""What a test with real transactions leaves is deleted, not truncated: a TRUNCATE of all tables writes some thousand files anew, each
time, whatever stood in them. Content types and permissions, which `migrate` made, stay.
"""

from typing import Any

from django.db import connections, transaction
from django.test import TransactionTestCase

from sandbox.market.environment import MIGRATED

_truncate = TransactionTestCase._fixture_teardown


def teardown(case: Any) -> None:
    """In place of `TransactionTestCase._fixture_teardown`."""
    names = case._databases_names(include_mirrors=False)
    if case.reset_sequences or not all(_may(name) for name in names):
        _truncate(case)
        return
    for name in names:
        connection = connections[name]
        tables = connection.introspection.django_table_names(only_existing=True, include_views=False)
        with transaction.atomic(using=name), connection.cursor() as cursor:
            # No trigger and no foreign key has a say: there are rows that nobody may delete.
            cursor.execute("SET LOCAL session_replication_role = replica")
            cursor.execute("; ".join(f'DELETE FROM "{table}"' for table in tables if table not in MIGRATED))
            cursor.execute("SET LOCAL session_replication_role = origin")
            # As a TRUNCATE would say it: all offers are others.
            cursor.execute("SELECT marketplace_offer_changed(0::smallint, 0)")


def _may(name: str) -> bool:
    """Only an embedded server has granted it to the owner (sandbox.servers.postgres)."""
    with connections[name].cursor() as cursor:
        cursor.execute("SELECT has_parameter_privilege('session_replication_role', 'SET')")
        return bool(cursor.fetchone()[0])
