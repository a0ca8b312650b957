"""What a quote and a signature do differently where the offer is a resale. Callers hold the cell's lock.

A quote's hold lies within what the holder set aside, so the market around it does not see it. The signature takes the GPUs out:
they are the buyer's own reservation from then on, and the sale (Fill) is written in the same transaction.
"""

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.models import Contract, Fill, Gpu, Listing, Quote, Resale, Reservation, ReservationBlock, StandingBid
from marketplace.services import audit
from marketplace.services.forward import pieces
from marketplace.services.forward.topics import TOLD, nudge_book
from marketplace.tenancy import SYSTEM, Actor

if TYPE_CHECKING:
    from marketplace.services.quotes import Request
Hold = tuple[tuple[int, int], ...]  # ((what a resale's capacity calls a host, GPUs), ...)


def asked(actor: Actor, listing: Listing, wanted: "Request") -> "Request":
    """The request for all of the resale's window, which is what is on offer. MarketError: forbidden for its own holder,
    term_not_offered for another window.
    """
    resale = listing.resale
    if resale.organization_id == actor.organization_id:
        raise MarketError("forbidden", f"{resale.public_id} is your own offer; withdraw it to have the GPUs back.")
    for name, given, offered in (
        ("starts_at", wanted.starts_at, resale.starts_at), ("ends_at", wanted.ends_at, resale.ends_at)
    ):  # fmt: skip
        if given is not None and given != offered:
            raise MarketError(
                "term_not_offered",
                f"It is resold as it stands: {resale.starts_at:%F %R} to {resale.ends_at:%F %R} UTC.",
                {f"/{name}": f"{offered:%F %R} UTC, or left out"},
                {"starts_at": resale.starts_at, "ends_at": resale.ends_at},
            )
    return replace(wanted, starts_at=resale.starts_at, ends_at=resale.ends_at)


def terms_of(listing: Listing) -> dict[str, Any]:
    """What a quote takes from the holder's contract, not from the listing: price and fee of what goes beyond the reservation."""
    contract = listing.resale.contract
    beyond = contract.overage_price if contract.overage_price is not None else contract.price
    return {"overage_price": beyond, "fee_permille": contract.fee_permille}


def hold(listing: Listing, quote: Quote, held: Hold) -> Reservation:
    """The hold of a new quote, within what is set aside."""
    resale = listing.resale
    assert quote.ends_at is not None
    made = Reservation.objects.create(
        listing=listing, quote=quote, within_id=resale.reservation_id, starts_at=quote.starts_at, ends_at=quote.ends_at,
        claims_at=resale.reservation.claims_at, held_until=quote.held_until, state=Reservation.State.HELD,
    )  # fmt: skip
    _note(made, held)
    return made


def _note(row: Reservation, held: Hold) -> None:
    """How many GPUs of which host; which ones is decided by the signature."""
    blocks = ReservationBlock.objects.in_bulk([-host for host, _ in held])
    pieces.set_blocks(row, {blocks[-host].host_id: blocks[-host].gpu_indices[:count] for host, count in held})


def take(quote: Quote, reservation: Reservation, held: Hold) -> Reservation:
    """Out of what is set aside into the buyer's own reservation. The caller has just admitted `held`."""
    resale: Resale = (
        Resale.objects.select_for_update(no_key=True, of=("self",))
        .select_related("reservation", "listing", "contract")
        .get(listing_id=quote.listing_id)
    )
    aside = resale.reservation
    blocks = {block.pk: block for block in ReservationBlock.objects.filter(reservation=aside)}
    sick: dict[int, set[int]] = {}
    for host, index in Gpu.objects.filter(
        host__in=[b.host_id for b in blocks.values()], healthy=False
    ).values_list("host_id", "index"):  # fmt: skip
        sick.setdefault(host, set()).add(index)
    left = {block.host_id: list(block.gpu_indices) for block in blocks.values()}
    sold: dict[int, list[int]] = {}
    for key, count in held:
        host = blocks[-key].host_id
        well = [i for i in left[host] if i not in sick.get(host, set())][:count]
        assert len(well) == count, "admitted a moment ago, under the same lock"
        sold[host] = well
        left[host] = [i for i in left[host] if i not in well]
    pieces.set_blocks(aside, {host: gpus for host, gpus in left.items() if gpus})
    resale.sold_gpus += quote.gpu_count
    if resale.sold_gpus == resale.gpu_count:
        resale.state = Resale.State.SOLD
        Reservation.objects.filter(pk=aside.pk).update(state=Reservation.State.RELEASED)
        Listing.objects.filter(pk=resale.listing_id).update(state=Listing.State.PAUSED)
    resale.save(update_fields=["sold_gpus", "state"])
    reservation.listing_id = resale.contract.listing_id
    reservation.within, reservation.held_until, reservation.state = None, None, Reservation.State.FIRM
    reservation.starts_at, reservation.claims_at, reservation.ends_at = (
        resale.starts_at,
        aside.claims_at,
        resale.ends_at,
    )
    reservation.save()
    pieces.set_blocks(reservation, sold)
    return reservation


