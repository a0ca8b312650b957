"""What a quote freezes of its listing. The contract is made of this, whatever becomes of the listing in the meantime."""

from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from marketplace.compiled import Compiled, slot
from marketplace.errors import MarketError
from marketplace.models import Listing, Quote
from marketplace.models.listings import hosts_behind
from marketplace.services import feeds, host_shape
from marketplace.services.price_tiers import Option
from scheduler.core import economics

FROZEN = (
    "title", "interconnect", "fabric_gbps", "runtime", "min_gpus", "min_term_hours", "max_term_days", "eviction_notice_s",
    "flexible_hours_per_month", "flexible_notice_s", "emergency_notice_s", "upfront_permille", "maintenance_hours_per_month",
)  # fmt: skip
ASKS = ("upfront_permille", "flexible_hours_per_month")  # that a price tier has instead of the listing


_WATTS = Compiled(
    lambda is_resale: (
        hosts_behind(slot("listing"), is_resale=is_resale)
        .filter(gpu_count__gt=0)
        .order_by()
        .values_list("base_w", "gpu_count", "gpu_max_w")
    )
)


def terms_of(listing: Listing, option: Option | None = None, *, now: datetime) -> dict[str, Any]:
    """The listing's terms as they are now; prices, currency and fee stand in the quote's own columns. `option`: the offer that is
    quoted, with what it asks in place of the plain terms.
    """
    site = listing.site
    return {
        **{name: getattr(listing, name) for name in FROZEN},
        **({} if option is None else {name: value for name, value in vars(option).items() if name in ASKS}),
        "price_term_hours": option.min_term_hours if option else 0,
        "operator": listing.organization.name,
        "site": site.name,
        "region": site.region,
        "country": site.country,
        "gpu_model": listing.gpu_model.name if listing.gpu_model else None,
        "gpu_model_id": listing.gpu_model_id,
        "host": host_shape.of_listing(listing),
        "energy": energy(listing, now),
    }


def energy(listing: Listing, now: datetime) -> dict[str, Any] | None:
    """What a GPU draws at the meter when its host runs at full power, the site's overhead included (W), and the grid's price of now
    (micro-USD/MWh), None where no feed publishes one: what a site pays by its own tariff is nobody else's business.
    """
    watts = _WATTS(listing.is_resale, listing=listing.pk)
    if not watts:
        return None
    share = max(economics.gpu_share_w(*each) for each in watts)
    price = feeds.published_energy(listing.site, now=now)
    return {
        "gpu_w": -(-share * listing.site.pue_permille // 1000),
        "grid_uusd_mwh": None if price is None else price.value,
        "grid_source": "" if price is None else _who(price.source),
    }


def _who(source: str) -> str:
    """Who publishes it, for a buyer: of an address the host alone, for the rest of it may hold a key, or is a path of ours."""
    found = urlsplit(source)
    return (found.hostname or "") if found.scheme else source


def hold_to(listing: Listing, quote: Quote) -> Listing:
    """`listing` with the terms that `quote` froze, for working out its capacity; not to be saved."""
    for name in FROZEN:
        setattr(listing, name, quote.terms.get(name, getattr(listing, name)))
    return listing


def check_offered(listing: Listing, quote: Quote) -> None:
    """MarketError("listing_unavailable") where the operator has withdrawn the listing since. A pause is no withdrawal: what is
    firm stays firm for its minutes.
    """
    if listing.state == Listing.State.RETIRED:
        raise MarketError(
            "listing_unavailable",
            f"{listing.public_id} was withdrawn by its operator after {quote.public_id} was made; nothing was signed. Search again.",
            extra={"listing": listing.public_id},
        )
