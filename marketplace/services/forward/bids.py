"""Standing bids: what a buyer would take until when, and at most for how much.

A bid turns into quotes, price first, then time (scheduler.core.orders), when capacity or a price meets it: after each change of its
book (GPU model and region) and every half minute. A quote is an ordinary one, held and firm for its minutes, and its bidder is told;
only a bid that says so (`auto_accept`, a consent on the record) signs by itself, at up to its limit. A bid never becomes on-demand.

What a quote may still take counts as taken, so that a bid never asks for more than it wants. Who lets a quote lapse waits REST before
the next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from django.db import transaction
from django.db.models import Q, Sum

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, GpuModel, Kind, Listing, Organization, Quote, Site, StandingBid
from marketplace.services import audit, availability, contracts, documents, price_tiers, quotes, terms
from marketplace.services.availability import HOLDING, instant, seconds
from marketplace.services.forward.topics import TOLD, nudge_book
from marketplace.services.price_tiers import Option
from marketplace.tenancy import SYSTEM, Actor
from scheduler.core import orders
from scheduler.core.capacity import LEVELS, Hosts, Pool

LINE = 200  # bids of a book that are matched together, the first of its line; the next so many where these find nothing
LINES = 10  # of a book in one look: bids that nothing can meet do not keep those behind them from what there is
OFFERS = 60  # whose room is loaded for them: the cheapest of those that suit one of them
BATCH = 500
MOST_OPEN = 50  # bids of one organization
REST = timedelta(hours=1)
AHEAD = timedelta(days=365)
ASKS = 64  # ids of asks that one listing may take: two kinds, the plain price and its tiers
UNSEEN = Pool.build(Hosts.of(()))  # the room of an ask that nobody has looked at
CONSENT = "I agree that each quote of this bid is accepted for us at once, at up to the limit, with the terms of service {version}."


@dataclass(frozen=True)
class Wanted:
    """See StandingBid. `latest` None: it must begin at `earliest`; `min_gpus` None: all of it or nothing."""

    gpu_model: str
    region: str
    gpu_count: int
    earliest: datetime
    duration_s: int
    limit_price: int
    expires_at: datetime
    latest: datetime | None = None
    min_gpus: int | None = None
    level: str = "site"
    kind: str = "reserved"
    site_id: int | None = None
    auto_accept: bool = False
    reference: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def place(actor: Actor, wanted: Wanted, *, now: datetime) -> StandingBid:
    """A bid, in its line from now on. MarketError: organization_required, invalid_request, limit_exceeded, card_required,
    billing_suspended, terms_not_accepted.
    """
    if actor.organization_id is None:
        raise MarketError("organization_required", "Bids are made for an organization.")
    now = now.replace(microsecond=0)
    organization = Organization.objects.get(pk=actor.organization_id)
    model = _check(wanted, organization, actor.livemode, now)
    with transaction.atomic():
        acquire((Lock.ORG, organization.pk))
        contracts.check_standing(organization.pk)
        documents.require_terms(organization.pk)
        standing = StandingBid.objects.filter(organization=organization, state=StandingBid.State.OPEN)
        if standing.count() >= MOST_OPEN:
            raise MarketError(
                "limit_exceeded",
                f"{MOST_OPEN} bids stand open already; cancel one.",
                extra={"limit": "bids", "allowed": MOST_OPEN},
            )
        consent = {"by": actor.label, "at": now.isoformat(), "words": CONSENT.format(version=documents.CURRENT)}
        row = StandingBid.objects.create(
            organization=organization, created_by_id=actor.user_id, gpu_model=model, region=wanted.region,
            site_id=wanted.site_id, kind=wanted.kind, gpu_count=wanted.gpu_count, min_gpus=wanted.min_gpus or wanted.gpu_count,
            level=wanted.level, earliest=wanted.earliest, latest=wanted.latest or wanted.earliest, duration_s=wanted.duration_s,
            limit_price=wanted.limit_price, currency=organization.currency, livemode=actor.livemode,
            expires_at=wanted.expires_at, auto_accept=wanted.auto_accept, consent=consent if wanted.auto_accept else {},
            created_at=now, reference=wanted.reference, metadata=wanted.metadata,
        )  # fmt: skip
        audit.record(
            actor, "bid.placed", row.public_id, now=now,
            after={"gpu_count": row.gpu_count, "limit_price": row.limit_price, "auto_accept": row.auto_accept},
        )  # fmt: skip
        nudge_book(row.livemode, model.pk, row.region)
    return row


def _check(wanted: Wanted, organization: Organization, livemode: bool, now: datetime) -> GpuModel:
    wrong: dict[str, str] = {}
    model = GpuModel.objects.filter(name=wanted.gpu_model).first()
    if model is None:
        wrong["/gpu_model"] = "is not known"
    sites = Site.objects.filter(region=wanted.region, cell__livemode=livemode)
    if not sites.exists():
        wrong["/region"] = "there is no site"
    elif wanted.site_id is not None and not sites.filter(pk=wanted.site_id).exists():
        wrong["/site"] = "is not in that region"
    if wanted.kind not in HOLDING:
        wrong["/kind"] = f"one of {', '.join(HOLDING)}: a bid never becomes anything else"
    if wanted.level not in LEVELS:
        wrong["/level"] = f"one of {', '.join(LEVELS)}"
    if wanted.gpu_count < 1:
        wrong["/gpu_count"] = "at least 1"
    elif not 1 <= (wanted.min_gpus or wanted.gpu_count) <= wanted.gpu_count:
        wrong["/min_gpus"] = "1 to gpu_count"
    if wanted.limit_price < 1:
        wrong["/limit_price"] = "must be positive"
    latest = wanted.latest or wanted.earliest
    for name, at in (("/earliest", wanted.earliest), ("/latest", latest)):
        if at.second or at.microsecond:
            wrong[name] = "to the minute"
    if latest < wanted.earliest:
        wrong["/latest"] = "not before earliest"
    elif latest <= now:
        wrong["/latest"] = "is in the past"
    elif latest > now + AHEAD:
        wrong["/latest"] = "at most a year ahead"
    if wanted.duration_s < 3600 or wanted.duration_s % 60:
        wrong["/duration_s"] = "at least an hour, in whole minutes"
    if not now < wanted.expires_at <= latest:
        wrong["/expires_at"] = "to come, and not after the latest start"
    if wrong or model is None:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)
    if wanted.gpu_count > organization.gpu_limit:
        raise MarketError(
            "limit_exceeded", f"{wanted.gpu_count} GPUs; the organization may have {organization.gpu_limit} at once.",
            extra={"limit": "gpus", "allowed": organization.gpu_limit},
        )  # fmt: skip
    return model


def actions(bid: StandingBid, actor: Actor) -> list[str]:
    mine = actor.organization_id == bid.organization_id
    return ["cancel"] if mine and bid.state == StandingBid.State.OPEN else []


def cancel(actor: Actor, bid: StandingBid, *, now: datetime) -> StandingBid:
    """It looks for nothing any more; a quote it has made stays firm for its minutes. MarketError("illegal_transition") unless open."""
    if actor.organization_id != bid.organization_id:
        raise MarketError("forbidden", "Only its bidder cancels a bid.")
    with transaction.atomic():
        acquire((Lock.ORG, bid.organization_id))
        if not _close([bid.pk], StandingBid.State.CANCELLED, "cancelled by its bidder", now):
            bid.refresh_from_db()
            raise MarketError("illegal_transition", f"{bid.public_id} is {bid.state}.")
        audit.record(actor, "bid.cancelled", bid.public_id, now=now)
    bid.refresh_from_db()
    return bid


def _close(pks: Iterable[int], to: str, note: str, now: datetime) -> int:
    return StandingBid.objects.filter(pk__in=list(pks), state=StandingBid.State.OPEN).update(
        state=to, closed_at=now.replace(microsecond=0), note=note
    )


def tick(now: datetime) -> int:
    """Bids whose hour has come expire, and every book with bids is looked at; returns how many books."""
    due = StandingBid.objects.filter(state=StandingBid.State.OPEN, expires_at__lte=now).order_by("expires_at", "pk")
    for row in due[:BATCH]:
        with transaction.atomic():
            if _close([row.pk], StandingBid.State.EXPIRED, "nothing met it in time", now):
                audit.record(SYSTEM, "bid.expired", row.public_id, now=now, organization_id=row.organization_id)
                outbox.emit(TOLD, key=f"{row.public_id}-expired", payload={"bid": row.pk, "what": "expired", "gpus": 0})
    books = StandingBid.objects.filter(state=StandingBid.State.OPEN).order_by("livemode", "gpu_model", "region")
    found = list(books.values_list("livemode", "gpu_model", "region").distinct())
    with transaction.atomic():
        for book in found:
            nudge_book(*book)
    return len(found)


# --- matching
@dataclass(frozen=True)
class Looked:
    """What one look at a book came to, in quotes and contracts; `refused`: matches that fell through when they were quoted."""

    bids: int = 0
    quoted: int = 0
    bought: int = 0
    refused: int = 0


def run(livemode: bool, gpu_model_id: int, region: str, *, now: datetime) -> Looked:
    """Match one book: read, think outside any transaction, then quote each match under the cell's lock, where it is admitted anew."""
    now = now.replace(microsecond=0)
    bids = _line(livemode, gpu_model_id, region, now)
    if not bids:
        return Looked()
    offers = _offers(livemode, gpu_model_id, region, max(bid.limit for bid in bids))
    StandingBid.objects.filter(pk__in=[bid.id for bid in bids]).update(tried_at=now)
    for first in range(0, len(bids), LINE):
        line = bids[first : first + LINE]
        if found := orders.match(line, _asks(offers, line, now), seconds(now)):
            ends = [_quote(match, now) for match in found]
            return Looked(len(bids), ends.count("quoted"), ends.count("bought"), ends.count("refused"))
    return Looked(len(bids))


