"""What is offered and agreed: listings, quotes, contracts."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from billing import usage
from billing.models import PriceVersion
from marketplace.models import Contract, Host, Listing, Organization, Quote, Resale, Reservation, Site, StandingBid
from marketplace.services import quoted
from tests.factories import people, places
from tests.factories.rows import NOW, created


def listing(site: Site, *, hosts: Iterable[Host] = (), state: str = "published", **fields: Any) -> Listing:
    """A published offer of every kind; `hosts` are put into it."""
    made = Listing.objects.create(
        organization=site.organization,
        site=site,
        state=state,
        **{
            "gpu_model": places.gpu_model(),
            "title": f"H100 at {site.name}",
            "on_demand_price": 2_500_000,
            "reserved_price": 2_000_000,
            "flexible_price": 1_600_000,
            "spot_floor": 900_000,
            "published_at": NOW if state == "published" else None,
            **fields,
        },
    )
    Host.objects.filter(pk__in=[h.pk for h in hosts]).update(listing=made)
    return made


_offered = listing  # for builders with a parameter of that name


def quote(listing: Listing, organization: Organization, *, kind: str = "on_demand", **fields: Any) -> Quote:
    return Quote.objects.create(
        organization=organization,
        listing=listing,
        kind=kind,
        **{
            "gpu_count": 8,
            "starts_at": NOW,
            "ends_at": NOW + timedelta(days=7),
            "price": listing.price_of(kind),
            "currency": listing.currency,
            "fee_permille": 150,
            "created_at": NOW,
            "held_until": NOW + timedelta(minutes=2),
            "firm_until": NOW + timedelta(minutes=15),
            "listing_version": listing.version,
            "terms": quoted.terms_of(listing, now=NOW),
            **fields,
        },
    )


def contract(
    listing: Listing | None = None, organization: Organization | None = None, *, kind: str = "on_demand", **fields: Any
) -> Contract:
    """An active contract since NOW, open-ended unless `ends_at` is given, with its first event."""
    of = listing or _offered(places.site())
    made = Contract.objects.create(
        organization=organization or people.organization(livemode=of.organization.livemode),
        operator=of.organization,
        listing=of,
        site=of.site,
        cell=of.site.cell,
        kind=kind,
        **{
            "gpu_model": of.gpu_model,
            "gpu_count": 8,
            "starts_at": NOW,
            "price": of.price_of(kind) or 0,
            "currency": of.currency,
            "fee_permille": 150,
            "listing_version": of.version,
            "terms": {"listing": of.public_id, "kind": kind},
            "state": "active",
            "created_at": NOW,
            **fields,
        },
    )
    created(Contract, made)
    return made


def price_version(contract: Contract, millionths: int, at: datetime) -> PriceVersion:
    """Another rate of the contract from the whole second of `at` on, beside those that it has by itself."""
    usage.price_versions(contract)
    return PriceVersion.objects.create(
        contract=contract, valid_from_s=int(at.timestamp()), millionths=millionths, created_at=NOW
    )


def resale(listing: Listing, organization: Organization, **fields: Any) -> Resale:
    """An open offer of two GPUs of a reserved contract of `organization`, without capacity behind it."""
    start, end = NOW + timedelta(days=400), NOW + timedelta(days=401)
    held = contract(listing, organization, kind="reserved", starts_at=start, ends_at=end)
    aside = Reservation.objects.create(listing=listing, starts_at=start, ends_at=end, claims_at=start, state="firm")
    Reservation.objects.create(
        listing=listing, contract=held, starts_at=start, ends_at=end, claims_at=start, state="firm"
    )
    offer = _offered(listing.site, title="Resale", is_resale=True, on_demand_price=None, spot_floor=None)
    return Resale.objects.create(
        organization=organization, contract=held, listing=offer, reservation=aside,
        **{
            "gpu_count": 2, "starts_at": start, "ends_at": end, "expires_at": start, "price": 1_500_000, "fee_permille": 50,
            "currency": "USD", "created_at": NOW, "created_by": "x", **fields,
        },
    )  # fmt: skip


def bid(organization: Organization, site: Site, **fields: Any) -> StandingBid:
    """An open bid for eight GPUs at the site's region, at 2.00 or less."""
    start = NOW + timedelta(days=400)
    return StandingBid.objects.create(
        organization=organization,
        **{
            "gpu_model": places.gpu_model(), "region": site.region, "gpu_count": 8, "min_gpus": 8, "earliest": start, "latest": start,
            "duration_s": 86_400, "limit_price": 2_000_000, "currency": "USD", "livemode": organization.livemode,
            "expires_at": start, "created_at": NOW, **fields,
        },
    )  # fmt: skip
