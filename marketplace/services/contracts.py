"""Contracts: accept a quote, terminate, end, and the clock that does what time asks for. The only writer of Contract.

States. `pending_payment` (only where settings.RESERVED_UPFRONT) -> `active` -> `ending` (over; jobs drain) -> `ended`, or `terminated`
where it ended before its agreed end. An active contract's window decides whether it may be used, not its state.
Early termination: services.terms.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import (
    BillingStanding,
    Contract,
    Job,
    Kind,
    Listing,
    Organization,
    Placement,
    Quote,
    Reservation,
    ReservationBlock,
)
from marketplace.services import audit, availability, catalogue, holds, quoted, quotes, terms
from marketplace.services.availability import HOLDING
from marketplace.services.transitions import record_created, transition_many
from marketplace.tenancy import Actor

ACCEPTED = "billing.contract_accepted"
END_JOBS = "marketplace.end_contract_jobs"
PAYMENT_WITHIN = timedelta(hours=1)
BATCH = 500


def accept(actor: Actor, quote_id: int, *, now: datetime) -> Contract:
    """Turn a firm quote into a contract of the price, fee and terms that the quote froze; its reservation becomes firm.

    A hold that lapsed is admitted again while the price is firm. MarketError: not_found, illegal_transition (accepted before),
    quote_expired, listing_unavailable (withdrawn), card_required, billing_suspended, limit_exceeded, capacity_gone (with
    `alternatives`), busy.
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
        check_standing(organization.pk)
        _check_limit(organization, quote)
        listing = Listing.objects.select_related("site__cell", "organization").get(pk=quote.listing_id)
        quoted.check_offered(listing, quote)
        quoted.hold_to(listing, quote)
        reservation = _firm(actor, quote, listing, now) if quote.kind in HOLDING else None
        starts_at = max(quote.starts_at, now) if reservation is None else reservation.starts_at
        contract = _create(quote, listing, starts_at, now)
        if reservation is not None:
            reservation.contract = contract
            reservation.save(update_fields=["contract"])
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
        }  # fmt: skip
        raise MarketError(
            "quote_expired", f"{quote.public_id} was firm until {quote.firm_until:%F %T}Z; ask for a new one.",
            extra={"quote_again": {"method": "POST", "path": "/api/v1/quotes", "body": again}},
        )  # fmt: skip
    if quote.ends_at is not None and quote.ends_at <= now:
        raise MarketError("quote_expired", "The window of the quote is over.")


