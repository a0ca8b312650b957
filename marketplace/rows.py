"""Rows by a statement that is written once, for reads that every call of the API makes: the ORM builds its SQL anew each time,
which costs several times what the database then needs.

    key = Read(ApiKey, "WHERE t.digest = %s", "organization").first([digest])

The rows are the models' own, complete, with the rows they refer to.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar, cast

from django.db import connection, models

M = TypeVar("M", bound=models.Model)


class Read(Generic[M]):
    """`SELECT` of `model` as `t`, with each of `related` (a foreign key that is never null) joined under its own name. `tail`:
    what follows the joins, our own text.
    """

    def __init__(self, model: type[M], tail: str, *related: str) -> None:
        self.model, self.tail, self.related = model, tail, related

    def first(self, parameters: Sequence[Any]) -> M | None:
        """The first row, if there is one."""
        with connection.cursor() as cursor:
            cursor.execute(self._statement, parameters)
            row = cursor.fetchone()
        return None if row is None else self._made(row)

    @cached_property
    def _joined(self) -> list[tuple[Any, Any]]:
        fields = [cast("Any", self.model._meta.get_field(name)) for name in self.related]
        assert not any(field.null for field in fields), "a row without it would be missing"
        return [(field, field.remote_field.model) for field in fields]

    @cached_property
    def _statement(self) -> str:
        quoted = connection.ops.quote_name
        parts: list[tuple[str, Any]] = [("t", self.model), *((field.name, model) for field, model in self._joined)]
        columns = [f"{quoted(a)}.{quoted(f.column)}" for a, model in parts for f in model._meta.concrete_fields]
        joins = [
            f"JOIN {quoted(model._meta.db_table)} {quoted(field.name)}"
            f" ON {quoted(field.name)}.{quoted(model._meta.pk.column)} = t.{quoted(field.column)}"
            for field, model in self._joined
        ]
        table = quoted(self.model._meta.db_table)
        return f"SELECT {', '.join(columns)} FROM {table} t {' '.join(joins)} {self.tail} LIMIT 1"  # noqa: S608

    @cached_property
    def _shapes(self) -> list[tuple[Any, int, list[str], list[tuple[int, Any]]]]:
        """Of each model: columns, their attributes, and those that the database's value has to be turned into."""
        found = []
        model: Any
        for model in (self.model, *(model for _, model in self._joined)):
            fields = model._meta.concrete_fields
            turned = [(i, f.from_db_value) for i, f in enumerate(fields) if hasattr(f, "from_db_value")]
            found.append((model, len(fields), [f.attname for f in fields], turned))
        return found

    def _made(self, row: Sequence[Any]) -> M:
        made: list[models.Model] = []
        at = 0
        for model, width, names, turned in self._shapes:
            values = list(row[at : at + width])
            at += width
            for i, turn in turned:
                values[i] = turn(values[i], None, connection)
            made.append(model.from_db(connection.alias, names, values))
        for (field, _), other in zip(self._joined, made[1:], strict=True):
            field.set_cached_value(made[0], other)
        return cast("M", made[0])
