"""Signing: a firm quote becomes a contract of the price, fee and terms that it froze.

`pending_payment` where something is due at signing, until billing says that it is paid; otherwise `active` at once. An active
contract's window decides whether it may be used, not its state.
"""

from datetime import datetime, timedelta

from django.db import transaction

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import BillingStanding, Contract, Fill, Kind, Listing, Organization, Quote, Reservation
from marketplace.services import audit, availability, documents, holds, price_tiers, quoted, quotes, screening, terms
from marketplace.services.availability import HOLDING
from marketplace.services.contracts import notices
from marketplace.services.contracts.ending import cancel
from marketplace.services.forward import buying
from marketplace.services.transitions import record_created, transition_many
from marketplace.tenancy import SYSTEM, Actor

ACCEPTED = "billing.contract_accepted"
PAYMENT_WITHIN = timedelta(hours=1)


def accept(actor: Actor, quote_id: int, *, now: datetime, terms_version: str | None = None) -> Contract:
    """Turn a firm quote into a contract of the price, fee and terms that the quote froze; its reservation becomes firm.

    A hold that lapsed is admitted again while the price is firm. `terms_version`: of the terms of service, accepted with it.
    MarketError: not_found, illegal_transition (accepted before), quote_expired, terms_not_accepted, listing_unavailable
    (withdrawn), card_required, billing_suspended, limit_exceeded, screening_required and screening_rejected (both say where to
    tell what), capacity_gone (with `alternatives`), busy.
    """
    now = now.replace(microsecond=0)
    shown = Quote.objects.owned_by(actor.organization_id).select_related("listing__site").filter(pk=quote_id).first()
    if shown is None or actor.organization_id is None:
        raise MarketError("not_found", "There is no such quote.")
    with transaction.atomic():
        acquire((Lock.CELL, shown.listing.site.cell_id), (Lock.ORG, shown.organization_id))
        quote = Quote.objects.select_for_update(no_key=True).get(pk=shown.pk)
        _check_quote(quote, now)
        organization = Organization.objects.get(pk=quote.organization_id)
        if terms_version is not None:
            documents.accept_terms(actor, terms_version, now=now)
        documents.require_terms(organization.pk)
        check_standing(organization.pk)
        check_limit(organization, quote.kind, quote.gpu_count, quote.starts_at, quote.ends_at)
        screening.require(organization, quote.kind, quote.gpu_count, quote.terms.get("gpu_model"), now=now)
        listing = Listing.objects.select_related("site__cell", "organization").get(pk=quote.listing_id)
        resale = buying.open_resale(quote, now) if listing.is_resale else None
        quoted.check_offered(listing, quote)
        quoted.hold_to(listing, quote)
        reservation = _firm(actor, quote, listing, now) if quote.kind in HOLDING else None
        starts_at = max(quote.starts_at, now) if reservation is None else reservation.starts_at
        contract = _create(quote, listing if resale is None else resale.contract.listing, starts_at, now)
        if reservation is not None:
            reservation.contract = contract
            reservation.save(update_fields=["contract"])
        buying.record(actor, quote, contract, now=now)
        Quote.objects.filter(pk=quote.pk).update(state=Quote.State.ACCEPTED)
        record_created(
            Contract, [contract.pk], state=contract.state, now=now, actor=actor.label, reason="quote accepted"
        )
        audit.record(
            actor,
            "contract.accepted",
            contract.public_id,
            now=now,
            after={"quote": quote.public_id, "state": contract.state},
        )
        documents.keep_order_form(contract, now=now)
        notices.tell([contract.pk], "signed")
        outbox.emit(ACCEPTED, key=str(contract.pk), payload={"contract": contract.pk})
    return contract


def check_standing(organization_id: int) -> None:
    """A good card and no debts, or card_required, billing_suspended."""
    standing = BillingStanding.objects.filter(organization_id=organization_id).first()
    state = standing.state if standing else BillingStanding.State.NO_CARD
    if state == BillingStanding.State.NO_CARD:
        raise MarketError("card_required", "Add a card on the page Payment methods, then accept again.")
    if state == BillingStanding.State.PAST_DUE:
        raise MarketError("billing_suspended", "An invoice is past due; pay it, then accept again.")
    if state == BillingStanding.State.SUSPENDED:
        raise MarketError("billing_suspended", "Pay the open invoices, then accept again.")


