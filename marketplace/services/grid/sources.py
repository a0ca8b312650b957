"""The rows of grid sources: added, changed, removed; every change in the audit trail, secrets sealed."""

from datetime import datetime
from typing import Any

from django.db import IntegrityError, transaction

from marketplace.errors import MarketError
from marketplace.models import Curtailment, GridSource, PowerNode
from marketplace.services import audit, curtailments, outbound, secrets
from marketplace.tenancy import Actor

COMMON = ("name", "enabled", "cap_w", "pays_uusd_mwh", "stale_after_s", "stale_policy")
FIELDS: dict[str, tuple[str, ...]] = {
    "price": ("strike_uusd_mwh", "resume_uusd_mwh", "urgent_uusd_mwh", "windows", "resume_windows", "zone"),
    "frequency": ("trip_mhz", "back_mhz", "hold_s"),
    "openadr3": (
        "url",
        "token_url",
        "client_id",
        "program",
        "ven_name",
        "poll_s",
        "strike_uusd_mwh",
        "resume_uusd_mwh",
    ),
}
NEEDED: dict[str, tuple[str, ...]] = {
    "price": ("strike_uusd_mwh", "resume_uusd_mwh"),
    "frequency": ("trip_mhz", "back_mhz"),
    "openadr3": ("url", "ven_name"),
}


def add(actor: Actor, node: PowerNode, *, kind: str, now: datetime, secret: str = "", **values: Any) -> GridSource:
    """A source for `node` and what hangs below it. MarketError names every field that is missing or wrong."""
    row = GridSource(site_id=node.site_id, node=node, kind=kind, created_by=actor.label[:120], created_at=now)
    with transaction.atomic():
        _write(row, values, secret)
        audit.record(
            actor, "grid_source.added", row.public_id, now=now, organization_id=row.site.organization_id,
            after={"kind": kind, "node": node.name, **_told(values, secret)},
        )  # fmt: skip
    return row


def update(actor: Actor, row: GridSource, *, now: datetime, secret: str = "", **values: Any) -> GridSource:
    """Change it. One that is switched off calls nobody any more; what it has called ends now."""
    with transaction.atomic():
        row = (
            GridSource.objects.select_for_update(no_key=True, of=("self",))
            .select_related("site", "node")
            .get(pk=row.pk)
        )
        before = {name: getattr(row, name) for name in values}
        _write(row, values, secret)
        if not row.enabled:
            _end_calls(actor, row, now)
        audit.record(
            actor, "grid_source.changed", row.public_id, now=now, organization_id=row.site.organization_id,
            before=_told(before, ""), after=_told(values, secret),
        )  # fmt: skip
    return row


def remove(actor: Actor, row: GridSource, *, now: datetime) -> None:
    """Its calls end now and stay on record."""
    with transaction.atomic():
        _end_calls(actor, row, now)
        audit.record(actor, "grid_source.removed", row.public_id, now=now, organization_id=row.site.organization_id)
        row.delete()


def _end_calls(actor: Actor, row: GridSource, now: datetime) -> None:
    for call in Curtailment.objects.filter(origin=row, state__in=curtailments.OPEN).order_by("pk"):
        curtailments.cancel(actor, call, now=now)


def _write(row: GridSource, values: dict[str, Any], secret: str) -> None:
    known = (*COMMON, *FIELDS[row.kind])
    wrong = {f"/{name}": f"a {row.kind} source has no such field" for name in values if name not in known}
    for name, value in values.items():
        if name in known:
            setattr(row, name, value)
    wrong |= {f"/{name}": "is needed" for name in NEEDED[row.kind] if not getattr(row, name)}
    if not row.name:
        wrong["/name"] = "is needed"
    if row.cap_w is None or not 0 <= row.cap_w <= row.node.cap_w:
        wrong["/cap_w"] = f"0 to {row.node.cap_w} W, what the node carries"
    if row.strike_uusd_mwh and (row.resume_uusd_mwh or row.strike_uusd_mwh) > row.strike_uusd_mwh:
        wrong["/resume_uusd_mwh"] = "at most the strike price"
    if row.urgent_uusd_mwh and row.strike_uusd_mwh and row.urgent_uusd_mwh < row.strike_uusd_mwh:
        wrong["/urgent_uusd_mwh"] = "at least the strike price"
    if row.trip_mhz and row.back_mhz and row.back_mhz < row.trip_mhz:
        wrong["/back_mhz"] = "at least trip_mhz"
    for name in ("windows", "resume_windows"):
        if not 1 <= getattr(row, name) <= 96:
            wrong[f"/{name}"] = "1 to 96"
    for name in ("url", "token_url"):
        if getattr(row, name) and (why := outbound.refused(getattr(row, name))):
            wrong[f"/{name}"] = why
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k.strip('/')}: {v}" for k, v in wrong.items()), wrong)
    if secret:
        row.secret = secrets.seal({"client_secret": secret})
    try:
        with transaction.atomic():
            row.save()
    except IntegrityError as error:
        raise MarketError(
            "conflict", f"The site has a source named {row.name!r}; choose another.", {"/name": "is taken"}
        ) from error


def _told(values: dict[str, Any], secret: str) -> dict[str, Any]:
    return {**values, **({"secret": "new"} if secret else {})}
