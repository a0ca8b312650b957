"""Listings: draft, update, publish, pause, retire. The only writer of Listing and of Host.listing.

An edit never touches a contract: its prices and terms are copies (services.contracts). Each edit makes the next version.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F

from billing.core import money
from marketplace.errors import MarketError
from marketplace.models import (
    Agent,
    GpuModel,
    Host,
    Kind,
    Listing,
    Miner,
    Organization,
    Reservation,
    ReservationBlock,
    Site,
)
from marketplace.services import audit, availability, conditions, feeds, price_tiers
from marketplace.services.forward.topics import nudge_book
from marketplace.services.transitions import legal_actions
from marketplace.tenancy import Actor
from scheduler.core import economics

# What an operator may set. The runtime is what the site's agent says it is; nobody types it in.
EDITABLE = (
    "title", "description", "visibility", "gpu_model_id", "currency", "on_demand_price", "reserved_price", "flexible_price",
    "spot_floor", "price_tiers",
    "min_gpus", "min_term_hours", "max_term_days", "upfront_permille", "eviction_notice_s", "flexible_hours_per_month",
    "flexible_notice_s", "emergency_notice_s", "maintenance_hours_per_month", "available_from", "available_until", "interconnect",
    "fabric_gbps",
)  # fmt: skip
MOST_NOTICE_S = 86_400
PRICES = ("on_demand_price", "reserved_price", "flexible_price", "spot_floor")
SHARED_RUNTIMES = frozenset({"process", "virtual"})  # no isolation between tenants: for test cells, or named partners
ACTIONS = {"published": "publish", "paused": "pause", "retired": "retire"}


def draft(
    actor: Actor, site: Site, fields: dict[str, Any], *, hosts: Collection[int] | None = None,
    partners: Collection[int] = (), now: datetime,
) -> Listing:  # fmt: skip
    """A new draft at one of the actor's own sites. `fields`: some of EDITABLE; `hosts`: ids to offer in it."""
    _own(actor, site.organization_id)
    with transaction.atomic():
        listing = Listing(organization_id=site.organization_id, site=site, runtime=_runtime(site), **_known(fields))
        _check_terms(listing)
        listing.save()
        listing.partners.set(partners)
        if hosts is not None:
            assign_hosts(listing, hosts, now=now)
        audit.record(actor, "listing.created", listing.public_id, now=now, after=_plain(fields))
    return listing


def update(
    actor: Actor, listing: Listing, fields: dict[str, Any], *, hosts: Collection[int] | None = None,
    partners: Collection[int] | None = None, expected_version: int | None = None, now: datetime,
) -> Listing:  # fmt: skip
    """Change a listing that is not retired; a published one must still be fit for publishing. The next version comes of it.

    `expected_version`: MarketError("conflict") where somebody was faster.
    """
    _own(actor, listing.organization_id)
    with transaction.atomic():
        fresh = _locked(listing)
        if fresh.state == Listing.State.RETIRED:
            raise MarketError("illegal_transition", "The listing is retired; draft a new one.")
        if expected_version is not None and fresh.version != expected_version:
            raise MarketError("conflict", f"The listing is at version {fresh.version}, not {expected_version}.")
        before = {name: getattr(fresh, name) for name in fields}
        for name, value in _known(fields).items():
            setattr(fresh, name, value)
        _check_terms(fresh)
        fresh.version += 1
        fresh.save()
        if partners is not None:
            fresh.partners.set(partners)
        if hosts is not None:
            assign_hosts(fresh, hosts, now=now)
        if fresh.state == Listing.State.PUBLISHED:
            check_complete(fresh, now=now)
            nudge_book(fresh.site.cell.livemode, fresh.gpu_model_id, fresh.site.region)
        audit.record(actor, "listing.updated", fresh.public_id, now=now, before=_plain(before), after=_plain(fields))
    return fresh