def _line(livemode: bool, gpu_model_id: int, region: str, now: datetime) -> list[orders.Bid]:
    """The first of the line, for the GPUs each still looks for: less what its firm quotes may take."""
    rows = StandingBid.objects.filter(
        Q(rests_until=None) | Q(rests_until__lte=now), livemode=livemode, gpu_model=gpu_model_id, region=region, state="open",
        expires_at__gt=now, latest__gt=now,
    )  # fmt: skip
    line = list(rows.order_by("-limit_price", "created_at", "id")[: LINE * LINES])
    asked = pending([row.pk for row in line], now)
    return [_as_order(row, left) for row in line if (left := row.wanted - asked.get(row.pk, 0)) > 0]


def pending(bid_ids: Sequence[int], now: datetime) -> dict[int, int]:
    """GPUs of quotes that may still be accepted, per bid."""
    firm = Quote.objects.filter(bid__in=bid_ids, state=Quote.State.OPEN, firm_until__gt=now).order_by()
    return dict(firm.values_list("bid").annotate(gpus=Sum("gpu_count")))


def _as_order(bid: StandingBid, gpus: int) -> orders.Bid:
    return orders.Bid(
        id=bid.pk, since=seconds(bid.created_at), limit=bid.limit_price, gpus=gpus, least=min(bid.min_gpus, gpus),
        level=bid.level, earliest=seconds(bid.earliest), latest=seconds(bid.latest), duration=bid.duration_s, kind=bid.kind,
        buyer=bid.organization_id, site=bid.site_id or 0,
    )  # fmt: skip


