"""Buttons. A Move is a service call with a confirmation page: GET asks, POST does it and goes back to the row.

The same Move can be done to many rows from the list; then all happen in one transaction, or none.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from django import forms
from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from unfold import widgets

from marketplace.errors import MarketError
from marketplace.tenancy import Actor

MOST_ROWS = 500  # of one action in the list


@dataclass(frozen=True)
class Call:
    """What a Move is given: who, the row, the form's values, and the time."""

    request: HttpRequest
    actor: Actor
    row: Any
    values: dict[str, Any]
    now: datetime


def blank(row: Any) -> dict[str, Any]:  # noqa: ARG001
    return {}


def always(row: Any) -> bool:  # noqa: ARG001
    return True


def nothing(row: Any) -> str:  # noqa: ARG001
    return ""


@dataclass(frozen=True)
class Move:
    """`run` calls the service and returns what to say, or an answer of its own (then no message is shown).

    `action`: of tenancy.ACTIONS. `possible`: whether the row stands so that it can be done now; `barred`: why it cannot all the same, and
    what clears it, said where the button would be. `atomic=False`: it calls a part
    outside, which must not happen inside a transaction.
    """

    name: str
    label: str
    question: str
    action: str
    run: Callable[[Call], str | HttpResponse]
    form: type[forms.Form] = forms.Form
    initial: Callable[[Any], dict[str, Any]] = blank  # what the form of one row begins with
    possible: Callable[[Any], bool] = always
    barred: Callable[[Any], str] = nothing
    icon: str = "play_arrow"
    danger: bool = False
    bulk: bool = False
    atomic: bool = True


def show_refusal(form: forms.BaseForm, error: MarketError) -> None:
    """Put what was refused beside the fields that it names, the rest on top."""
    elsewhere = []
    for pointer, message in error.fields.items():
        name = pointer.strip("/").split("/")[0]
        if name in form.fields:
            form.add_error(name, message)
        else:
            elsewhere.append(f"{name.replace('_', ' ')}: {message}")
    said = [str(error)] if elsewhere or not error.fields else [error.kind.title + "."]
    form.add_error(None, [*said, *(e for e in elsewhere if e not in str(error))])


def dress(form: forms.BaseForm) -> forms.BaseForm:
    """Give a plain form's fields the looks of the rest."""
    for field in form.fields.values():
        kind = type(field.widget)
        by_kind: dict[Any, list[str]] = {
            forms.Textarea: widgets.TEXTAREA_CLASSES,
            forms.Select: widgets.SELECT_CLASSES,
            forms.CheckboxInput: widgets.CHECKBOX_CLASSES,
        }
        if kind is not forms.ClearableFileInput:
            field.widget.attrs["class"] = " ".join(by_kind.get(kind, widgets.INPUT_CLASSES))
    return form


class MovesMixin:
    """Gives a ModelAdmin its `moves`: buttons on the row's page, and actions of the list where they are `bulk`."""

    moves: ClassVar[tuple[Move, ...]] = ()

    def may_move(self, request: HttpRequest, move: Move) -> bool:
        return self.actor(request).may(move.action)  # type: ignore[attr-defined]

    def _name(self, what: str) -> str:
        opts = self.opts  # type: ignore[attr-defined]
        return f"{opts.app_label}_{opts.model_name}_{what}"

    def get_urls(self) -> list[URLPattern]:
        def view(move: Move) -> Any:
            return lambda request, object_id: self.move_view(request, object_id, move)

        wrap = self.admin_site.admin_view  # type: ignore[attr-defined]
        return [
            path(f"<path:object_id>/{move.name}/", wrap(view(move)), name=self._name(move.name)) for move in self.moves
        ] + super().get_urls()  # type: ignore[misc]

    def url_of(self, what: str, row: Any | None = None) -> str:
        name = f"{self.admin_site.name}:{self._name(what)}"  # type: ignore[attr-defined]
        return reverse(name, args=[] if row is None else [row.pk])

    def buttons(self, request: HttpRequest, row: Any) -> list[dict[str, Any]]:
        return [
            {
                "url": self.url_of(move.name, row), "label": move.label, "icon": move.icon, "danger": move.danger,
                "barred": move.barred(row),
            }
            for move in self.moves
            if self.may_move(request, move) and move.possible(row)
        ]  # fmt: skip

    # --- one row
    def move_view(self, request: HttpRequest, object_id: str, move: Move) -> HttpResponse:
        row = self.get_object(request, unquote(object_id))  # type: ignore[attr-defined]
        if not self.may_move(request, move):
            raise PermissionDenied
        back = self.url_of("change", row)
        if request.method != "POST" and (not move.possible(row) or move.barred(row)):
            messages.warning(request, f"{move.label}: {move.barred(row) or 'not possible now.'}")
            return HttpResponseRedirect(back)
        form = dress(move.form(request.POST if request.method == "POST" else None, initial=move.initial(row)))
        if request.method == "POST" and form.is_valid():
            try:
                said = self._do(request, move, [row], form.cleaned_data)
            except MarketError as error:
                show_refusal(form, error)
            else:
                if isinstance(said, HttpResponse):
                    return said
                messages.success(request, said)
                return HttpResponseRedirect(back)
        return self._ask(request, move, form, [row], back)

    def _do(self, request: HttpRequest, move: Move, rows: Iterable[Any], values: dict[str, Any]) -> str | HttpResponse:
        now, actor = timezone.now(), self.actor(request)  # type: ignore[attr-defined]
        said: str | HttpResponse = ""
        with transaction.atomic() if move.atomic else nullcontext():
            for row in rows:
                said = move.run(Call(request, actor, row, values, now))
        return said

    def _ask(
        self, request: HttpRequest, move: Move, form: forms.BaseForm, rows: list[Any], back: str, bulk: bool = False
    ) -> HttpResponse:
        context = {
            "title": move.label,
            "move": move,
            "form": form,
            "rows": rows,
            "row": rows[0] if not bulk else None,
            "back": back,
            "bulk": bulk,
            "checkbox": ACTION_CHECKBOX_NAME,
        }
        return self.render(request, "desk/move.html", context)

    def render(self, request: HttpRequest, template: str, context: dict[str, Any]) -> TemplateResponse:
        """A page of this noun's own: with the site's frame, whose links lead to this site and not to the other."""
        request.current_app = self.admin_site.name  # type: ignore[attr-defined]
        frame = self.admin_site.each_context(request)  # type: ignore[attr-defined]
        return TemplateResponse(request, template, {**frame, "opts": self.opts, **context})  # type: ignore[attr-defined]

    # --- many rows
    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        found: dict[str, Any] = super().get_actions(request)  # type: ignore[misc]
        for move in self.moves:
            if move.bulk and self.may_move(request, move):
                found[move.name] = (self._action(move), move.name, move.label)
        return found

    def _action(self, move: Move) -> Any:
        def act(_admin: Any, request: HttpRequest, chosen: QuerySet[Any]) -> HttpResponse | None:
            rows = list(chosen.order_by("pk")[: MOST_ROWS + 1])
            if len(rows) > MOST_ROWS:
                messages.error(request, f"Choose at most {MOST_ROWS} rows at a time.")
                return None
            confirmed = "confirmed" in request.POST
            form = dress(move.form(request.POST if confirmed else None))
            if confirmed and form.is_valid():
                try:
                    self._do(request, move, rows, form.cleaned_data)
                except MarketError as error:
                    show_refusal(form, error)
                else:
                    messages.success(request, f"{move.label}: done for {len(rows)}.")
                    return None
            return self._ask(request, move, form, rows, self.url_of("changelist"), bulk=True)

        return act