def assign_hosts(listing: Listing, host_ids: Collection[int], *, now: datetime) -> None:
    """The hosts offered are exactly these. A host is in at most one listing that is not retired; one with promised GPUs stays."""
    wanted = set(host_ids)
    present = set(listing.hosts.values_list("pk", flat=True)) if listing.pk else set()
    rows = {h.pk: h for h in Host.objects.filter(pk__in=wanted | present).order_by("pk").select_for_update(no_key=True)}
    for pk in wanted:
        _check_host(listing, rows.get(pk))
    leaving = present - wanted
    from_elsewhere = {pk for pk in wanted if rows[pk].listing_id not in {None, listing.pk}}
    promised = _promised(leaving | from_elsewhere, now)
    if promised:
        names = ", ".join(sorted(rows[pk].name for pk in promised))
        raise MarketError("conflict", f"Contracts or quotes hold GPUs of {names}; they can leave when those end.")
    Host.objects.filter(pk__in=leaving, listing=listing).update(listing=None)
    Host.objects.filter(pk__in=wanted).update(listing=listing)
    conditions.record(hosts=wanted | leaving, now=now)


def _promised(host_ids: Collection[int], now: datetime) -> set[int]:
    live = Reservation.objects.filter(availability.live_reservations(now)).exclude(
        contract=None, maintenance__isnull=False
    )
    blocks = ReservationBlock.objects.filter(host_id__in=host_ids, reservation__in=live)
    return set(blocks.values_list("host_id", flat=True))


def _check_host(listing: Listing, host: Host | None) -> None:
    if host is None or host.site_id != listing.site_id:
        raise MarketError("invalid_request", "A host is not at the listing's site.", {"/hosts": "not at this site"})
    if host.state == Host.State.RETIRED:
        raise MarketError("invalid_request", f"Host {host.name} is retired.", {"/hosts": f"{host.name} is retired"})
    if listing.gpu_model_id is not None and host.gpu_model_id != listing.gpu_model_id:
        raise MarketError(
            "invalid_request", f"Host {host.name} has another GPU model.", {"/hosts": f"{host.name}: another GPU model"}
        )
    if host.listing_id is not None and host.listing_id != listing.pk:
        other = Listing.objects.get(pk=host.listing_id)
        if other.state != Listing.State.RETIRED:
            raise MarketError(
                "conflict",
                f"Host {host.name} is offered in {other.public_id} ({other.title}); take it out there first.",
            )


def publish(actor: Actor, listing: Listing, *, now: datetime) -> Listing:
    """Put it on offer; MarketError("listing_incomplete") names every field that is in the way."""
    _own(actor, listing.organization_id)
    with transaction.atomic():
        fresh = _locked(listing)
        fresh.runtime = _runtime(fresh.site, fresh.runtime)
        check_complete(fresh, now=now)
        first = fresh.published_at or now
        return _move(actor, fresh, Listing.State.PUBLISHED, now, published_at=first, runtime=fresh.runtime)


def pause(actor: Actor, listing: Listing, *, now: datetime) -> Listing:
    """Off the market, to come back. Contracts and firm quotes go on."""
    _own(actor, listing.organization_id)
    with transaction.atomic():
        return _move(actor, _locked(listing), Listing.State.PAUSED, now)


def retire(actor: Actor, listing: Listing, *, now: datetime) -> Listing:
    """Off the market for good. Contracts go on with their frozen terms, so the hosts stay where they are until another listing takes
    them.
    """
    _own(actor, listing.organization_id)
    with transaction.atomic():
        return _move(actor, _locked(listing), Listing.State.RETIRED, now)


def actions(listing: Listing) -> list[str]:
    """What its operator may do now: nothing with what a customer sells on."""
    if listing.is_resale:
        return []
    moves = [ACTIONS[state] for state in legal_actions(Listing, listing.state)]
    return sorted([*moves, *([] if listing.state == Listing.State.RETIRED else ["update"])])


def _move(actor: Actor, listing: Listing, to: str, now: datetime, **columns: Any) -> Listing:
    expected = [state for state, after in Listing.TRANSITIONS.items() if to in after]
    moved = Listing.objects.filter(pk=listing.pk, state__in=expected).update(
        state=to, version=F("version") + 1, **columns
    )
    if not moved:
        raise MarketError(
            "illegal_transition",
            f"The listing is {listing.state}; it can become {to} only from {', '.join(sorted(expected))}.",
        )
    audit.record(
        actor, f"listing.{to}", listing.public_id, now=now, before={"state": listing.state}, after={"state": to}
    )
    conditions.record(listings=[listing.pk], now=now)
    listing.refresh_from_db()
    if to == Listing.State.PUBLISHED:
        nudge_book(listing.site.cell.livemode, listing.gpu_model_id, listing.site.region)
    return listing


