"""A later end, or more GPUs: proposed by the customer like a quote, firm for as long, and accepted under the cell's lock.

Extension. On the same terms and price, up to the longest term that the contract froze, on the same GPUs: work that runs does not
move. A contract that has not begun may get others of its listing.
More GPUs. For the rest of the window, in the same part of the fabric where the contract asked for one. What is added costs what the
listing asks now for what is left of the window; what was agreed before keeps its price. (At the old price a small contract would be a
free option on a large one.)

A proposal holds no capacity. Nothing more is due at signing: what is added is billed by the month.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Max, Q

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Amendment, Contract, Fill, Kind, Listing, Organization, Resale, Reservation
from marketplace.services import (
    audit,
    availability,
    documents,
    holds,
    listings,
    nearest,
    quoted,
    quotes,
    screening,
    search,
    terms,
)
from marketplace.services.availability import HOLDING, instant, seconds
from marketplace.services.contracts import notices
from marketplace.services.contracts.signing import check_limit, check_standing
from marketplace.tenancy import Actor

Hold = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Asked:
    """What a proposal would make of the contract: another end, or `added` GPUs."""

    ends_at: datetime | None = None
    added: int = 0


def extend(actor: Actor, contract: Contract, ends_at: datetime, *, now: datetime) -> Amendment:
    """A proposal to end at `ends_at` instead. MarketError: illegal_transition, invalid_request, term_not_offered,
    listing_unavailable, limit_exceeded, no_capacity (with `alternatives`).
    """
    return _propose(actor, contract, Asked(ends_at=ends_at), now)


def resize(actor: Actor, contract: Contract, gpu_count: int, *, now: datetime) -> Amendment:
    """A proposal to hold `gpu_count` GPUs for the rest of the window. MarketError as `extend`, and kind_not_offered."""
    if gpu_count <= contract.gpu_count:
        raise MarketError(
            "invalid_request", f"It holds {contract.gpu_count} GPUs; fewer only by an early end.",
            {"/gpu_count": f"more than {contract.gpu_count}"},
        )  # fmt: skip
    return _propose(actor, contract, Asked(added=gpu_count - contract.gpu_count), now)


def _propose(actor: Actor, contract: Contract, asked: Asked, now: datetime) -> Amendment:
    own(actor, contract)
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, contract.cell_id), (Lock.ORG, contract.organization_id))
        fresh = _locked(contract.pk)
        listing = _listing(fresh)
        _check(fresh, listing, asked, now)
        _room(fresh, listing, asked, now, "no_capacity")
        open_ = Amendment.objects.filter(contract=fresh, state="open").exclude(kind=Amendment.Kind.PRICE)
        open_.update(state=Amendment.State.EXPIRED, decided_at=now)  # the newest proposal is the one that counts
        assert fresh.ends_at is not None
        begin = fresh.ends_at if asked.ends_at else max(fresh.starts_at, now)
        price = fresh.price if asked.ends_at else _price_of_more(fresh, begin, now)
        return Amendment.objects.create(
            contract=fresh,
            kind=Amendment.Kind.EXTEND if asked.ends_at else Amendment.Kind.RESIZE,
            proposed_by=actor.label[:120],
            created_at=now,
            answer_by=now + timedelta(seconds=settings.QUOTE_FIRM_SECONDS),
            effective_at=begin,
            ends_at=asked.ends_at,
            added_gpus=asked.added,
            price=price,
            old_ends_at=fresh.ends_at,
            total_minor=_total(fresh, asked, begin, price),
        )


def accept(actor: Actor, proposal: Amendment, *, now: datetime) -> Amendment:
    """The proposal holds from now on. Room is looked for once more: MarketError("capacity_gone") with what would fit.

    Also illegal_transition (answered before), quote_expired, conflict (the contract has changed since), card_required,
    billing_suspended, limit_exceeded, listing_unavailable.
    """
    own(actor, proposal.contract)
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, proposal.contract.cell_id), (Lock.ORG, proposal.contract.organization_id))
        row: Amendment = Amendment.objects.select_for_update(no_key=True).get(pk=proposal.pk)
        fresh = _locked(row.contract_id)
        _check_answer(row, fresh, now)
        check_standing(fresh.organization_id)
        documents.require_terms(fresh.organization_id)
        screening.require(fresh.organization, fresh.kind, row.added_gpus, fresh.terms.get("gpu_model"), now=now)
        listing = _listing(fresh)
        asked = Asked(row.ends_at, row.added_gpus)
        _check(fresh, listing, asked, now)
        hold = _room(fresh, listing, asked, now, "capacity_gone")
        reservation = Reservation.objects.select_for_update(no_key=True).get(pk=fresh.reservation.pk)
        before = {"ends_at": fresh.ends_at, "gpu_count": fresh.gpu_count}
        if asked.ends_at:
            _lengthen(fresh, reservation, asked.ends_at, hold, now)
            said = f"extended to {asked.ends_at:%F %R}Z"
        else:
            row.effective_at = _grow(fresh, reservation, listing, hold, asked.added, now)
            row.total_minor = _total(fresh, asked, row.effective_at, row.price or 0)
            said = f"{asked.added} GPUs more from {row.effective_at:%F %R}Z, {fresh.gpu_count} in all"
        row.state, row.decided_at, row.decided_by = Amendment.State.ACCEPTED, now, actor.label[:120]
        row.applied_at = now
        row.save()
        fresh.events.create(at=now, actor=actor.label[:120], from_state="active", to_state="active", reason=said)
        after = {"amendment": row.public_id, "ends_at": fresh.ends_at, "gpu_count": fresh.gpu_count}
        audit.record(
            actor, f"contract.{row.kind}", fresh.public_id, now=now, before=_plain(before), after=_plain(after)
        )
        documents.keep_amendment(row, now=now)
        notices.tell(
            [fresh.pk], "extended" if asked.ends_at else "resized", f"As accepted by {row.decided_by}: {said}."
        )
    return row


def _price_of_more(contract: Contract, begin: datetime, now: datetime) -> int:
    """For the rest of the window, with no more curtailment than the contract bears; nothing is due at signing, so nothing is
    had for paying then beyond what the plain price asks.
    """
    listing = Listing.objects.get(pk=contract.listing_id)  # as it is on offer now
    listings.price_of(listing, contract.kind, now=now)  # refuses what is not offered any more
    hours = contract.flexible_hours_per_month if contract.kind == Kind.FLEXIBLE else None
    asked = quotes.Request(contract.kind, 0, starts_at=begin, ends_at=contract.ends_at, flexible_hours_max=hours)
    return quotes.option_of(listing, asked, now).price


def own(actor: Actor, contract: Contract) -> None:
    if actor.organization_id != contract.organization_id:
        raise MarketError("forbidden", "Only the customer changes its contract.")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in values.items()}


def _locked(contract_id: int) -> Contract:
    rows = Contract.objects.select_related("quote", "organization")
    found: Contract = rows.select_for_update(no_key=True, of=("self",)).get(pk=contract_id)
    return found


def _listing(contract: Contract) -> Listing:
    """The contract's listing, held to the terms that it froze; refused where it is not on offer any more."""
    listing = Listing.objects.select_related("site__cell", "gpu_model", "organization").get(pk=contract.listing_id)
    if listing.state != Listing.State.PUBLISHED:
        raise MarketError(
            "listing_unavailable", f"{listing.public_id} is {listing.state}: nothing more of it is sold.",
            extra={"listing": listing.public_id},
        )  # fmt: skip
    return quoted.hold_to(listing, contract.quote) if contract.quote and contract.quote.terms else listing


