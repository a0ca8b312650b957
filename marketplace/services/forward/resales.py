"""Resales: the holder of a reserved or flexible contract offers part of it to others.

What is offered is set aside at once: it leaves the contract's reservation for that window, so nothing of it is sold twice and no new
work of the holder's can come to stand on it then. What is unsold goes back when he takes the offer back, when it expires (at the
latest when the GPUs would have to be clear for a buyer), or when his contract ends early.

The rule of the GPUs. Only what no running job of the contract may still use in the window can be offered. A job that is started later
and still stands on a sold GPU when it must be clear gets its checkpoint signal and queues again, as at any reservation's begin.

The rule of the money. The buyer pays the asked price at signing, for all of the window; the holder is credited that price less the
platform's fee as the window is billed, and goes on owing his own commitment, so the operator's share is what it was. Leaves he his
contract early, what he has sold stays due. Is it ended because he does not pay, his buyers' contracts stand, and what they pay from
then on is the operator's.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Min

from billing.core import share
from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, Listing, Resale, Reservation
from marketplace.services import audit, availability, documents, maintenance, quotes
from marketplace.services.availability import HOLDING, seconds
from marketplace.services.forward import pieces
from marketplace.services.forward.topics import TOLD, nudge_book
from marketplace.tenancy import SYSTEM, Actor
from scheduler.core import capacity

BATCH = 200


@dataclass(frozen=True)
class Asked:
    """What is offered: `gpu_count` in [starts_at, ends_at), UTC to the minute; `price`: millionths of the major unit per GPU-hour;
    `expires_at` None: as late as can be.
    """

    gpu_count: int
    starts_at: datetime
    ends_at: datetime
    price: int
    expires_at: datetime | None = None


@dataclass(frozen=True)
class Terms:
    """What an offer would mean, before it is made; minor units. `gpus`: the most that could be offered in the window."""

    gpus: int
    chunk: int
    expires_at: datetime
    fee_permille: int
    buyer_pays_minor: int
    credited_minor: int
    stays_due_minor: int


def preview(actor: Actor, contract: Contract, asked: Asked, *, now: datetime) -> Terms:
    """The money and the room of an offer, without making it. MarketError as `offer`."""
    now = now.replace(microsecond=0)
    listing = _check(actor, contract, asked, now)
    rows = list(
        contract.reservations.filter(state="firm", maintenance=None, ends_at__gt=now).prefetch_related("blocks")
    )
    chunk = chunk_of(contract)
    free = pieces.sellable(rows, contract, claims_at(listing, asked.starts_at, asked.ends_at, now), asked.ends_at)
    minor = quotes.total_minor(asked.gpu_count, asked.starts_at, asked.ends_at, asked.price, contract.currency)
    own = quotes.total_minor(asked.gpu_count, asked.starts_at, asked.ends_at, contract.price, contract.currency)
    return Terms(
        gpus=sum(len(gpus) // chunk * chunk for gpus in free.values()),
        chunk=chunk,
        expires_at=_expiry(listing, asked, now),
        fee_permille=settings.RESALE_FEE_PERMILLE,
        buyer_pays_minor=minor,
        credited_minor=share.split(minor, settings.RESALE_FEE_PERMILLE).operator,
        stays_due_minor=own,
    )


def offer(actor: Actor, contract: Contract, asked: Asked, *, now: datetime) -> Resale:
    """Set the GPUs aside and put them on the market.

    MarketError: forbidden, illegal_transition (not in force, ended early, not a kind that holds), invalid_request,
    terms_not_accepted, in_use (running jobs may need them then, with `largest`), no_capacity (sold or offered already).
    """
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, contract.cell_id), (Lock.ORG, contract.organization_id))
        fresh = Contract.objects.select_for_update(no_key=True, of=("self",)).select_related(*_WITH).get(pk=contract.pk)
        original = _check(actor, fresh, asked, now)
        documents.require_terms(fresh.organization_id)
        begin = claims_at(original, asked.starts_at, asked.ends_at, now)
        rows = pieces.rows_of(fresh, now)
        chosen = _choose(fresh, rows, asked, begin, chunk_of(fresh))
        pieces.cut(fresh, rows, chosen, begin, asked.ends_at)
        aside = Reservation.objects.create(
            listing_id=fresh.listing_id, starts_at=asked.starts_at, ends_at=asked.ends_at, claims_at=begin,
            state=Reservation.State.FIRM,
        )  # fmt: skip
        pieces.set_blocks(aside, chosen)
        made = Resale.objects.create(
            organization_id=fresh.organization_id, contract=fresh, listing=_listing(fresh, original, asked, begin, now),
            reservation=aside, gpu_count=asked.gpu_count, starts_at=asked.starts_at, ends_at=asked.ends_at,
            expires_at=_expiry(original, asked, now), price=asked.price, fee_permille=settings.RESALE_FEE_PERMILLE,
            currency=fresh.currency, created_at=now, created_by=actor.label[:120],
        )  # fmt: skip
        _tell_contract(made, fresh, actor, now, "offered")
        audit.record(actor, "resale.offered", made.public_id, now=now, after=facts(made))
        nudge_book(fresh.cell.livemode, fresh.gpu_model_id, fresh.site.region)
    return made


_WITH = ("cell", "site", "organization", "quote", "listing__site__cell", "listing__organization", "gpu_model")


def _check(actor: Actor, contract: Contract, asked: Asked, now: datetime) -> Listing:
    """May it be offered like this? The contract's listing, held to the terms that it froze."""
    if actor.organization_id != contract.organization_id:
        raise MarketError("forbidden", "Only the holder of a contract offers part of it.")
    if contract.kind not in HOLDING or contract.ends_at is None:
        raise MarketError("illegal_transition", f"{contract.kind} holds no capacity: there is nothing to sell on.")
    if contract.state != Contract.State.ACTIVE or contract.terminated_at is not None:
        state = "was terminated" if contract.terminated_at else f"is {contract.state}"
        raise MarketError("illegal_transition", f"The contract {state}; only one in force can be sold on.")
    listing = contract.listing
    listing.eviction_notice_s = contract.eviction_notice_s
    wrong: dict[str, str] = {}
    for name, at in (("/starts_at", asked.starts_at), ("/ends_at", asked.ends_at)):
        if at.second or at.microsecond:
            wrong[name] = "to the minute"
    lead = timedelta(seconds=availability.lead_s(listing))
    if asked.starts_at < contract.starts_at.replace(second=0):
        wrong["/starts_at"] = f"not before the contract begins, {contract.starts_at:%F %R} UTC"
    elif asked.starts_at - lead <= now:
        wrong["/starts_at"] = (
            f"at least {lead // timedelta(minutes=1)} minutes ahead, so that the GPUs are clear by then"
        )
    if asked.ends_at > contract.ends_at:
        wrong["/ends_at"] = f"not after the contract ends, {contract.ends_at:%F %R} UTC"
    elif asked.ends_at - asked.starts_at < timedelta(hours=1):
        wrong["/ends_at"] = "at least an hour after the start"
    chunk = chunk_of(contract)
    if asked.gpu_count < 1 or asked.gpu_count % chunk:
        wrong["/gpu_count"] = f"a multiple of {chunk}"
    elif asked.gpu_count > contract.gpu_count:
        wrong["/gpu_count"] = f"at most {contract.gpu_count}: so many does the contract hold"
    if asked.price < 1:
        wrong["/price"] = "must be positive"
    if asked.expires_at is not None and not now < asked.expires_at <= asked.starts_at - lead:
        wrong["/expires_at"] = f"to come, and not after {asked.starts_at - lead:%F %R} UTC"
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)
    return listing


