"""What an organization allows itself to spend: an hourly rate and a month's budget. The only writer of `Budget`.

Who is over waits, nothing that runs is stopped for it. New work paid by use (on demand, spot) is not placed where it would take the
running rate beyond the hourly limit, or once the month's budget is used up; work under a reserved or flexible contract costs
nothing more than the contract does, and is placed. What those contracts cost counts towards the month.
"""

from datetime import date, datetime
from typing import Final

from django.db import transaction

from billing.core import budgets
from billing.core.money import format_minor
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Budget, Organization
from marketplace.outbox import emit
from marketplace.services import audit, mails
from marketplace.services.mails import Letter
from marketplace.tenancy import SYSTEM, Actor

ALERT: Final = "marketplace.budget_alert"
MOST_MINOR: Final = 10**12
FIELDS: Final = ("hourly_minor", "monthly_minor")


def of(organization: Organization) -> Budget:
    """The organization's budget; one without limits, not saved, where none was ever set."""
    found = Budget.objects.owned_by(organization).first()
    return found or Budget(organization=organization, changed_at=organization.created_at)


@transaction.atomic
def set_limits(actor: Actor, organization: Organization, *, now: datetime, **limits: int | None) -> Budget:
    """Set `hourly_minor` and `monthly_minor`, minor units, None for no limit; what is not named stays.

    Steps that the month's spend has reached already stay told; those that a larger budget puts ahead again are told once more.
    """
    assert set(limits) <= set(FIELDS), limits
    for name, value in limits.items():
        if value is not None and not 0 <= value <= MOST_MINOR:
            raise MarketError("invalid_request", f"{name} is 0 to {MOST_MINOR}, or null.", {f"/{name}": "out of range"})
    acquire((Lock.ORG, organization.pk))
    row, _ = Budget.objects.get_or_create(organization=organization, defaults={"changed_at": now})
    before = {name: getattr(row, name) for name in FIELDS}
    if before == before | limits:
        return row
    for name, value in limits.items():
        setattr(row, name, value)
    row.told_percent = min(row.told_percent, percent(row))
    row.changed_at = now
    row.save(update_fields=[*FIELDS, "told_percent", "changed_at"])
    audit.record(
        actor, "budget.changed", organization.public_id, now=now, organization_id=organization.pk,
        before=before, after={name: getattr(row, name) for name in FIELDS},
    )  # fmt: skip
    return row


def percent(row: Budget) -> int:
    """The step that the measured spend has reached, 0 without a monthly budget."""
    return 0 if row.monthly_minor is None else budgets.reached(row.spent_minor, row.monthly_minor)


@transaction.atomic
def record_spend(organization_id: int, *, month: date, spent_minor: int, now: datetime) -> int:
    """Written by billing: what the month has come to. A step that is reached for the first time in it is told, by an event and
    by mail; returns that step, 0 when none is new. Of two at once the second finds it told; an older measurement changes nothing.
    """
    row = Budget.objects.select_for_update(no_key=True).filter(organization_id=organization_id).first()
    if row is None or row.monthly_minor is None or (row.measured_at is not None and row.measured_at > now):
        return 0
    told = row.told_percent if row.month == month else 0
    row.month, row.spent_minor, row.measured_at = month, spent_minor, now
    step = percent(row)
    row.told_percent = max(told, step)
    row.save(update_fields=["month", "spent_minor", "measured_at", "told_percent"])
    if step <= told:
        return 0
    organization = row.organization
    audit.record(
        SYSTEM, "budget.reached", organization.public_id, now=now, organization_id=organization_id,
        after={"percent": step, "month": f"{month:%Y-%m}", "spent_minor": spent_minor, "monthly_minor": row.monthly_minor},
    )  # fmt: skip
    emit(ALERT, payload={"organization": organization_id, "month": month.isoformat(), "percent": step})
    return step


def alert(organization_id: int, month: date, step: int) -> int:
    """The mail of a step to owners and billing people, by the figures of now; returns how many were sent. None once it is untrue, or
    a higher step was told.
    """
    row = Budget.objects.select_related("organization").filter(organization_id=organization_id).first()
    if (
        row is None
        or row.monthly_minor is None
        or row.month != month
        or (percent(row) < step or row.told_percent > step)
    ):
        return 0
    return mails.send(mails.addresses(organization_id, ("owner", "billing")), letter(row, step))


def letter(row: Budget, step: int) -> Letter:
    currency, name = row.organization.currency, row.organization.name
    spent, budget = format_minor(row.spent_minor, currency), format_minor(row.monthly_minor or 0, currency)
    ahead = (
        "New jobs on demand and on spot wait from now on, until the budget is raised or the month ends. What runs goes on, and costs."
        if step >= 100
        else "Nothing waits for it yet: once all of it is used, new jobs on demand and on spot wait. What runs is never stopped for it."
    )
    head = "is used up" if step >= 100 else f"is {step} % used"
    return Letter(
        f"The budget of {name} for {row.month:%B %Y} {head}",
        (f"{spent} of {budget} are spent in {row.month:%B %Y}, running work included.", ahead),
        (("Spent", spent), ("Budget", budget)),
        "/billing/budget",
        "Look at the budget",
        f"You get this as one of the people of {name} who answer for its spending.",
    )