def _level(contract: Contract) -> str:
    return contract.quote.level if contract.quote else "site"


def _check_answer(row: Amendment, contract: Contract, now: datetime) -> None:
    if row.state not in {Amendment.State.OPEN, Amendment.State.EXPIRED}:
        raise MarketError("illegal_transition", f"{row.public_id} is {row.state} already.")
    if row.state == Amendment.State.EXPIRED or row.answer_by <= now:
        raise MarketError("quote_expired", f"{row.public_id} was firm until {row.answer_by:%F %T}Z; ask again.")
    if contract.ends_at != row.old_ends_at or contract.state != Contract.State.ACTIVE:
        raise MarketError("conflict", "The contract has changed since this was proposed; look at it, and ask again.")


def _check(contract: Contract, listing: Listing, asked: Asked, now: datetime) -> None:
    """Is the contract one that may change like this, do its terms and the organization's limit allow it?"""
    ends_at = contract.ends_at
    if contract.state != Contract.State.ACTIVE or contract.terminated_at or ends_at is None or ends_at <= now:
        state = "was terminated" if contract.terminated_at else f"is {contract.state}"
        raise MarketError("illegal_transition", f"The contract {state}; only one in force can change.")
    _check_whole(contract, now)
    if contract.kind not in HOLDING:
        raise MarketError(
            "illegal_transition", f"{contract.kind} holds nothing to add to: ask for another quote at today's price."
        )
    organization: Organization = contract.organization
    if asked.ends_at is None:
        begin = max(contract.starts_at, now)
        chunk = quotes.chunk_of(listing)
        if asked.added % chunk:
            raise MarketError("invalid_request", f"GPUs come by {chunk}.", {"/gpu_count": f"by multiples of {chunk}"})
        check_limit(organization, contract.kind, asked.added, begin, ends_at)
        return
    wrong = "to the minute" if asked.ends_at.second or asked.ends_at.microsecond else ""
    wrong = wrong or ("after its present end" if asked.ends_at <= ends_at else "")
    if wrong:
        raise MarketError("invalid_request", f"ends_at: {wrong}", {"/ends_at": wrong})
    days = contract.terms.get("max_term_days", listing.max_term_days)
    latest = contract.starts_at + timedelta(days=days)
    if asked.ends_at > latest:
        raise MarketError(
            "term_not_offered", f"Its terms go to {days} days, until {latest:%F %R} UTC.",
            {"/ends_at": f"at most {days} days after its start"},
            {"max_term_days": days, "alternatives": {"ends_at": latest.replace(second=0) if latest > ends_at else None}},
        )  # fmt: skip
    check_limit(organization, contract.kind, contract.gpu_count, ends_at, asked.ends_at)


