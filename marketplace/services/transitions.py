"""The one way in which a state changes: a guarded UPDATE, the append-only event rows, and the caller's outbox rows, together.

`transition_many` moves all rows that still stand in an expected state; the rest are left alone and the caller sees which
moved. `transition` is the same for one row, and refuses with a clear error where it did not move.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, cast

from django.db import connection, models

from marketplace import prepared
from marketplace.errors import MarketError
from marketplace.models import Contract, ContractEvent, Job, JobEvent, Placement, PlacementEvent

_EVENTS: dict[type[models.Model], tuple[type[models.Model], str]] = {
    Job: (JobEvent, "job_id"),
    Placement: (PlacementEvent, "placement_id"),
    Contract: (ContractEvent, "contract_id"),
}


def transition_many(
    model: Any,
    ids: Iterable[int],
    *,
    expected: Collection[str],
    to: str,
    now: datetime,
    actor: str,
    reason: str = "",
    set_columns: dict[str, Any] | None = None,
    increment: Collection[str] = (),
) -> dict[int, str]:
    """Move rows of `model` (Job, Placement, Contract) from one of `expected` to `to`; returns {id: state it left}.

    Only moves that the model's TRANSITIONS allow are tried. `set_columns` is written with the state, `increment` grows by one
    with it. One statement for the rows and their events, whatever their number; must run inside the caller's transaction.
    """
    assert connection.in_atomic_block
    allowed = [state for state in expected if to in model.TRANSITIONS[state]]
    wanted = sorted(set(ids))
    if not wanted or not allowed:
        return {}
    columns = {"state": to, **(set_columns or {})}
    if "state_reason" in {f.name for f in model._meta.fields} and reason:
        columns.setdefault("state_reason", reason[: model._meta.get_field("state_reason").max_length])
    names = [model._meta.get_field(name).column for name in columns]
    table = model._meta.db_table
    sets = ", ".join([*(f'"{name}" = %s' for name in names), *(f'"{name}" = t."{name}" + 1' for name in increment)])
    event, key, room = _event_of(model)
    moved = prepared.rows(
        f"WITH before AS MATERIALIZED (SELECT id, state FROM {table} WHERE id = ANY(%s) AND state = ANY(%s)"  # noqa: S608
        " ORDER BY id FOR NO KEY UPDATE),"
        f" moved AS (UPDATE {table} AS t SET {sets} FROM before WHERE t.id = before.id RETURNING t.id, before.state),"
        f" told AS (INSERT INTO {event} ({key}, at, actor, from_state, to_state, reason)"
        " SELECT id, %s, %s, state, %s, %s FROM moved ORDER BY id)"
        " SELECT id, state FROM moved",
        [wanted, allowed, *columns.values(), now, actor[:120], to, reason[:room]],
    )
    return dict(moved)


def _event_of(model: Any) -> tuple[str, str, int | None]:
    """The table of the model's events, its key to the row, and how long a reason may be."""
    event, key = _EVENTS[model]
    return event._meta.db_table, key, cast("models.CharField[str, str]", event._meta.get_field("reason")).max_length


def transition(
    model: Any,
    pk: int,
    *,
    expected: Collection[str],
    to: str,
    now: datetime,
    actor: str,
    reason: str = "",
    set_columns: dict[str, Any] | None = None,
) -> str:
    """Move one row and return the state it left; MarketError("illegal_transition") where it stands elsewhere."""
    moved = transition_many(
        model, [pk], expected=expected, to=to, now=now, actor=actor, reason=reason, set_columns=set_columns
    )
    if pk not in moved:
        state = model.objects.filter(pk=pk).values_list("state", flat=True).first()
        raise MarketError(
            "illegal_transition",
            f"The {model._meta.verbose_name} is {state}; it can become {to} only from {', '.join(sorted(expected))}.",
        )
    return moved[pk]


def record_created(model: Any, pks: Iterable[int], *, state: str, now: datetime, actor: str, reason: str = "") -> None:
    """The first event of new rows: from nothing to `state`."""
    event, key, room = _event_of(model)
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {event} ({key}, at, actor, from_state, to_state, reason)"  # noqa: S608
            " SELECT id, %s, %s, '', %s, %s FROM unnest(%s::bigint[]) AS u(id) ORDER BY id",
            [now, actor[:120], state, reason[:room], list(pks)],
        )


def legal_actions(model: Any, state: str) -> list[str]:
    """States that can follow, sorted: what a resource shows as legal now."""
    return sorted(model.TRANSITIONS[state])
