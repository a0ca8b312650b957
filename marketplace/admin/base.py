"""What both admins' pages stand on: tenancy, permission by role, buttons that call services, refusals shown as messages.

Nothing here writes a row: a form's `write` and a `Move`'s `run` call a service, in one transaction; a MarketError takes all
of it back and is shown where the person can correct it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from django import forms
from django.contrib.admin.utils import get_fields_from_path, unquote
from django.core.exceptions import FieldDoesNotExist, PermissionDenied
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter

from marketplace.admin.moves import MovesMixin, show_refusal
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import AuditEvent
from marketplace.tenancy import Actor

SEALED: Final = frozenset(
    {"get_queryset", "get_object", "formfield_for_foreignkey", "formfield_for_manytomany", "rows_of"}
)


class OwnRelatedFilter(RelatedDropdownFilter):
    """A filter by a related row offers only rows that its page may show."""

    def field_choices(self, field: Any, request: HttpRequest, model_admin: Any) -> list[tuple[Any, str]]:
        rows = model_admin.rows_of(field.remote_field.model, request)
        return [(row.pk, str(row)) for row in rows.order_by("pk")[:500]]


class RefusedMixin:
    """A form that is shown again with what a service refused."""

    refusal: ClassVar[MarketError]

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        show_refusal(self, self.refusal)  # type: ignore[arg-type]


class Desk(MovesMixin, ModelAdmin):
    """One noun's pages. `reads` and `writes` are actions of tenancy.ACTIONS; without `writes` nothing can be edited."""

    reads: ClassVar[str] = "sites:read"
    writes: ClassVar[str | None] = None
    adds: ClassVar[bool] = False
    above: ClassVar[str | None] = None  # a template shown above the form of an existing row
    list_per_page = 50
    list_max_show_all = 500
    list_filter_submit = True
    compressed_fields = False
    show_full_result_count = False
    change_form_outer_before_template = "desk/above.html"
    object_history_template = "desk/history.html"

    # --- whose rows
    def rows_of(self, model: type[Model], request: HttpRequest) -> QuerySet[Any]:
        """The rows that these pages may show; an operator's own, unless a subclass is for our own people."""
        return own(model, self.actor(request))

    def actor(self, request: HttpRequest) -> Actor:
        found: Actor = self.admin_site.actor_of(request)
        return found

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = self.rows_of(self.model, request)
        ordering = self.get_ordering(request)
        return rows.order_by(*ordering) if ordering else rows

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """The row, where it is one of `rows_of`; anything else is 404."""
        found = super().get_object(request, object_id, from_field)
        if found is None:
            raise Http404
        return found

    def formfield_for_foreignkey(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        kwargs["queryset"] = self.rows_of(db_field.remote_field.model, request).order_by("pk")
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def formfield_for_manytomany(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        kwargs["queryset"] = self.rows_of(db_field.remote_field.model, request).order_by("pk")
        return super().formfield_for_manytomany(db_field, request, **kwargs)

    def get_list_filter(self, request: HttpRequest) -> Sequence[Any]:
        return [self._filter(entry) for entry in super().get_list_filter(request)]

    def _filter(self, entry: Any) -> Any:
        """A name becomes a drop-down; one by a related row is always narrowed."""
        if not isinstance(entry, str):
            return entry
        try:
            field = get_fields_from_path(self.model, entry)[-1]
        except FieldDoesNotExist:
            return entry
        if field.is_relation:
            return entry, OwnRelatedFilter
        return (entry, ChoicesDropdownFilter) if field.choices else entry

    # --- who may
    def has_module_permission(self, request: HttpRequest) -> bool:
        return self.has_view_permission(request)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return self.actor(request).may(self.reads)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return self.writes is not None and self.actor(request).may(self.writes)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return self.adds and self.writes is not None and self.actor(request).may(self.writes)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """What is only read stands three beside each other."""
        if self.fieldsets or obj is None or self.has_change_permission(request, obj):
            return super().get_fieldsets(request, obj)
        names = list(self.get_fields(request, obj))
        return [(None, {"fields": [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]})]

    # --- writing: through a service, or not at all
    def write(self, request: HttpRequest, form: Any, row: Any | None) -> Model:  # noqa: ARG002
        """Call the service that makes (`row` is None) or changes the row; returns it. `form` is valid."""
        raise PermissionDenied

    def save_form(self, request: HttpRequest, form: Any, change: bool) -> Any:  # noqa: ARG002
        return form.instance

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        fresh = self.get_object(request, str(obj.pk)) if change else None  # the form has changed `obj`
        written = self.write(request, form, fresh)
        obj.pk = written.pk
        obj.refresh_from_db()

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """The service has written all of it."""

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> None:
        """The service has written the audit trail."""

    log_change = log_addition

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        refusal = getattr(request, "refusal", None)
        if refusal is None:
            return form
        return type(form.__name__, (RefusedMixin, form), {"refusal": refusal})

    def changeform_view(
        self, request: HttpRequest, object_id: str | None = None, form_url: str = "", extra_context: Any = None
    ) -> Any:
        context = {**self.page_context(request, object_id), **(extra_context or {})}
        try:
            return super().changeform_view(request, object_id, form_url, context)
        except MarketError as error:  # everything is rolled back; show the form again and say why
            request.refusal = error  # type: ignore[attr-defined]
            return super().changeform_view(request, object_id, form_url, context)

    def page_context(self, request: HttpRequest, object_id: str | None) -> dict[str, Any]:
        if object_id is None:
            return {}
        row = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, row):
            raise PermissionDenied
        return {"buttons": self.buttons(request, row), "page_above": self.above, **self.more(request, row)}

    def more(self, request: HttpRequest, row: Any) -> dict[str, Any]:  # noqa: ARG002
        """What the `above` template needs."""
        return {}

    # --- history: the audit trail of this row
    def history_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        row = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, row):
            raise PermissionDenied
        events = self.rows_of(AuditEvent, request).filter(subject=getattr(row, "public_id", "")).order_by("-id")[:100]
        may = self.actor(request).may("audit:read")
        context = {
            "title": f"History of {row}",
            "original": row,
            "object": row,
            "events": events if may else [],
            "may": may,
            **(extra_context or {}),
        }
        return self.render(request, self.object_history_template, context)