def _check_quote(quote: Quote, now: datetime) -> None:
    if quote.state == Quote.State.ACCEPTED:
        contract = Contract.objects.get(quote=quote)
        raise MarketError(
            "illegal_transition", f"{quote.public_id} was accepted: {contract.public_id}.",
            extra={"contract": contract.public_id},
        )  # fmt: skip
    if quote.state != Quote.State.OPEN or quote.firm_until <= now or not quote.terms:
        again = {
            "listing": quote.listing.public_id, "kind": quote.kind, "gpu_count": quote.gpu_count, "level": quote.level,
            **({"starts_at": quote.starts_at} if quote.starts_at > now and not quote.starts_at.second else {}),
            **({"ends_at": quote.ends_at} if quote.ends_at else {}),
            **({"limit_price": quote.limit_price} if quote.limit_price else {}),
            **price_tiers.limits(quote),
        }  # fmt: skip
        raise MarketError(
            "quote_expired", f"{quote.public_id} was firm until {quote.firm_until:%F %T}Z; ask for a new one.",
            extra={"quote_again": {"method": "POST", "path": "/api/v1/quotes", "body": again}},
        )  # fmt: skip
    if quote.ends_at is not None and quote.ends_at <= now:
        raise MarketError("quote_expired", "The window of the quote is over.")


def check_limit(
    organization: Organization, kind: str, gpus: int, starts_at: datetime, ends_at: datetime | None
) -> None:
    """GPUs held at once, at the worst instant of the window, within the organization's limit; a ceiling counts for itself."""
    held = _peak_held(organization.pk, starts_at, ends_at) if kind in HOLDING else 0
    if held + gpus > organization.gpu_limit:
        raise MarketError(
            "limit_exceeded",
            f"{gpus} GPUs beside {held} that are held then; the organization may have {organization.gpu_limit}.",
            extra={"limit": "gpus", "allowed": organization.gpu_limit, "held": held},
        )


def _peak_held(organization_id: int, starts_at: datetime, ends_at: datetime | None) -> int:
    rows = Contract.objects.filter(
        organization_id=organization_id,
        kind__in=HOLDING,
        state__in=("active", "pending_payment"),
        ends_at__gt=starts_at,
    )
    if ends_at is not None:
        rows = rows.filter(starts_at__lt=ends_at)
    changes = [
        change
        for begins, ends, count in rows.values_list("starts_at", "ends_at", "gpu_count")
        for change in ((max(begins, starts_at), 1, count), (ends, 0, -count))
    ]
    sold = Fill.objects.filter(
        resale__organization_id=organization_id, undone_at=None, ends_at__gt=starts_at,
        resale__contract__state__in=("active", "pending_payment"),
    )  # fmt: skip
    for begins, ends, count in sold.values_list("starts_at", "ends_at", "gpu_count"):
        if ends_at is None or begins < ends_at:
            changes.append((max(begins, starts_at), 1, -count))
        if ends_at is None or ends < ends_at:
            changes.append((ends, 0, count))
    held = peak = 0
    for _, _, change in sorted(changes):  # ends before starts at one instant
        held += change
        peak = max(peak, held)
    return peak