def chunk_of(contract: Contract) -> int:
    """GPUs are sold on by this on one host: the minimum that the contract was sold by, whole hosts at most."""
    agreed = contract.quote.terms.get("min_gpus") if contract.quote_id and contract.quote else None
    blocks = contract.reservations.filter(state="firm", maintenance=None).aggregate(
        least=Min("blocks__host__gpu_count")
    )
    least = agreed or contract.listing.min_gpus
    return max(1, min(int(least), int(blocks["least"] or 1)))


def claims_at(listing: Listing, starts_at: datetime, ends_at: datetime, now: datetime) -> datetime:
    """When the GPUs must be clear for a buyer."""
    return availability.instant(availability.claim_window(listing, starts_at, ends_at, now)[0])


def _expiry(listing: Listing, asked: Asked, now: datetime) -> datetime:
    return asked.expires_at or claims_at(listing, asked.starts_at, asked.ends_at, now)


def _choose(
    contract: Contract, rows: list[Reservation], asked: Asked, begin: datetime, chunk: int
) -> dict[int, list[int]]:
    """Host -> devices to set aside: as tight a block as the contract has free then."""
    free = pieces.sellable(rows, contract, begin, asked.ends_at)
    hosts = [(b.host_id, len(free[b.host_id]), b.host.leaf, b.host.spine) for b in _blocks(rows) if b.host_id in free]
    pool = capacity.Pool.build(capacity.Hosts.of(hosts))
    found = capacity.admit(
        pool, capacity.Shape(chunk), "site", asked.gpu_count, seconds(begin), seconds(asked.ends_at)
    ) if hosts else None  # fmt: skip
    if found is None or not found.admitted:
        most = sum(count // chunk * chunk for _, count, _, _ in hosts)
        busy = sum(len(gpus) for gpus in pieces.busy(contract, begin).values())
        code, why = (
            ("in_use", f"running jobs may need {busy} of them then: give these a limit, or end them")
            if busy
            else ("no_capacity", "the others are offered or sold already")
        )
        raise MarketError(
            code, f"{most} GPUs of {contract.public_id} can be offered in that window; {why}.",
            {"/gpu_count": f"at most {most}"}, {"largest": most},
        )  # fmt: skip
    return {int(str(host)): sorted(free[int(str(host))])[-count:] for host, count in found.hold}


def _blocks(rows: Iterable[Reservation]) -> list[Any]:
    seen: dict[int, Any] = {}
    for row in rows:
        for block in row.blocks.select_related("host"):
            seen.setdefault(block.host_id, block)
    return [seen[host] for host in sorted(seen)]


def _listing(contract: Contract, original: Listing, asked: Asked, begin: datetime, now: datetime) -> Listing:
    """How the market sees the offer: the terms that the contract froze, at the holder's price, in one piece of time."""
    frozen = contract.quote.terms if contract.quote_id and contract.quote else {}

    def term(name: str) -> Any:
        return frozen.get(name, getattr(original, name))

    made = Listing.objects.create(
        organization_id=contract.operator_id, site_id=contract.site_id, gpu_model_id=contract.gpu_model_id,
        title=f"Resale: {term('title')}"[:120],
        description="Part of a customer's contract, sold on. It is taken for all of its window and paid at signing; the operator's "
        "terms are those of the original contract.",
        state=Listing.State.PUBLISHED, visibility=original.visibility, currency=contract.currency, is_resale=True,
        reserved_price=asked.price if contract.kind == "reserved" else None,
        flexible_price=asked.price if contract.kind == "flexible" else None,
        min_gpus=chunk_of(contract), min_term_hours=1, max_term_days=term("max_term_days"), upfront_permille=1000,
        eviction_notice_s=contract.eviction_notice_s, flexible_hours_per_month=contract.flexible_hours_per_month,
        flexible_notice_s=contract.flexible_notice_s, emergency_notice_s=contract.emergency_notice_s, available_from=begin,
        available_until=asked.ends_at,
        interconnect=term("interconnect"), fabric_gbps=term("fabric_gbps"), runtime=term("runtime"), published_at=now,
    )  # fmt: skip
    made.partners.set(original.partners.all())
    return made


# --- the end of an offer
def actions(resale: Resale, actor: Actor) -> list[str]:
    mine = actor.organization_id == resale.organization_id
    return ["withdraw"] if mine and resale.state == Resale.State.OPEN else []


def withdraw(actor: Actor, resale: Resale, *, now: datetime) -> Resale:
    """The holder takes back what is unsold; a quote for it that was not signed is void. MarketError("illegal_transition") where the
    offer is over.
    """
    if actor.organization_id != resale.organization_id:
        raise MarketError("forbidden", "Only the holder withdraws an offer.")
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, resale.contract.cell_id), (Lock.ORG, resale.organization_id))
        fresh = locked(resale.pk)
        if fresh.state != Resale.State.OPEN:
            raise MarketError(
                "illegal_transition", f"{fresh.public_id} is {fresh.state}; there is nothing to withdraw."
            )
        _close(fresh, Resale.State.WITHDRAWN, "withdrawn by its holder", actor, now)
    return fresh