def _locked(listing: Listing) -> Listing:
    rows = Listing.objects.select_related("site__cell", "gpu_model").select_for_update(of=("self",), no_key=True)
    found: Listing = rows.get(pk=listing.pk)
    if found.is_resale:
        raise MarketError("forbidden", "It is a customer's offer of part of a contract: its holder alone changes it.")
    return found


def _own(actor: Actor, organization_id: int) -> None:
    if actor.kind != "system" and actor.organization_id != organization_id:
        raise MarketError("forbidden", "Only the operator of the site changes its listings.")


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    unknown = set(fields) - set(EDITABLE)
    if unknown:
        raise MarketError("unknown_field", ", ".join(sorted(unknown)), {f"/{u}": "unknown field" for u in unknown})
    if "price_tiers" in fields:
        return {**fields, "price_tiers": price_tiers.completed(fields["price_tiers"])}
    return fields


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in fields.items()}


def _runtime(site: Site, present: str = "process") -> str:
    """As the site's newest agent says; without one, as it stands."""
    found = Agent.objects.filter(site=site, revoked_at=None).order_by("-id").values_list("runtime", flat=True).first()
    return found or present


def _check_terms(listing: Listing) -> None:
    """What can never be right, also in a draft."""
    wrong: dict[str, str] = {}
    for name in PRICES:
        price = getattr(listing, name)
        if price is not None and price < 1:
            wrong[f"/{name}"] = "must be positive"
    if listing.currency not in money.EXPONENTS:
        wrong["/currency"] = f"{listing.currency} is not a currency that we bill in"
    if listing.min_gpus < 1:
        wrong["/min_gpus"] = "at least 1"
    if not 1 <= listing.max_term_days <= 1096:
        wrong["/max_term_days"] = "1 to 1096"
    elif not 1 <= listing.min_term_hours <= 24 * listing.max_term_days:
        wrong["/min_term_hours"] = "at least 1, at most the longest term"
    if listing.upfront_permille > 1000:
        wrong["/upfront_permille"] = "at most 1000: all of the commitment"
    if listing.flexible_hours_per_month > 720:
        wrong["/flexible_hours_per_month"] = "at most 720"
    if (listing.emergency_notice_s or 0) > MOST_NOTICE_S:
        wrong["/emergency_notice_s"] = f"at most {MOST_NOTICE_S}, or empty: firm contracts never leave"
    opens, closes = listing.available_from, listing.available_until
    if opens and closes and opens >= closes:
        wrong["/available_until"] = "after available_from"
    wrong |= price_tiers.wrong(listing)
    if wrong:
        raise MarketError("invalid_request", "; ".join(f"{k}: {v}" for k, v in wrong.items()), wrong)


def check_complete(listing: Listing, *, now: datetime) -> None:
    """May it be on offer? MarketError("listing_incomplete") with a message per field."""
    missing: dict[str, str] = {}
    hosts = list(listing.hosts.exclude(state=Host.State.RETIRED))
    if not hosts:
        missing["/hosts"] = "assign at least one host"
    if all(getattr(listing, name) is None for name in PRICES):
        missing["/on_demand_price"] = "set at least one price"
    if not listing.title.strip():
        missing["/title"] = "give it a title"
    if listing.gpu_model_id is not None and any(host.gpu_model_id != listing.gpu_model_id for host in hosts):
        missing["/gpu_model"] = "is not that of every host in it"
    if hosts:
        missing.update(_chunk_problem(listing, hosts))
    if not listing.site.power_nodes.filter(parent=None).exists():
        missing["/site"] = "the site has no power tree yet"
    if (
        listing.site.cell.livemode
        and listing.visibility == Listing.Visibility.PUBLIC
        and listing.runtime in SHARED_RUNTIMES
    ):
        missing["/runtime"] = (
            f"the site's agent runs jobs as {listing.runtime}, which does not keep tenants apart; "
            "use an isolating runtime, or offer it to named partners only"
        )
    floor = floor_of(listing, now=now) if listing.spot_floor is not None else 0
    if listing.spot_floor is not None and listing.spot_floor < floor:
        missing["/spot_floor"] = f"its watts cost, or earn hashing, {floor} millionths per GPU-hour: not under that"
    if missing:
        said = "; ".join(f"{name.strip('/').replace('_', ' ')}: {words}" for name, words in missing.items())
        raise MarketError("listing_incomplete", f"{said}.", missing)


