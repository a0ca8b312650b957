"""What must stand before a run: Django's environment, and a database without rows."""

import os
from typing import Final

MIGRATED: Final = frozenset({"django_content_type", "auth_permission"})  # tables that `migrate` itself fills


def fixed() -> None:
    """Before Django's settings are read."""
    os.environ.setdefault("DEVELOPMENT", "1")
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
    os.environ.setdefault("API_RATE", "1000000/min")  # a month of a customer's calls are seconds here


def empty() -> None:
    """No rows, and numbers that begin with 1: a run is the same whatever ran before it."""
    from django.apps import apps
    from django.db import connection

    from scheduler import fleet

    tables = [m._meta.db_table for m in apps.get_models(include_auto_created=True) if m._meta.managed]
    with connection.cursor() as cursor:
        there = set(connection.introspection.table_names(cursor))
        names = ", ".join(f'"{t}"' for t in sorted((set(tables) & there) - MIGRATED))
        cursor.execute(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    fleet.forget()