def _firm(actor: Actor, quote: Quote, listing: Listing, now: datetime) -> Reservation:
    """The quote's reservation, firm. A live hold that nothing disturbed is taken as it stands; else room is looked for once more."""
    assert quote.ends_at is not None
    reservation = Reservation.objects.select_for_update(no_key=True).get(quote=quote)
    if listing.is_resale:
        hold = quotes.admitted(actor, listing, quote, now=now, without=(reservation.pk,), code="capacity_gone")
        return buying.take(quote, reservation, hold)
    starts_at = max(quote.starts_at, now)
    live = (
        reservation.state == Reservation.State.HELD
        and reservation.held_until is not None
        and reservation.held_until > now
        and not holds.disturbed([reservation], now)
        and not holds.maintained(reservation)
    )
    reservation.starts_at = starts_at
    reservation.held_until = None
    reservation.state = Reservation.State.FIRM
    if live:
        reservation.save()
    else:
        hold = quotes.admitted(actor, listing, quote, now=now, without=(reservation.pk,), code="capacity_gone")
        reservation.claims_at = quotes.claims_at(listing, starts_at, quote.ends_at, now)
        reservation.save()
        holds.write_blocks(reservation, hold, now=now)
    return _after_spot(reservation, listing, now)


def _after_spot(reservation: Reservation, listing: Listing, now: datetime) -> Reservation:
    """Nobody pays for GPUs that spot work is still leaving: a window that begins at once begins with its lead then."""
    clear = now + timedelta(seconds=availability.lead_s(listing))
    if reservation.starts_at < clear < reservation.ends_at and holds.lent_to_spot(reservation):
        reservation.starts_at = clear
        reservation.save(update_fields=["starts_at"])
    return reservation


def _create(quote: Quote, listing: Listing, starts_at: datetime, now: datetime) -> Contract:
    agreed = terms.order_form(quote, starts_at)
    upfront = agreed["upfront_minor"]
    pay_by = min(now + PAYMENT_WITHIN, quote.ends_at or now + PAYMENT_WITHIN)
    return Contract.objects.create(
        organization_id=quote.organization_id,
        operator=listing.organization,
        listing=listing,
        quote=quote,
        site=listing.site,
        cell=listing.site.cell,
        kind=quote.kind,
        gpu_model_id=quote.terms["gpu_model_id"],
        gpu_count=quote.gpu_count,
        starts_at=starts_at,
        ends_at=quote.ends_at,
        price=quote.price,
        overage_price=quote.overage_price,
        limit_price=quote.limit_price,
        currency=quote.currency,
        fee_permille=quote.fee_permille,
        eviction_notice_s=quote.terms["eviction_notice_s"],
        flexible_hours_per_month=quote.terms["flexible_hours_per_month"] if quote.kind == Kind.FLEXIBLE else 0,
        flexible_notice_s=quote.terms["flexible_notice_s"],
        emergency_notice_s=terms.emergency_notice_s(quote),
        listing_version=quote.listing_version,
        terms=agreed,
        state=Contract.State.PENDING_PAYMENT if upfront else Contract.State.ACTIVE,
        upfront_minor=upfront,
        pay_by=pay_by if upfront else None,
        reference=quote.reference,
        metadata=quote.metadata,
        created_at=now,
    )


def confirm_payment(contract_id: int, *, now: datetime) -> bool:
    """What was due at signing is paid (billing calls this): the contract is active, from now on where it was to begin at once.

    False where it was active before, or is none any more: what was paid for it then goes back with the next invoice.
    """
    now = now.replace(microsecond=0)
    with transaction.atomic():
        contract = Contract.objects.select_for_update(no_key=True).get(pk=contract_id)
        if contract.state != Contract.State.PENDING_PAYMENT:
            return False
        if contract.ends_at is not None and contract.ends_at <= now:
            cancel([contract_id], now=now, actor="system", reason="the payment arrived after its window")
            return False
        # Nobody pays for a time in which it could not be used: it waited for its payment.
        starts_at = max(contract.starts_at, now)
        Reservation.objects.filter(contract=contract, maintenance=None).update(starts_at=starts_at)
        transition_many(
            Contract, [contract_id], expected=("pending_payment",), to="active", now=now, actor="billing",
            reason="what is due at signing is paid", set_columns={"starts_at": starts_at, "pay_by": None},
        )  # fmt: skip
        audit.record(
            SYSTEM, "contract.activated", contract.public_id, now=now, organization_id=contract.organization_id,
            after={"state": "active", "starts_at": starts_at.isoformat()},
        )  # fmt: skip
        notices.tell([contract_id], "active")
    return True
