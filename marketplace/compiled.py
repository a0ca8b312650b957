"""Querysets of every call, compiled once a process and prepared once a connection (ADR 19): building one, joins and all, costs
several times what PostgreSQL needs for its rows.

    SHOWN = Compiled(lambda actor: Listing.objects.visible_to(actor).filter(any_of("pk", "ids")))
    SHOWN(shape_of(actor), ids=[1, 2], organization=7)

What the function is given is the shape: for each there is one statement, so it takes few values. Whatever differs from call to call
is a `slot`. The rows are those of the queryset: models with what they select, or tuples of `values_list`.
"""

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any, Final

from django.contrib.postgres.fields import ArrayField
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import BigIntegerField, BooleanField, DateTimeField, Expression, F, Field, Func, QuerySet

from marketplace import prepared
from marketplace.tenancy import Actor


class _Slot(Expression):
    """A parameter by name, of its field's type."""

    def __init__(self, name: str, field: "Field[Any, Any]") -> None:
        super().__init__(output_field=field)
        self.name = name

    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, Any]:  # noqa: ARG002
        return f"%s::{self.output_field.db_type(connection)}", [self]


def slot(name: str, field: "Field[Any, Any] | None" = None) -> Any:
    """The parameter `name`, a bigint unless `field` is given; stands in a queryset wherever a value may."""
    return _Slot(name, field or BigIntegerField())


def time(name: str) -> Any:
    """The parameter `name`, an instant."""
    return _Slot(name, DateTimeField())


def any_of(path: str, name: str) -> Any:
    """The condition that the id at `path` is in the list `name`: one text, however long the list."""
    return Func(
        F(path), _Slot(name, ArrayField(BigIntegerField())), template="%(expressions)s)", arg_joiner=" = ANY (",
        output_field=BooleanField(),
    )  # fmt: skip


ORGANIZATION = slot("organization")


def shape_of(actor: Actor) -> Actor:
    """`actor` as far as what `visible_to` answers is another text for it; the organization, if there is one, is a slot of that name."""
    of = None if actor.organization_id is None else ORGANIZATION
    return Actor(kind=actor.kind, organization_id=of, livemode=actor.livemode)


class Compiled:
    """`build(*shape)` gives the queryset; calling it with the shape and every slot's value gives its rows, as a list."""

    def __init__(self, build: Callable[..., QuerySet[Any]]) -> None:
        self._build = build
        self._plans: dict[tuple[Hashable, ...], _Plan] = {}

    def __call__(self, *shape: Hashable, **values: Any) -> list[Any]:
        plan = self._plans.get(shape)
        if plan is None:  # two threads may compile the same
            plan = self._plans[shape] = _Plan(self._build(*shape))
        return plan.rows(values)


class _Plan:
    """A queryset's statement, with the compiler that made it and knows what to make of a row."""

    def __init__(self, queryset: QuerySet[Any]) -> None:
        self.model = queryset.model
        self.iterable: Any = queryset._iterable_class  # noqa: SLF001 (Django has no public name for either)
        self.compiler = queryset.query.get_compiler(DEFAULT_DB_ALIAS)
        self.sql, self.parameters = self.compiler.as_sql()
        self.converters = self.compiler.get_converters([each[0] for each in self.compiler.select or ()])

    def rows(self, values: dict[str, Any]) -> list[Any]:
        found = prepared.rows(self.sql, [values[p.name] if isinstance(p, _Slot) else p for p in self.parameters])
        compiler: Any = copy(self.compiler)
        compiler.connection = connections[DEFAULT_DB_ALIAS]  # this thread's
        compiler.execute_sql = lambda *_, **__: [found]
        compiler.get_converters = lambda _: self.converters
        return list(self.iterable(_Asked(self.model, compiler)))


class _Asked:
    """What Django's iterables ask of a queryset and its query, of one that has been asked."""

    db = DEFAULT_DB_ALIAS
    _known_related_objects: Final[dict[Any, Any]] = {}

    def __init__(self, model: Any, compiler: Any) -> None:
        self.model, self.query, self.compiler = model, self, compiler

    def get_compiler(self, *_: Any, **__: Any) -> Any:
        return self.compiler