def _check_whole(contract: Contract, now: datetime) -> None:
    """MarketError("illegal_transition") for what was bought from another holder, and while parts of it are offered or sold on."""
    if Fill.objects.filter(contract=contract, resale__isnull=False).exists():
        raise MarketError(
            "illegal_transition",
            "It was bought from another customer, as it stands: ask for a quote for what you need besides.",
        )
    pieces = Resale.objects.filter(contract=contract, ends_at__gt=now).filter(Q(state="open") | Q(sold_gpus__gt=0))
    until = pieces.aggregate(last=Max("ends_at"))["last"]
    if until is not None:
        raise MarketError(
            "illegal_transition",
            f"Parts of it are offered or sold on until {until:%F %R} UTC; withdraw the offers, or ask then.",
        )


def _total(contract: Contract, asked: Asked, begin: datetime, price: int) -> int:
    """What the change adds to the commitment, minor units."""
    assert contract.ends_at is not None
    if asked.ends_at:
        return terms.commitment_minor(contract, contract.ends_at, asked.ends_at)
    return quotes.total_minor(asked.added, begin, contract.ends_at, price, contract.currency)


def _room(contract: Contract, listing: Listing, asked: Asked, now: datetime, code: str) -> Hold:
    """((host id, GPUs), ...) to hold: the contract's own hosts for longer, or what is added. MarketError(`code`) without."""
    reservation = contract.reservation
    if asked.ends_at:
        return _room_for_longer(contract, listing, reservation, asked.ends_at, now, code)
    assert contract.ends_at is not None
    found = availability.admit(
        listing, gpus=asked.added, level=_level(contract), starts_at=max(contract.starts_at, now), ends_at=contract.ends_at,
        now=now, among=holds.neighbours(reservation, _level(contract)),
    )  # fmt: skip
    if found.admitted:
        return tuple((int(str(host)), count) for host, count in found.hold)
    most = found.alternatives.in_window.get(_level(contract), 0) if found.alternatives else 0
    raise MarketError(
        code, f"Fewer than {asked.added} more GPUs are free until {contract.ends_at:%F %R} UTC where the contract's stand.",
        extra={
            "reason": found.reason,
            "alternatives": {
                "gpu_count": contract.gpu_count + most if most else None,
                "listings": _elsewhere(contract, listing, asked.added, max(contract.starts_at, now), contract.ends_at, now),
            },
        },
    )  # fmt: skip