def record(actor: Actor, quote: Quote, contract: Contract, *, now: datetime) -> Fill | None:
    """The sale, where the contract comes of a resale, of a standing bid, or of both."""
    resale = Resale.objects.filter(listing_id=quote.listing_id).first()
    if resale is None and quote.bid_id is None:
        return None
    assert contract.ends_at is not None
    made = Fill.objects.create(
        contract=contract, resale=resale, bid_id=quote.bid_id, gpu_model_id=contract.gpu_model_id, region=contract.site.region,
        livemode=contract.cell.livemode, gpu_count=contract.gpu_count, starts_at=contract.starts_at, ends_at=contract.ends_at,
        price=contract.price, currency=contract.currency, at=now,
    )  # fmt: skip
    if made.bid_id is not None:
        _met(made.bid_id, made.gpu_count, now)
    if resale is not None:
        said = f"{contract.gpu_count} GPUs from {contract.starts_at:%F %R} to {contract.ends_at:%F %R} UTC are sold on ({resale.public_id})"
        seller: Contract = Contract.objects.get(pk=resale.contract_id)
        seller.events.create(
            at=now, actor=actor.label[:120] if actor.organization_id == seller.organization_id else "market",
            from_state=seller.state, to_state=seller.state, reason=said[:200],
        )  # fmt: skip
        audit.record(
            SYSTEM, "resale.filled", resale.public_id, now=now, organization_id=resale.organization_id,
            after={"fill": made.public_id, "gpu_count": made.gpu_count, "sold": resale.sold_gpus, "of": resale.gpu_count},
        )  # fmt: skip
        outbox.emit(
            TOLD, key=f"{made.public_id}-sold", payload={"resale": resale.pk, "what": "sold", "gpus": made.gpu_count}
        )
    nudge_book(made.livemode, made.gpu_model_id, made.region)
    return made


def _met(bid_id: int, gpus: int, now: datetime) -> None:
    """A standing bid has so many GPUs more."""
    bid = StandingBid.objects.select_for_update(no_key=True).get(pk=bid_id)
    bid.filled_gpus += gpus
    bid.rests_until = None
    if bid.filled_gpus == bid.gpu_count and bid.state == StandingBid.State.OPEN:
        bid.state, bid.closed_at, bid.note = StandingBid.State.FILLED, now, "it has all that it wanted"
    bid.save(update_fields=["filled_gpus", "rests_until", "state", "closed_at", "note"])


def open_resale(quote: Quote, now: datetime) -> Resale | None:
    """The resale behind the quote's listing, if it is one. MarketError("listing_unavailable") where it is over."""
    resale = Resale.objects.filter(listing_id=quote.listing_id).select_related("listing").first()
    if resale is not None and (resale.state != Resale.State.OPEN or resale.expires_at <= now):
        raise MarketError(
            "capacity_gone" if resale.state == Resale.State.SOLD else "listing_unavailable",
            f"{resale.public_id} is {'expired' if resale.state == 'open' else resale.state}; nothing was signed. Search again.",
            extra={"listing": resale.listing.public_id},
        )
    return resale