def _check_limit(organization: Organization, quote: Quote) -> None:
    """GPUs held at once, at the worst instant of the window, within the organization's limit; a ceiling counts for itself."""
    held = 0
    if quote.kind in HOLDING:
        held = _peak_held(organization.pk, quote.starts_at, quote.ends_at)
    if held + quote.gpu_count > organization.gpu_limit:
        raise MarketError(
            "limit_exceeded",
            f"{quote.gpu_count} GPUs beside {held} that are held then; the organization may have {organization.gpu_limit}.",
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
    held = peak = 0
    for _, _, change in sorted(changes):  # ends before starts at one instant
        held += change
        peak = max(peak, held)
    return peak


def _firm(actor: Actor, quote: Quote, listing: Listing, now: datetime) -> Reservation:
    """The quote's reservation, firm. A live hold that nothing disturbed is taken as it stands; else room is looked for once more."""
    assert quote.ends_at is not None
    reservation = Reservation.objects.select_for_update(no_key=True).get(quote=quote)
    starts_at = max(quote.starts_at, now)
    live = (
        reservation.state == Reservation.State.HELD
        and reservation.held_until is not None
        and reservation.held_until > now
        and not holds.disturbed([reservation], now)
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
    upfront = quote.kind in HOLDING and settings.RESERVED_UPFRONT
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
        listing_version=quote.listing_version,
        terms=terms.order_form(quote, starts_at),
        state=Contract.State.PENDING_PAYMENT if upfront else Contract.State.ACTIVE,
        reference=quote.reference,
        metadata=quote.metadata,
        created_at=now,
    )


def confirm_payment(contract_id: int, *, now: datetime) -> None:
    """The upfront payment has arrived (billing calls this): the contract is active. Again is no harm."""
    with transaction.atomic():
        transition_many(
            Contract, [contract_id], expected=("pending_payment",), to="active", now=now, actor="billing", reason="paid"
        )


# --- the end
def actions(contract: Contract, actor: Actor) -> list[str]:
    """What its customer may do now."""
    mine = actor.organization_id == contract.organization_id
    if not mine or contract.state not in {Contract.State.ACTIVE, Contract.State.PENDING_PAYMENT}:
        return []
    if contract.state == Contract.State.PENDING_PAYMENT:
        return ["terminate"]
    return ["submit_job"] if contract.kind in HOLDING and terms.ended_early(contract) else ["submit_job", "terminate"]


def terminate(
    actor: Actor, contract: Contract, *, now: datetime, reason: str = "terminated by the customer"
) -> Contract:
    """End it early, by its rule. MarketError("illegal_transition") unless it is active or waits for its payment."""
    if actor.kind != "system" and actor.organization_id != contract.organization_id:
        raise MarketError("forbidden", "Only the customer terminates a contract.")
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, contract.cell_id), (Lock.ORG, contract.organization_id))
        fresh: Contract = Contract.objects.select_for_update(no_key=True).get(pk=contract.pk)
        before = {"state": fresh.state, "ends_at": fresh.ends_at.isoformat() if fresh.ends_at else None}
        if fresh.state == Contract.State.PENDING_PAYMENT:
            _cancel([fresh.pk], now=now, actor=actor.label, reason=reason)
        elif fresh.state != Contract.State.ACTIVE:
            raise MarketError("illegal_transition", f"The contract is {fresh.state}.")
        elif fresh.kind in HOLDING and terms.ended_early(fresh):
            raise MarketError("illegal_transition", f"It was terminated already; it ends at {fresh.ends_at:%F %R} UTC.")
        elif fresh.kind in HOLDING:
            _shorten(fresh, terms.termination(fresh, now), now=now, actor=actor, reason=reason)
        else:
            if fresh.starts_at < now:
                Contract.objects.filter(pk=fresh.pk).update(ends_at=now)
            else:
                Contract.objects.filter(pk=fresh.pk).update(ends_at=fresh.starts_at + timedelta(seconds=1))
            end([fresh.pk], now=now, actor=actor.label, reason=reason)
        fresh.refresh_from_db()
        after = {"state": fresh.state, "ends_at": fresh.ends_at.isoformat() if fresh.ends_at else None}
        audit.record(actor, "contract.terminated", fresh.public_id, now=now, before=before, after=after)
    return fresh


def _shorten(contract: Contract, ends_at: datetime, *, now: datetime, actor: Actor, reason: str) -> None:
    """It goes on to `ends_at` and no further; what it held after that is free."""
    if contract.ends_at is not None and ends_at >= contract.ends_at:
        raise MarketError(
            "illegal_transition",
            f"It ends at {contract.ends_at:%F %T}Z anyway: at least {terms.STAYS_DUE_AT_LEAST // timedelta(hours=1)} hours stay due.",
        )
    Contract.objects.filter(pk=contract.pk).update(ends_at=ends_at)
    Reservation.objects.filter(contract=contract).update(ends_at=ends_at)
    text = f"{reason}: it ends at {ends_at:%F %R}Z, by its rule of early termination"
    contract.events.create(at=now, actor=actor.label[:120], from_state="active", to_state="active", reason=text[:200])


def end(
    contract_ids: Iterable[int], *, now: datetime, actor: str = "system", reason: str = "its window is over"
) -> list[int]:
    """Active contracts are over: they become `ending`, give their capacity back and their jobs drain; without live jobs they are
    settled at once. Returns those that moved.
    """
    with transaction.atomic():
        moved = sorted(
            transition_many(
                Contract, contract_ids, expected=("active",), to="ending", now=now, actor=actor, reason=reason,
                set_columns={"ended_at": now},
            )
        )  # fmt: skip
        Reservation.objects.filter(contract_id__in=moved).update(state=Reservation.State.RELEASED)
        for pk in _busy(moved):
            outbox.emit(END_JOBS, key=str(pk), payload={"contract": pk})
        settle(moved, now=now)
    return moved


