"""For tests of references that are no foreign keys: the row that is referred to stays, and keeps its key."""

import pytest
from django.db import IntegrityError, connection, transaction

GONE = 999_999_999  # the key of no row


def stays(model, column, pk):
    """The row that `column` of `model` refers to can neither be deleted nor be given another key."""
    table = model._meta.get_field(column.removesuffix("_id")).related_model._meta.db_table
    for statement in (f"DELETE FROM {table} WHERE id = {pk}", f"UPDATE {table} SET id = {GONE} WHERE id = {pk}"):
        with pytest.raises(IntegrityError):
            _with_every_check(statement)


def _with_every_check(statement):
    """Those that would come at the commit included."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(statement)
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