def expire(now: datetime) -> int:
    """Offers whose hour has come give back what is unsold; returns how many. Each in a transaction of its own."""
    due = Resale.objects.filter(state=Resale.State.OPEN, expires_at__lte=now).order_by("expires_at", "pk")
    done = 0
    for pk, cell in list(due.values_list("pk", "contract__cell_id")[:BATCH]):
        with transaction.atomic():
            acquire((Lock.CELL, cell))
            fresh = locked(pk)
            if fresh.state == Resale.State.OPEN and fresh.expires_at <= now:
                _close(fresh, Resale.State.EXPIRED, "nobody bought it in time", SYSTEM, now)
                outbox.emit(
                    TOLD, key=f"{fresh.public_id}-expired", payload={"resale": pk, "what": "expired", "gpus": 0}
                )
                done += 1
    return done


def rejoin(now: datetime) -> int:
    """Contracts whose sold windows are over hold one piece again; returns how many."""
    over = Resale.objects.filter(
        ends_at__lte=now, ends_at__gt=now - timedelta(days=2), contract__state="active", contract__ends_at__gt=now
    ).exclude(state=Resale.State.OPEN)  # fmt: skip
    done = 0
    for pk, cell in sorted(set(over.values_list("contract_id", "contract__cell_id")))[:BATCH]:
        live = Reservation.objects.filter(contract_id=pk, maintenance=None, state="firm", ends_at__gt=now)
        if list(live.values_list("piece", flat=True)) == [False]:
            continue
        with transaction.atomic():
            acquire((Lock.CELL, cell))
            done += pieces.rejoin(Contract.objects.get(pk=pk), now)
    return done