def _busy(contract_ids: Iterable[int]) -> list[int]:
    """Those with jobs or placements that are not over."""
    ids = list(contract_ids)
    jobs = Job.objects.filter(contract_id__in=ids).exclude(state__in=Job.FINAL)
    placements = Placement.objects.filter(contract_id__in=ids).exclude(state__in=Placement.FINAL)
    return sorted({*jobs.values_list("contract_id", flat=True), *placements.values_list("contract_id", flat=True)})


def settle(contract_ids: Iterable[int], *, now: datetime) -> int:
    """`ending` contracts with nothing left to drain: `ended`, or `terminated` where that was before the agreed end."""
    with transaction.atomic():
        ids = list(contract_ids)
        busy = set(_busy(ids))
        rows = Contract.objects.filter(pk__in=[pk for pk in ids if pk not in busy], state="ending").only(
            "ends_at", "terms"
        )
        early = {row.pk for row in rows if terms.ended_early(row)}
        full = {row.pk for row in rows} - early
        done = transition_many(
            Contract, full, expected=("ending",), to="ended", now=now, actor="system", reason="nothing runs any more"
        )
        gone = transition_many(
            Contract,
            early,
            expected=("ending",),
            to="terminated",
            now=now,
            actor="system",
            reason="nothing runs any more",
        )
    return len(done) + len(gone)


def _cancel(contract_ids: Iterable[int], *, now: datetime, actor: str, reason: str) -> list[int]:
    moved = transition_many(
        Contract, contract_ids, expected=("pending_payment",), to="cancelled", now=now, actor=actor, reason=reason,
        set_columns={"ended_at": now},
    )  # fmt: skip
    Reservation.objects.filter(contract_id__in=moved).update(state=Reservation.State.RELEASED)
    return sorted(moved)


# --- the clock
@dataclass(frozen=True)
class Ticked:
    """What one tick did, in rows."""

    holds_released: int = 0
    quotes_expired: int = 0
    contracts_over: int = 0
    contracts_settled: int = 0
    payments_lapsed: int = 0
    reservations_moved: int = 0


def clock(now: datetime) -> Ticked:
    """Lapsed holds are free, quotes expire, contracts end with their window, drained ones are settled, promises
    whose GPUs were lost move to others. Bounded batches of BATCH rows;
    each step is a guarded update of its own, so that any number of copies may run beside each other and beside buyers.
    """
    lapsed = Reservation.objects.filter(state=Reservation.State.HELD, held_until__lte=now).order_by("pk")[:BATCH]
    released = Reservation.objects.filter(
        pk__in=list(lapsed.values_list("pk", flat=True)), state=Reservation.State.HELD, held_until__lte=now
    ).update(state=Reservation.State.RELEASED)
    stale = Quote.objects.filter(state=Quote.State.OPEN, firm_until__lte=now).order_by("pk")[:BATCH]
    expired = Quote.objects.filter(pk__in=list(stale.values_list("pk", flat=True)), state=Quote.State.OPEN).update(
        state=Quote.State.EXPIRED
    )
    _forget_blocks()
    catalogue.prune(now)
    over = Contract.objects.filter(state="active", ends_at__lte=now).order_by("ends_at", "pk")[:BATCH]
    ended = end(list(over.values_list("pk", flat=True)), now=now)
    live_jobs = Job.objects.filter(contract=OuterRef("pk")).exclude(state__in=Job.FINAL)
    ending = Contract.objects.filter(~Exists(live_jobs), state="ending").order_by("ended_at", "pk")[:BATCH]
    settled = settle(list(ending.values_list("pk", flat=True)), now=now)
    unpaid = Contract.objects.filter(state="pending_payment", created_at__lte=now - PAYMENT_WITHIN)[:BATCH]
    with transaction.atomic():
        cancelled = _cancel(
            list(unpaid.values_list("pk", flat=True)), now=now, actor="system", reason="the payment did not arrive"
        )
    return Ticked(released, expired, len(ended), settled, len(cancelled), holds.heal(now))


def _forget_blocks() -> None:
    """The GPUs that an expired quote once held are of no interest."""
    gone = ReservationBlock.objects.filter(
        reservation__state=Reservation.State.RELEASED,
        reservation__contract=None,
        reservation__quote__state__in=(Quote.State.EXPIRED, Quote.State.RELEASED),
    ).order_by("pk")[: BATCH * 4]
    ReservationBlock.objects.filter(pk__in=list(gone.values_list("pk", flat=True))).delete()
