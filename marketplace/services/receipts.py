"""What pools paid for hashing and grids for demand response: by API or CSV file, once by source and reference, then in the P&L."""

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Receipt, Site
from marketplace.outbox import emit
from marketplace.services import audit, profit
from marketplace.tenancy import Actor

MAX_PERIOD = timedelta(days=32)
MAX_ROWS = 1000
COLUMNS = ("kind", "source", "reference", "start", "end", "amount_usd", "amount_sat")


@transaction.atomic
def receive(site: Site, *, actor: Actor, now: datetime, **fields: Any) -> Receipt:
    """Writes down a receipt; the same again is answered as before, other figures under its source and reference are refused."""
    acquire((Lock.PROFIT, site.pk))
    fields = {"amount_sat": None, **fields}
    start, end = fields["start"], fields["end"]
    if not start < end <= start + MAX_PERIOD or start.microsecond or end.microsecond:
        raise MarketError(
            "invalid_request",
            f"A receipt is for whole seconds, {MAX_PERIOD.days} days at most.",
            {"/end": "after start"},
        )
    if end > now:
        raise MarketError("invalid_request", "What was paid is for a time that is over.", {"/end": "in the future"})
    known: Receipt | None = Receipt.objects.filter(
        site=site, source=fields["source"], reference=fields["reference"]
    ).first()
    if known is not None:
        if all(getattr(known, name) == value for name, value in fields.items()):
            return known
        raise MarketError(
            "conflict",
            f"{known.source} {known.reference} is on record with other figures ({known.public_id}); nothing was changed.",
            {"/reference": "taken"},
        )
    row: Receipt = Receipt.objects.create(site=site, created_by=actor.label[:120], created_at=now, **fields)
    said = {"kind": row.kind, "source": row.source, "reference": row.reference, "amount_microusd": row.amount_microusd}
    audit.record(actor, "receipt.received", row.public_id, now=now, organization_id=site.organization_id, after=said)
    emit(profit.TOPIC, key=row.public_id, payload={"site": site.pk, "start": start.isoformat(), "end": end.isoformat()})
    return row


@transaction.atomic
def take(site: Site, text: str, *, actor: Actor, now: datetime) -> list[Receipt]:
    """A CSV file of COLUMNS (amounts in USD), all or nothing; lines that are known stay as they are. Names the line that it refuses."""
    table = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    missing = set(COLUMNS) - {"amount_sat"} - set(table.fieldnames or ())
    if missing or set(table.fieldnames or ()) - set(COLUMNS):
        raise MarketError("invalid_request", f"The first line must name {', '.join(COLUMNS)}.", {"/csv": "columns"})
    made: list[Receipt] = []
    for row in table:
        at = f"/csv/{table.line_num}"
        if len(made) == MAX_ROWS:
            raise MarketError("invalid_request", f"{MAX_ROWS} lines at most.", {at: "too many"})
        try:
            made.append(receive(site, actor=actor, now=now, **_fields(row)))
        except (InvalidOperation, TypeError, ValueError) as error:
            raise MarketError("invalid_request", f"Line {table.line_num}: {error}.", {at: "cannot be read"}) from error
        except MarketError as error:
            raise MarketError(error.code, f"Line {table.line_num}: {error.detail}", {at: "refused"}) from error
    return made


def _fields(row: dict[str, str]) -> dict[str, Any]:
    if row["kind"] not in Receipt.Kind.values:
        raise ValueError(f"kind is {row['kind']!r}, none of {', '.join(Receipt.Kind.values)}")
    amount = Decimal(row["amount_usd"]) * 1_000_000
    if not amount.is_finite() or amount != int(amount) or not 0 <= amount <= 10**15:
        raise ValueError(f"amount_usd is {row['amount_usd']}")
    start, end = (datetime.fromisoformat(row[name]) for name in ("start", "end"))
    sat = row.get("amount_sat")
    source, reference = row["source"].strip(), row["reference"].strip()
    if not (0 < len(source) <= 40 and 0 < len(reference) <= 80):
        raise ValueError("source and reference must be given, 40 and 80 characters at most")
    return {
        "kind": row["kind"], "source": source, "reference": reference, "amount_microusd": int(amount),
        "amount_sat": int(sat) if sat else None, "start": _utc(start), "end": _utc(end),
    }  # fmt: skip


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)