class TenantAdmin(Desk):
    """An operator's pages: rows, choices, autocomplete, filters and history are those of its own organization.

    A subclass that overrides how rows are found is refused when it is defined.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if broken := SEALED & set(cls.__dict__):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(sorted(broken))}: tenancy is applied in TenantAdmin alone"
            )


class StaffAdmin(Desk):
    """Our own people's pages: all rows; nothing is edited, and what can be done is a Move."""

    def rows_of(self, model: type[Model], request: HttpRequest) -> QuerySet[Any]:  # noqa: ARG002
        return model._default_manager.all()  # noqa: SLF001 - a model's documented default manager

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return self.actor(request).kind == "staff"

    def may_move(self, request: HttpRequest, move: Any) -> bool:  # noqa: ARG002
        return self.actor(request).kind == "staff"

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:  # noqa: ARG002
        if self.fields:
            return list(self.fields)
        return [f.name for f in self.model._meta.fields if f.name not in {"id", "secrets", "password", "digest", "env"}]


class RowsInline(TabularInline):
    """Rows below their parent, to read."""

    extra = 0
    can_delete = False
    show_change_link = False
    hide_title = True
    per_page = 50
    ordering = ("pk",)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:  # noqa: ARG002
        return self.fields

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return True  # the parent's page has decided

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    has_change_permission = has_delete_permission = has_add_permission


class DeskForm(forms.ModelForm):
    """A model form whose uniqueness and state are the service's business."""

    def validate_unique(self) -> None:
        """The service says it in words."""

    def validate_constraints(self) -> None:
        """The service says it in words."""