def _room_for_longer(
    contract: Contract, listing: Listing, reservation: Reservation, ends_at: datetime, now: datetime, code: str
) -> Hold:
    own_gpus: Hold = tuple((b.host_id, len(b.gpu_indices)) for b in reservation.blocks.order_by("host_id"))
    assert contract.ends_at is not None
    until = availability.free_until(
        listing, own_gpus, starts_at=contract.ends_at, ends_at=ends_at, now=now, without=(reservation.pk,)
    )
    if until == ends_at:
        return own_gpus
    if contract.starts_at > now:  # nothing runs on them yet: others will do
        found = availability.admit(
            listing, gpus=contract.gpu_count, level=_level(contract), starts_at=contract.starts_at, ends_at=ends_at, now=now,
            without=(reservation.pk,),
        )  # fmt: skip
        if found.admitted:
            return tuple((int(str(host)), count) for host, count in found.hold)
    free = availability.largest(listing, now=now, kind=contract.kind, starts_at=contract.ends_at, ends_at=ends_at)
    again = {
        "listing": listing.public_id, "kind": contract.kind, "gpu_count": contract.gpu_count, "level": _level(contract),
        "starts_at": contract.ends_at, "ends_at": ends_at,
    }  # fmt: skip
    raise MarketError(
        code, f"Its own GPUs are promised to somebody else before {ends_at:%F %R} UTC.",
        extra={
            "reason": "no_capacity_in_window",
            "alternatives": {
                "ends_at": until if until > contract.ends_at else None,
                "quote": {"method": "POST", "path": "/api/v1/quotes", "body": again} if free >= contract.gpu_count else None,
                "listings": _elsewhere(contract, listing, contract.gpu_count, contract.ends_at, ends_at, now),
            },
        },
    )  # fmt: skip


def _elsewhere(
    contract: Contract, listing: Listing, gpus: int, starts_at: datetime, ends_at: datetime, now: datetime
) -> list[dict[str, Any]]:
    """Other listings of the same GPUs that have room, for a contract of their own."""
    asks = search.Filters(
        gpu_model=(listing.gpu_model.name,) if listing.gpu_model else (), kind=contract.kind, start=starts_at, end=ends_at,
        count=gpus, resale=False,
    )  # fmt: skip
    viewer = Actor(kind="user", organization_id=contract.organization_id, livemode=contract.organization.livemode)
    rows = search.search(viewer, asks, now=now, limit=nearest.OTHER_LISTINGS + 1).rows
    return [
        {"listing": row.listing.public_id, "title": row.listing.title, "gpus": row.stock.gpus}
        for row in rows
        if row.listing.pk != listing.pk
    ][: nearest.OTHER_LISTINGS]


def _lengthen(contract: Contract, reservation: Reservation, ends_at: datetime, hold: Hold, now: datetime) -> None:
    reservation.ends_at = ends_at
    reservation.save(update_fields=["ends_at"])
    own_gpus = {b.host_id: len(b.gpu_indices) for b in reservation.blocks.all()}
    if own_gpus == dict(hold):
        holds.lengthen(reservation, now=now)
    else:
        holds.write_blocks(reservation, hold, now=now)
    contract.ends_at = ends_at
    contract.save(update_fields=["ends_at"])


def _grow(
    contract: Contract, reservation: Reservation, listing: Listing, hold: Hold, added: int, now: datetime
) -> datetime:
    """The GPUs join the reservation; answers from when on they are billed."""
    holds.grow(reservation, hold, now=now)
    begin = max(contract.starts_at, now)
    if contract.starts_at <= now and holds.lent_to_spot(reservation):
        begin += timedelta(seconds=availability.lead_s(listing))  # nobody pays for GPUs that spot is still leaving
    earlier = Amendment.objects.filter(contract=contract, kind=Amendment.Kind.RESIZE, state="accepted")
    last = earlier.order_by("-effective_at").values_list("effective_at", flat=True).first()
    if last is not None and last >= begin:  # each has a price version of its own, by its second
        begin = instant(seconds(last) + 1)
    if contract.ends_at is None or begin >= contract.ends_at:
        raise MarketError("term_not_offered", "What is left of the window is over before the GPUs are clear.")
    contract.gpu_count += added
    contract.save(update_fields=["gpu_count"])
    return begin