def drop(contract_ids: Collection[int], *, now: datetime, reason: str, give_back: bool) -> int:
    """Open offers of contracts that end early are over. `give_back`: what is unsold is the contract's again, to be ended with it."""
    done = 0
    for pk in (
        Resale.objects.filter(contract_id__in=contract_ids, state="open").order_by("pk").values_list("pk", flat=True)
    ):
        fresh = locked(pk)
        if fresh.state == Resale.State.OPEN:
            _close(fresh, Resale.State.WITHDRAWN, reason, SYSTEM, now, give_back=give_back)
            done += 1
    return done


def hand_back(resale: Resale, gpus: dict[int, list[int]], now: datetime) -> None:
    """GPUs of its window are the seller's again, as far as his contract still goes, with what was announced for them meanwhile."""
    contract = resale.contract
    if contract.state != Contract.State.ACTIVE or contract.ends_at is None:
        return
    end = min(resale.ends_at, contract.ends_at)
    pieces.give_back(contract, gpus, resale.reservation.claims_at, end, now)
    maintenance.meet(contract, gpus.keys(), now=now)


def _close(
    resale: Resale, to: str, reason: str, actor: Actor, now: datetime, *, give_back: bool = True
) -> None:  # fmt: skip
    left = pieces.blocks_of(resale.reservation)
    Reservation.objects.filter(pk=resale.reservation_id).update(state=Reservation.State.RELEASED)
    Listing.objects.filter(pk=resale.listing_id).update(state=Listing.State.RETIRED)
    if give_back:
        hand_back(resale, left, now)
    resale.state, resale.closed_at, resale.reason = to, now, reason[:200]
    resale.save(update_fields=["state", "closed_at", "reason"])
    _tell_contract(resale, resale.contract, actor, now, f"{to}, {resale.gpu_count - resale.sold_gpus} unsold")
    audit.record(
        actor, f"resale.{to}", resale.public_id, now=now, organization_id=resale.organization_id, after=facts(resale)
    )


def locked(pk: int) -> Resale:
    rows = Resale.objects.select_for_update(no_key=True, of=("self",)).select_related(
        "contract", "reservation", "listing"
    )
    found: Resale = rows.get(pk=pk)
    return found


def _tell_contract(resale: Resale, contract: Contract, actor: Actor, now: datetime, what: str) -> None:
    said = f"{resale.public_id}: {resale.gpu_count} GPUs from {resale.starts_at:%F %R} to {resale.ends_at:%F %R} UTC {what}"
    contract.events.create(
        at=now, actor=actor.label[:120], from_state=contract.state, to_state=contract.state, reason=said[:200]
    )


def facts(resale: Resale) -> dict[str, Any]:
    return {
        "state": resale.state, "gpu_count": resale.gpu_count, "sold_gpus": resale.sold_gpus, "price": resale.price,
        "starts_at": resale.starts_at.isoformat(), "ends_at": resale.ends_at.isoformat(),
    }  # fmt: skip