def _chunk_problem(listing: Listing, hosts: Sequence[Host]) -> dict[str, str]:
    total, smallest = sum(h.gpu_count for h in hosts), min(h.gpu_count for h in hosts)
    if listing.min_gpus > total:
        return {"/min_gpus": f"{listing.min_gpus} GPUs at least, but only {total} are listed"}
    if listing.min_gpus > smallest and listing.min_gpus % smallest:
        return {"/min_gpus": f"beyond one host ({smallest} GPUs) it must be a multiple of whole hosts"}
    return {}


def floor_of(listing: Listing, *, now: datetime) -> int:
    """The least a spot GPU-hour may cost, millionths of the major unit: what its watts cost, or would earn hashing, plus our fee.

    Without a fresh price the site's own stands for it, and without a fresh hashprice hashing counts nothing. 0 for listings that are
    not in USD (nobody exchanges currencies here) or have no hosts.
    """
    host = listing.hosts.exclude(state=Host.State.RETIRED).order_by("-gpu_max_w", "id").first()
    if host is None or listing.currency != "USD":
        return 0
    site = listing.site
    rates = feeds.rates(site, now=now)
    found = rates.hashing
    efficiency = None if found is None else _best_efficiency(site)
    hashing = 0
    if found is not None and efficiency is not None:
        hashing = economics.break_even_uusd_per_mwh(
            found.hashprice_uusd, efficiency, pool_fee_ppm=found.pool_fee_ppm, pue_permille=found.pue_permille
        )
    share = economics.gpu_share_w(host.base_w, max(1, host.gpu_count), host.gpu_max_w)
    cost = economics.spot_floor(share, site.pue_permille, rates.energy.uusd_mwh, hashing)
    kept: int = 1000 - settings.PLATFORM_FEE_PERMILLE  # the fee lies inside the price
    return -(-cost * 1000 // kept)


def _best_efficiency(site: Site) -> int | None:
    """mJ/TH of the most efficient mode of the site's machines: those that hash first."""
    ladders = Miner.objects.filter(site=site).order_by().values_list("mode_watts", "mode_ghs").distinct()
    modes = [
        watts * 1_000_000 // ghs
        for mode_watts, mode_ghs in ladders
        for watts, ghs in zip(mode_watts, mode_ghs, strict=True)
        if ghs > 0 and watts > 0
    ]
    return min(modes, default=None)


def price_of(listing: Listing, kind: str, *, now: datetime) -> int:
    """What a GPU-hour costs now in its plain terms, millionths of the major unit; spot never under its floor.
    MarketError("kind_not_offered") with what is offered.
    """
    price: int | None = listing.price_of(kind)
    if price is None:
        offered = [k for k in Kind.values if listing.price_of(k) is not None]
        raise MarketError(
            "kind_not_offered", f"{kind} is not offered; {', '.join(offered)} are.", {"/kind": "not offered"},
            {"offered": offered},
        )  # fmt: skip
    return max(price, floor_of(listing, now=now)) if kind == Kind.SPOT else price


# --- what an operator's request names
def own_hosts(actor: Actor, wanted: Collection[int]) -> list[int]:
    """Ids of hosts at the actor's own sites; MarketError("invalid_request") where one is not."""
    mine = sorted(Host.objects.owned_by(actor.organization_id).filter(pk__in=wanted).values_list("pk", flat=True))
    if len(mine) != len(set(wanted)):
        raise MarketError("invalid_request", "hosts: there is none of that id.", {"/hosts": "unknown"})
    return mine


def gpu_model_id(name: str) -> int:
    found = GpuModel.objects.filter(name=name).values_list("pk", flat=True).first()
    if found is None:
        raise MarketError("invalid_request", f"gpu_model: {name} is not known.", {"/gpu_model": "unknown"})
    return found


def partner_ids(wanted: Collection[int]) -> list[int]:
    known = sorted(Organization.objects.filter(pk__in=wanted).values_list("pk", flat=True))
    if len(known) != len(set(wanted)):
        raise MarketError("invalid_request", "partners: there is none of that id.", {"/partners": "unknown"})
    return known
