"""Contracts, by subject. Together these modules are the only writers of Contract, Amendment and their papers.

signing     a quote is accepted; what is due at signing is waited for
amendments  a later end, more GPUs
prices      another price of an on-demand contract, with consent
ending      terminated early by its rule, over with its window, defaulted, settled when nothing runs any more
clock       what happens because time passes
healing     promised GPUs that cannot be used: others stand in
shortfalls  what cannot be used and nobody stands in for: which GPUs, from when to when
notices     what customers are told
"""

from datetime import datetime

from marketplace.errors import MarketError
from marketplace.models import Amendment
from marketplace.services.contracts import amendments, prices
from marketplace.services.contracts.clock import Ticked, clock
from marketplace.services.contracts.ending import (
    CANCELLED,
    END_JOBS,
    Leaving,
    actions,
    close_out,
    default,
    end,
    leaving,
    settle,
    terminate,
)
from marketplace.services.contracts.notices import NOTICE, sentence
from marketplace.services.contracts.notices import send as send_notice
from marketplace.services.contracts.shortfalls import missing
from marketplace.services.contracts.signing import ACCEPTED, accept, check_standing, confirm_payment
from marketplace.tenancy import Actor


def amendment_actions(row: Amendment, actor: Actor, now: datetime) -> list[str]:
    """What the actor may do with a proposal now: it is its customer's to answer."""
    mine = actor.organization_id == row.contract.organization_id
    if not mine or row.state != Amendment.State.OPEN or row.answer_by <= now:
        return []
    return ["accept", "decline"] if row.kind == Amendment.Kind.PRICE else ["accept"]


def accept_amendment(actor: Actor, row: Amendment, *, now: datetime) -> Amendment:
    """See amendments.accept and prices.accept."""
    if row.kind == Amendment.Kind.PRICE:
        return prices.accept(actor, row, now=now)
    return amendments.accept(actor, row, now=now)


def decline_amendment(actor: Actor, row: Amendment, *, now: datetime) -> Amendment:
    """See prices.decline. What one proposed oneself simply lapses: MarketError("illegal_transition")."""
    if row.kind != Amendment.Kind.PRICE:
        raise MarketError("illegal_transition", "A proposal of one's own needs no answer; it lapses by itself.")
    return prices.decline(actor, row, now=now)


__all__ = [
    "ACCEPTED", "CANCELLED", "END_JOBS", "NOTICE", "Leaving", "Ticked", "accept", "accept_amendment", "actions",
    "amendment_actions", "amendments", "check_standing", "clock", "close_out", "confirm_payment", "decline_amendment", "default", "end",
    "leaving", "missing", "prices", "send_notice", "sentence", "settle", "terminate",
]  # fmt: skip
