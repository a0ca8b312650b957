"""What the forward market adds to billing: whose a resold line is, and what its seller is credited.

The buyer's commitment lines name the resale and the seller's part (`InvoiceLine.seller_minor`); the ledger owes that to the seller
(`resale`) from the moment the invoice is final, for it was paid at signing. The seller's own next invoice takes it from there as one
line for each resale: the sum of all such parts that no line of his has credited yet, so that nothing is credited twice or never.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import connection

from billing.core import metering, rating, share
from marketplace.models import Contract, Fill, Resale
from marketplace.services.commitments import owed_until


@dataclass(frozen=True, slots=True)
class Credit:
    """What is due to the seller of `resale` and on no invoice of his yet: minor units, for `quantity` milli-GPU-seconds."""

    resale: Resale
    minor: int
    quantity: int


def split(line: rating.Line, fill: Fill, contract: Contract) -> share.Resold:
    """A commitment line of a buyer: the seller's for as long as he owes the operator for these hours, the operator's then."""
    assert fill.resale is not None
    seller = fill.resale.contract
    owes = metering.floor_second(owed_until(seller, fill))
    start = max(line.span.start, metering.floor_second(fill.starts_at))
    end = min(line.span.end, metering.floor_second(fill.ends_at))
    return share.split_resold(
        line.amount, max(0, min(end, owes) - start), max(0, end - max(start, owes)), contract.fee_permille,
        fill.resale.fee_permille,
    )  # fmt: skip


def due(organizations: Collection[int] | Mapping[int, Any]) -> dict[int, list[Credit]]:
    """What these organizations are to be credited, per organization."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT l.resale_id, SUM(l.seller_minor), SUM(CASE l.kind WHEN 'resale' THEN -l.quantity ELSE l.quantity END)"
            " FROM billing_invoiceline l JOIN billing_invoice i ON i.id = l.invoice_id"
            " JOIN marketplace_resale x ON x.id = l.resale_id"
            " WHERE x.organization_id = ANY(%s) AND i.state NOT IN ('draft', 'void') GROUP BY 1 HAVING SUM(l.seller_minor) <> 0",
            [list(organizations)],
        )
        open_ = {pk: (int(minor), int(quantity)) for pk, minor, quantity in cursor.fetchall()}
    found: dict[int, list[Credit]] = defaultdict(list)
    for resale in Resale.objects.filter(pk__in=open_).select_related("contract__gpu_model").order_by("pk"):
        found[resale.organization_id].append(Credit(resale, *open_[resale.pk]))
    return found


def words(resale: Resale) -> str:
    """As the seller's invoice says it."""
    fee = f"{resale.fee_permille / 10:g} %"
    return f"sold on ({resale.public_id}), credited less a fee of {fee}"