def _offers(livemode: bool, gpu_model_id: int, region: str, most: int) -> list[tuple[orders.Ask, Listing]]:
    """What somebody's limit reaches, the cheapest first, as asks whose room nobody has looked at."""
    rows = Listing.objects.filter(
        Q(reserved_price__lte=most) | Q(flexible_price__lte=most) | ~Q(price_tiers=[]), state=Listing.State.PUBLISHED,
        gpu_model=gpu_model_id, site__region=region, site__cell__livemode=livemode,
    ).select_related("site", "resale").prefetch_related("partners")  # fmt: skip
    found = [
        (_as_ask(row, kind, n, option), row)
        for row in rows
        for kind in HOLDING
        for n, option in enumerate(price_tiers.unasked(row, kind))
        if option.price <= most
    ]
    return sorted(found, key=lambda offer: (offer[0].price, offer[0].since, offer[0].id))


def _as_ask(listing: Listing, kind: str, number: int, option: Option) -> orders.Ask:
    """One of the listing's prices; all of one listing sell the same capacity."""
    resale = listing.resale if listing.is_resale else None
    only = None
    if listing.visibility == Listing.Visibility.PARTNERS:
        only = frozenset([listing.organization_id, *(partner.pk for partner in listing.partners.all())])
    return orders.Ask(
        id=ASKS * listing.pk + 2 * number + (kind == Kind.FLEXIBLE),
        since=seconds(listing.published_at or listing.created_at), price=option.price, kind=kind, shelf=listing.pk,
        pool=UNSEEN, chunk=1, least=listing.min_gpus, lead=availability.lead_s(listing),
        site=listing.site_id, shortest=max(listing.min_term_hours, option.min_term_hours) * 3600, longest=listing.max_term_days * 86_400,
        window=None if resale is None else (seconds(resale.starts_at), seconds(resale.ends_at)), only=only,
        never=0 if resale is None else resale.organization_id,
    )  # fmt: skip


