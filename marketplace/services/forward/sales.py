"""Sales of resales after the fact: what stands sold, and what is undone because its buyer did not pay."""

from datetime import datetime

from django.db import transaction

from marketplace import outbox
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, Fill, Listing, Resale, Reservation, StandingBid
from marketplace.services import audit, maintenance
from marketplace.services.forward import pieces, resales
from marketplace.services.forward.topics import TOLD, nudge_book
from marketplace.tenancy import SYSTEM


def sold(contract: Contract) -> list[Fill]:
    """What stands sold of a contract, by its begin."""
    return list(Fill.objects.filter(resale__contract=contract, undone_at=None).order_by("starts_at", "pk"))


def undo(contract_id: int, *, now: datetime) -> bool:
    """The buyer did not pay and his contract is cancelled: what he had bought is on offer again, or its holder's. Idempotent."""
    now = now.replace(microsecond=0)
    shown = Contract.objects.get(pk=contract_id)
    with transaction.atomic():
        acquire((Lock.CELL, shown.cell_id))
        fill = Fill.objects.select_for_update(no_key=True).filter(contract_id=contract_id).first()
        contract = Contract.objects.get(pk=contract_id)
        if fill is None or fill.undone_at is not None or contract.state != Contract.State.CANCELLED:
            return False
        Fill.objects.filter(pk=fill.pk).update(undone_at=now)
        if fill.bid_id is not None:
            _unmet(fill.bid_id, fill.gpu_count, now)
        if fill.resale_id is not None:
            _take_back(fill, now)
        nudge_book(fill.livemode, fill.gpu_model_id, fill.region)
    return True


def _unmet(bid_id: int, gpus: int, now: datetime) -> None:
    """What a standing bid had bought was not paid: it has less, and looks for no more."""
    bid = StandingBid.objects.select_for_update(no_key=True).get(pk=bid_id)
    bid.filled_gpus -= gpus
    if bid.state in {StandingBid.State.OPEN, StandingBid.State.FILLED}:
        bid.state, bid.closed_at, bid.note = StandingBid.State.CANCELLED, now, "what it had bought was not paid"
    bid.save(update_fields=["filled_gpus", "state", "closed_at", "note"])


def _take_back(fill: Fill, now: datetime) -> None:
    resale = resales.locked(fill.resale_id or 0)
    bought = Reservation.objects.filter(contract_id=fill.contract_id, state=Reservation.State.FIRM).first()
    gpus = {} if bought is None else pieces.blocks_of(bought)
    if bought is not None:
        Reservation.objects.filter(pk=bought.pk).update(state=Reservation.State.RELEASED)
    resale.sold_gpus -= fill.gpu_count
    again = resale.expires_at > now and resale.state in {Resale.State.OPEN, Resale.State.SOLD}
    if again and bought is not None and _in_force(resale.contract):
        aside = resale.reservation
        Reservation.objects.filter(pk=aside.pk).update(state=Reservation.State.FIRM)
        there = pieces.blocks_of(aside) if resale.state == Resale.State.OPEN else {}
        pieces.set_blocks(aside, {host: {*gpus.get(host, ()), *there.get(host, ())} for host in {*gpus, *there}})
        Listing.objects.filter(pk=resale.listing_id).update(state=Listing.State.PUBLISHED)
        resale.state = Resale.State.OPEN
        resale.save(update_fields=["state"])
        maintenance.meet(resale.contract, gpus.keys(), now=now)
    else:
        resales.hand_back(resale, gpus, now)
        if resale.state == Resale.State.SOLD:
            resale.state, resale.closed_at, resale.reason = Resale.State.EXPIRED, now, "its buyer did not pay"
            Listing.objects.filter(pk=resale.listing_id).update(state=Listing.State.RETIRED)
    resale.save(update_fields=["sold_gpus", "state", "closed_at", "reason"])
    audit.record(
        SYSTEM, "resale.undone", resale.public_id, now=now, organization_id=resale.organization_id,
        after={"fill": fill.public_id, "gpu_count": fill.gpu_count, **resales.facts(resale)},
    )  # fmt: skip
    outbox.emit(
        TOLD, key=f"{fill.public_id}-undone", payload={"resale": resale.pk, "what": "undone", "gpus": fill.gpu_count}
    )


def _in_force(contract: Contract) -> bool:
    return contract.state == Contract.State.ACTIVE and contract.terminated_at is None
