"""What the running month has come to for the organizations that set a budget: billed lines and what an invoice closed now would say."""

import logging
from datetime import datetime
from time import monotonic
from typing import Final

from django.db.models import F

from billing import invoices
from billing.core import budgets, metering, rating
from billing.models import Invoice, InvoiceLine
from marketplace.models import Budget, Organization
from marketplace.services import spending

log = logging.getLogger(__name__)
ROUND_S: Final = 45.0  # of a minute


def measure_all(now: datetime) -> int:
    """Measures what there is time for in ROUND_S, the longest unmeasured first, and tells the steps reached; returns how many were
    told. Who cannot be rated keeps the last measurement.
    """
    told, began = 0, monotonic()
    rows = Budget.objects.exclude(monthly_minor=None).order_by(F("measured_at").asc(nulls_first=True), "pk")
    for n, row in enumerate(rows.select_related("organization")):
        if n and monotonic() - began > ROUND_S:
            break
        try:
            told += bool(measure(row.organization, now=now))
        except Exception:  # the others are measured
            log.exception("the month of %s cannot be measured", row.organization.public_id)
    return told


def measure(organization: Organization, *, now: datetime) -> int:
    """The step newly reached by what the month has come to, 0 for none (`spending.record_spend`)."""
    spent = month_spent(organization, now=now)
    if spent is None:
        return 0
    month = metering.instant(rating.month_of(metering.floor_second(now)).start).date()
    return spending.record_spend(organization.pk, month=month, spent_minor=spent, now=now)


def month_spent(organization: Organization, *, now: datetime) -> int | None:
    """Minor units of the account's currency for the UTC month of `now`, running seconds included; None where the account cannot
    be rated: it has its case.
    """
    draft = invoices.preview(organization, now)
    if draft.error:
        return None
    month = rating.month_of(metering.floor_second(now)).start
    billed = InvoiceLine.objects.filter(invoice__organization=organization, month_s=month)
    lines = list(
        billed.exclude(invoice__state=Invoice.State.VOID).values_list("kind", "month_s", "amount_minor").order_by()
    )
    lines += [(str(row.line.kind), row.month_s, row.line.amount) for row in draft.lines]
    return budgets.spent(lines, month)