def _asks(offers: Iterable[tuple[orders.Ask, Listing]], bids: Sequence[orders.Bid], now: datetime) -> list[orders.Ask]:
    """The first of those that suit one of the bids, with their room."""
    suitable = (
        (ask, row) for ask, row in offers if any(ask.price <= bid.limit and orders.suits(bid, ask) for bid in bids)
    )
    asks: list[orders.Ask] = []
    markets: dict[int, availability.Market] = {}
    for ask, listing in islice(suitable, OFFERS):
        if listing.pk not in markets:
            markets[listing.pk] = availability.load([listing], now)
        market = markets[listing.pk]
        asks.append(ask._replace(pool=market.pool, chunk=market.chunks[listing.pk]))
    return asks


def _quote(match: orders.Match, now: datetime) -> str:
    """Quote one match for its bidder, and sign where the bid says so: quoted | bought | refused | stale."""
    shown = StandingBid.objects.get(pk=match.bid)
    listing = Listing.objects.select_related("site").get(pk=match.ask // ASKS)
    actor = Actor(
        kind="user", organization_id=shown.organization_id, role="owner", user_id=shown.created_by_id, livemode=shown.livemode,
        label=f"bid {shown.public_id}",
    )  # fmt: skip
    asked = quotes.Request(
        shown.kind, match.gpus, shown.level, starts_at=instant(match.start), ends_at=instant(match.end)
    )
    try:
        with transaction.atomic():
            acquire((Lock.CELL, listing.site.cell_id), (Lock.ORG, shown.organization_id))
            bid = StandingBid.objects.select_for_update(no_key=True).get(pk=match.bid)
            if bid.wanted - pending([bid.pk], now).get(bid.pk, 0) < match.gpus or bid.expires_at <= now:
                return "stale"
            contracts.check_standing(bid.organization_id)
            made = quotes.quote(
                actor, listing.pk, asked, reference=bid.reference, metadata=bid.metadata, bid=bid, now=now
            )
            _check_limit(bid, made)
            contract = _sign(actor, bid, made, now)
            what = "quoted" if contract is None else "bought"
            StandingBid.objects.filter(pk=bid.pk).update(
                rests_until=made.firm_until + REST if contract is None else None,
                note=f"{made.public_id}: {match.gpus} GPUs quoted"
                if contract is None
                else f"{contract.public_id} signed",
            )
            outbox.emit(
                TOLD, key=f"{made.public_id}-{what}",
                payload={"bid": bid.pk, "what": what, "gpus": match.gpus, "quote": made.pk},
            )  # fmt: skip
            audit.record(
                actor, f"bid.{what}", bid.public_id, now=now,
                after={"quote": made.public_id, "contract": contract.public_id if contract else None},
            )  # fmt: skip
    except MarketError as error:
        StandingBid.objects.filter(pk=match.bid).update(note=str(error)[:200])
        return "refused"
    return what


def _check_limit(bid: StandingBid, quote: Quote) -> None:
    """The offer may have become dearer since it was read."""
    if quote.price > bid.limit_price:
        raise MarketError("conflict", f"{quote.listing.public_id} asks {quote.price} now, more than the limit.")


def _sign(actor: Actor, bid: StandingBid, quote: Quote, now: datetime) -> Contract | None:
    """The contract, where the bidder has agreed to it before; None where a person decides, or where it cannot be signed now: the quote
    is then firm as any other. What gives way in a grid emergency a person has to have read.
    """
    if not bid.auto_accept or terms.emergency_notice_s(quote) is not None:
        return None
    try:
        with transaction.atomic():
            return contracts.accept(actor, quote.pk, now=now)
    except MarketError:
        return None
