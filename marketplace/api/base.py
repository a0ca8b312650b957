"""What every resource stands on: `Resource` (tenancy by `visible_to`), strict shapes, ids, lists, idempotent writes."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from django.core.exceptions import ValidationError
from django.db.models import Model, QuerySet
from django.http import Http404
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from marketplace import ids
from marketplace.api import idempotency, pagination
from marketplace.errors import MarketError
from marketplace.models import Organization, User
from marketplace.tenancy import ANONYMOUS, Actor, TenantQuerySet


class Shape(serializers.Serializer):
    """A strict input: unknown fields are refused by name."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = set(data) - set(self.fields)
            if unknown:
                raise serializers.ValidationError(dict.fromkeys(sorted(unknown), "unknown field"))
        return super().to_internal_value(data)

    @classmethod
    def checked(cls, data: Any) -> dict[str, Any]:
        """The validated body, by fields that are made once: a new set of them for each call costs more than to check with them.
        For shapes that look at nothing but the body.
        """
        shape = cls.__dict__.get("_made_once")
        if shape is None:
            shape = cls._made_once = cls()  # type: ignore[attr-defined]
        try:
            return dict(shape.run_validation(data))
        except serializers.ValidationError:  # the errors are told as everywhere
            body = cls(data=data)
            body.is_valid(raise_exception=True)
            return dict(body.validated_data)


class PublicId(serializers.Field):
    """A prefixed id of another row on input (gives the primary key), and on output."""

    def __init__(self, prefix: str, **options: Any) -> None:
        self.prefix = prefix
        super().__init__(**options)

    def to_internal_value(self, data: Any) -> int:
        pk = ids.decode(self.prefix, data) if isinstance(data, str) else None
        if pk is None:
            raise serializers.ValidationError(f"not an id of the form {self.prefix}_...")
        return pk

    def to_representation(self, value: Any) -> str:
        return ids.encode(self.prefix, value.pk if isinstance(value, Model) else value)


class Resource(APIView):
    """A view of one table. `queryset` is narrowed to the actor here, and nowhere else.

    Subclasses set `actions` (method -> action of tenancy.ACTIONS), `model_queryset` (a TenantQuerySet), `prefix`, and write
    `represent(row) -> dict`.
    """

    actions: ClassVar[dict[str, str]] = {}
    model_queryset: ClassVar[TenantQuerySet | None] = None
    prefix: ClassVar[str] = ""
    order: ClassVar[str] = "-id"
    filters: ClassVar[dict[str, str]] = {}  # query parameter -> lookup

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "queryset" in cls.__dict__ and cls.__name__ != "Resource":
            raise TypeError(f"{cls.__name__} overrides queryset: tenancy is applied in Resource alone")

    @property
    def actor(self) -> Actor:
        actor: Any = self.request.auth
        return actor or ANONYMOUS

    def queryset(self) -> QuerySet[Any]:
        assert self.model_queryset is not None
        return self.model_queryset.all().visible_to(self.actor)

    def row(self, public_id: str) -> Any:
        """The row of that id that the actor may see; anything else is 404."""
        pk = ids.decode(self.prefix, public_id)
        found = self.queryset().filter(pk=pk).first() if pk else None
        if found is None:
            raise Http404
        return found

    def person(self) -> User:
        """Whoever is signed in, on a route of action "person"."""
        assert isinstance(self.request.user, User)
        return self.request.user

    def organization(self) -> Organization:
        """The one that acts; our own people act in none."""
        if self.actor.organization_id is None:
            raise MarketError("organization_required", "This is about one organization, and you act in none.")
        found: Organization = Organization.objects.all().owned_by(self.actor.organization_id).get()
        return found

    def represent(self, row: Any) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} does not say how to show a {type(row).__name__}")

    def listing(self, request: Request, queryset: QuerySet[Any] | None = None) -> Response:
        """A page of rows, filtered by `filters`; an unknown parameter is refused by name."""
        rows = self.queryset() if queryset is None else queryset
        query = request.query_params.dict()
        unknown = set(query) - {"limit", "cursor", *self.filters}
        if unknown:
            names = dict.fromkeys((f"/{u}" for u in sorted(unknown)), "unknown parameter")
            raise MarketError("unknown_field", f"known: limit, cursor, {', '.join(self.filters)}", names)
        for name, lookup in self.filters.items():
            if name in query:
                rows = self.narrow(rows, name, lookup, query[name])
        data, more, cursor = pagination.page(rows, query, order=self.order)
        self.look(data)
        return Response({"data": [self.represent(row) for row in data], "has_more": more, "cursor": cursor})

    def look(self, rows: Sequence[Any]) -> None:
        """What `represent` needs of a page's rows and is cheaper asked for together."""

    def narrow(self, rows: QuerySet[Any], name: str, lookup: str, text: str) -> QuerySet[Any]:
        """`rows` by one filter; a value that cannot be one of the column's is refused by name."""
        try:
            return rows.filter(**{lookup: self.filter_value(name, text.replace("\x00", "\ufffd"))})
        except (ValueError, TypeError, ValidationError) as error:
            raise MarketError(
                "invalid_request", f"{name} is {text!r}", {f"/{name}": "no value of this kind"}
            ) from error

    def filter_value(self, name: str, text: str) -> Any:  # noqa: ARG002
        """Prefixed ids are turned into primary keys; the rest is compared as text."""
        head, _, tail = text.rpartition("_")
        if len(tail) == 12 and len(head) == 3 and (pk := ids.decode(head, text)):
            return pk
        return text

    def read(self, shape: type[serializers.Serializer], **options: Any) -> dict[str, Any]:
        """The validated body."""
        body = shape(data=self.request.data, **options)
        body.is_valid(raise_exception=True)
        return body.validated_data

    def write(self, effect: Callable[[], Response]) -> Response:
        """Run a write idempotently, in one transaction."""
        return idempotency.once(self.request, effect)
