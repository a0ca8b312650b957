"""What a contract says: its order form, which never changes, and the rule by which it may end early.

Early termination, as the terms of every contract say:
  on_demand, spot     at once: waiting jobs are cancelled, running ones drain with their checkpoint grace and are billed until then.
  reserved, flexible  a quarter of the time that is left stays due, at least 24 hours, never past the agreed end. The contract can
                      be used until then; `ends_at` says when that is, and the capacity after it is free at once. What was sold
                      on stays due to the end of its own window.
  bought from a holder  paid whole at signing, so there is no early end: it can be sold on.

In a grid emergency a contract whose listing said so (`emergency_notice_s`) gives way, last of all: after hashing, spot and flexible
work, and after GPUs were held lower; not before its notice, with checkpoint grace. Reserved time that such a call takes is not charged.
All others stay. Whose GPUs a call holds lower is credited the share of their power that is withheld (docs/adr/0023).

Maintenance of GPUs that a reserved or flexible contract holds: where no others stand in, announced work may take them for
`maintenance_hours_per_month` hours of a UTC month; what it takes beyond that, and all that emergencies and late extensions take, is
not charged. (A contract from before this rule bears none.)

What is due at signing (`upfront_minor`, a share of the commitment) is drawn down by the first months' commitment; what is left
when the contract is over comes back with the next invoice.
"""

from datetime import datetime, timedelta
from typing import Any

from marketplace.models import Amendment, Contract, Kind, Quote
from marketplace.services import quotes
from marketplace.services.availability import HOLDING, seconds

STAYS_DUE = 4  # a reserved contract that is left early owes one part in this many of the time left
BOUGHT = "not_before_its_end"  # the rule of what was bought from another customer
STAYS_DUE_AT_LEAST = timedelta(hours=24)
PRICE_NOTICE_DAYS = 30  # between an operator's proposal of a higher price and the day on which it would count
MAINTENANCE_NOTICE_DAYS = 7  # before work touches GPUs that a contract holds; what comes sooner is an emergency
DEFAULT_AFTER_DAYS = 28  # an invoice that stays unpaid so long ends the contracts


def order_form(quote: Quote, starts_at: datetime) -> dict[str, Any]:
    """What was agreed, whole, from what the quote froze: never changed afterwards, also not by an early termination."""
    total = None
    if quote.ends_at is not None and quote.total_minor is not None:
        total = quotes.total_minor(quote.gpu_count, starts_at, quote.ends_at, quote.price, quote.currency)
    frozen = quote.terms
    of_listing = (
        "title",
        "operator",
        "site",
        "region",
        "country",
        "gpu_model",
        "interconnect",
        "fabric_gbps",
        "runtime",
    )
    return {
        "quote": quote.public_id,
        "listing": quote.listing.public_id,
        "listing_version": quote.listing_version,
        **{name: frozen[name] for name in of_listing},
        "host": frozen.get("host"),
        "kind": quote.kind,
        "gpu_count": quote.gpu_count,
        "level": quote.level,
        "starts_at": starts_at.isoformat(),
        "ends_at": quote.ends_at.isoformat() if quote.ends_at else None,
        "price": quote.price,
        "overage_price": quote.overage_price,
        "limit_price": quote.limit_price,
        "currency": quote.currency,
        "fee_permille": quote.fee_permille,
        "total_minor": total,
        "upfront_permille": frozen.get("upfront_permille", 0) if quote.kind in HOLDING else 0,
        "price_term_hours": frozen.get("price_term_hours", 0),
        "upfront_minor": quotes.upfront_minor(total, frozen.get("upfront_permille", 0), quote.currency),
        "max_term_days": frozen["max_term_days"],
        "eviction_notice_s": frozen["eviction_notice_s"],
        "flexible_hours_per_month": frozen["flexible_hours_per_month"] if quote.kind == Kind.FLEXIBLE else 0,
        "flexible_notice_s": frozen["flexible_notice_s"],
        "grid_emergency": {"rule": "leaves_last", "notice_s": notice_s, "time_taken": "not_charged"}
        if (notice_s := emergency_notice_s(quote)) is not None
        else {"rule": "stays"}
        if quote.kind != Kind.SPOT
        else None,
        "held_lower": {"rule": "credited_by_power_withheld"},
        "early_termination": {"rule": "at_once"}
        if quote.kind not in HOLDING
        else {"rule": BOUGHT}
        if quote.listing.is_resale
        else {
            "rule": "part_of_the_time_left",
            "part": f"1/{STAYS_DUE}",
            "at_least_hours": STAYS_DUE_AT_LEAST // timedelta(hours=1),
        },
        "maintenance": {
            "rule": "announced",
            "notice_days": MAINTENANCE_NOTICE_DAYS,
            "hours_per_month": frozen.get("maintenance_hours_per_month", 0),
        }
        if quote.kind in HOLDING
        else None,
        "price_rise": {"rule": "with_consent", "notice_days": PRICE_NOTICE_DAYS} if quote.ends_at is None else None,
        "default": {"rule": "ended_when_unpaid", "after_days": DEFAULT_AFTER_DAYS},
    }


def emergency_notice_s(quote: Quote) -> int | None:
    """Of the contract to be; None: it names no emergency in which it leaves. Spot has its own notice always."""
    return None if quote.kind == Kind.SPOT else quote.terms.get("emergency_notice_s")


def termination(contract: Contract, now: datetime) -> datetime:
    """When the contract would be over if it were terminated now, by the rule at the top of this module."""
    if contract.kind not in HOLDING or contract.ends_at is None:
        return now
    if contract.terms.get("early_termination", {}).get("rule") == BOUGHT:
        return contract.ends_at
    begin = max(contract.starts_at, now)
    due = max((contract.ends_at - begin) / STAYS_DUE, STAYS_DUE_AT_LEAST)
    at = begin + due
    at += timedelta(seconds=-seconds(at) % 60, microseconds=-at.microsecond)
    return min(at.replace(microsecond=0), contract.ends_at)


def commitment_minor(contract: Contract, starts_at: datetime, ends_at: datetime) -> int:
    """What a reserved or flexible contract commits to in [starts_at, ends_at), minor units, GPUs that joined later included."""
    added = list(contract.amendments.filter(kind=Amendment.Kind.RESIZE, state=Amendment.State.ACCEPTED))
    first = contract.gpu_count - sum(row.added_gpus for row in added)
    parts = [(first, contract.starts_at, contract.price), *((a.added_gpus, a.effective_at, a.price) for a in added)]
    return sum(
        quotes.total_minor(gpus, max(begins, starts_at), ends_at, price or 0, contract.currency)
        for gpus, begins, price in parts
        if max(begins, starts_at) < ends_at
    )
