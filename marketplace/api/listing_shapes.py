"""What goes into and comes out of the routes of listings."""

from typing import Any

from rest_framework import serializers

from marketplace.api import shapes
from marketplace.api.base import PublicId, Shape
from marketplace.api.reliability import ReliabilityShape
from marketplace.api.verifications import ListedVerificationShape
from marketplace.models import Kind, Listing
from marketplace.services import search
from marketplace.services.availability import HOLDING
from scheduler.core.capacity import LEVELS


class FilterShape(Shape):
    """What an offer must have. A list is written with commas."""

    gpu_model = serializers.CharField(required=False, help_text="names, separated by commas")
    vram_min_mib = serializers.IntegerField(required=False, min_value=0)
    region = serializers.CharField(required=False)
    country = serializers.CharField(required=False, help_text="ISO 3166 codes")
    interconnect = serializers.CharField(required=False)
    fabric_gbps_min = serializers.IntegerField(required=False, min_value=0)
    carbon_max_g = serializers.IntegerField(required=False, min_value=0, help_text="g CO2 per kWh")
    runtime = serializers.CharField(required=False)
    where = serializers.CharField(
        required=False,
        max_length=2000,
        help_text="comparisons FIELD OP VALUE, separated by commas, with = != < <= > >= (text: = and !=, alternatives between "
        "bars): `vram_mib>=81920,gpu_model!=L40S|A100-80`. Fields: " + ", ".join(search.COMPARABLE),
    )
    verified = serializers.BooleanField(
        required=False, default=False, help_text="every host of it has passed its benchmark"
    )
    reliability_min = serializers.IntegerField(
        required=False, min_value=0, max_value=1000, help_text="thousandths; what was never counted is left out"
    )
    kind = serializers.ChoiceField(Kind.choices, required=False)
    price_max = serializers.IntegerField(
        required=False, min_value=0, max_value=1 << 60, help_text="millionths per GPU-hour"
    )
    upfront_max_permille = serializers.IntegerField(
        required=False, min_value=0, max_value=1000,
        help_text="of a commitment, at most due at signing; left out: what each listing's plain price asks",
    )  # fmt: skip
    flexible_hours_max = serializers.IntegerField(
        required=False, min_value=0, max_value=720,
        help_text="flexible: hours of curtailment a month, at most; left out: what each listing's plain price asks",
    )  # fmt: skip
    start = serializers.DateTimeField(required=False)
    end = serializers.DateTimeField(required=False)
    count = serializers.IntegerField(required=False, min_value=1, max_value=1_000_000, help_text="GPUs in one block")
    level = serializers.ChoiceField(
        LEVELS, required=False, default="site", help_text="all of the block in one such cell"
    )
    resale = serializers.BooleanField(required=False, help_text="only what customers sell on, or none of it")


def filters_of(query: dict[str, Any]) -> search.Filters:
    """Of a validated FilterShape."""
    asked: dict[str, Any] = {name: query[name] for name in search.FILTER_NAMES if name in query}
    for name in search.FACETS:
        if name in asked:
            asked[name] = tuple(v.strip() for v in asked[name].split(",") if v.strip())
    if "where" in asked:
        asked["where"] = search.comparisons(asked["where"])
    return search.Filters(**asked)


class SearchShape(FilterShape):
    """The query of a search."""

    sort = serializers.ChoiceField(search.SORTS, required=False, default="price")
    limit = serializers.IntegerField(required=False, min_value=1, max_value=100, default=20)
    cursor = serializers.CharField(required=False)
    facets = serializers.BooleanField(required=False, default=False)


class MineShape(Shape):
    mine = serializers.BooleanField()
    state = serializers.ChoiceField(Listing.State.choices, required=False)
    limit = serializers.CharField(required=False)
    cursor = serializers.CharField(required=False)


class TierShape(Shape):
    """One more offer of a kind that holds capacity, beside its plain price."""

    kind = serializers.ChoiceField([k.value for k in HOLDING])
    min_term_hours = serializers.IntegerField(
        min_value=1, max_value=26_304, required=False, default=1, help_text="for terms from so many hours on"
    )
    upfront_permille = serializers.IntegerField(
        min_value=0, max_value=1000, required=False, default=0, help_text="of the commitment, due at signing"
    )
    flexible_hours_per_month = serializers.IntegerField(
        min_value=0, max_value=720, required=False, default=0, help_text="flexible: of curtailment that is borne"
    )
    price = serializers.IntegerField(
        min_value=1, max_value=1 << 50, help_text="millionths of the major unit per GPU-hour"
    )


class TermsShape(Shape):
    """What an operator may change. Prices: millionths of the major unit per GPU-hour; null: not offered."""

    title = serializers.CharField(max_length=120)
    description = serializers.CharField(max_length=10_000, required=False, allow_blank=True)
    gpu_model = serializers.CharField(
        max_length=40, required=False, allow_null=True, help_text="by name; null: a mixed pool"
    )
    visibility = serializers.ChoiceField(Listing.Visibility.choices, required=False)
    partners = serializers.ListField(child=PublicId("org"), max_length=1000, required=False)
    hosts = serializers.ListField(child=PublicId("hst"), max_length=20_000, required=False)
    currency = serializers.CharField(min_length=3, max_length=3, required=False)
    on_demand_price = serializers.IntegerField(min_value=1, max_value=1 << 50, required=False, allow_null=True)
    reserved_price = serializers.IntegerField(min_value=1, max_value=1 << 50, required=False, allow_null=True)
    flexible_price = serializers.IntegerField(min_value=1, max_value=1 << 50, required=False, allow_null=True)
    spot_floor = serializers.IntegerField(min_value=1, max_value=1 << 50, required=False, allow_null=True)
    min_gpus = serializers.IntegerField(min_value=1, max_value=1_000_000, required=False)
    min_term_hours = serializers.IntegerField(min_value=1, max_value=26_304, required=False)
    max_term_days = serializers.IntegerField(min_value=1, max_value=1096, required=False)
    upfront_permille = serializers.IntegerField(
        min_value=0, max_value=1000, required=False, help_text="of a reserved or flexible commitment, due at signing"
    )
    price_tiers = TierShape(
        many=True,
        required=False,
        help_text="a quote takes the cheapest price that meets its term, and what it would pay and bear",
    )
    eviction_notice_s = serializers.IntegerField(min_value=0, max_value=86_400, required=False)
    flexible_hours_per_month = serializers.IntegerField(min_value=0, max_value=720, required=False)
    flexible_notice_s = serializers.IntegerField(min_value=0, max_value=86_400, required=False)
    emergency_notice_s = serializers.IntegerField(
        min_value=0, max_value=86_400, required=False, allow_null=True,
        help_text="in a grid emergency jobs of on-demand, reserved and flexible contracts may be asked to leave, last of all, so long "
        "after it was announced; reserved time that it takes is not charged. null: never",
    )  # fmt: skip
    maintenance_hours_per_month = serializers.IntegerField(
        min_value=0, max_value=744, required=False,
        help_text="of announced maintenance that a reserved or flexible contract bears; beyond it the time is not charged",
    )  # fmt: skip
    available_from = serializers.DateTimeField(required=False, allow_null=True)
    available_until = serializers.DateTimeField(required=False, allow_null=True)
    interconnect = serializers.CharField(max_length=40, required=False, allow_blank=True)
    fabric_gbps = serializers.IntegerField(min_value=0, max_value=1_000_000, required=False)


class DraftShape(TermsShape):
    site = PublicId("sit")


class StockShape(serializers.Serializer):
    gpus = serializers.IntegerField(help_text="most that one block can have, exact at as_of")
    listed = serializers.IntegerField()
    level = serializers.ChoiceField(LEVELS)
    as_of = serializers.DateTimeField()
    heard_at = serializers.DateTimeField(allow_null=True, help_text="the oldest last beat of the hosts counted")


class EachHostShape(serializers.Serializer):
    gpu_count = serializers.IntegerField()
    vcpu_milli = serializers.IntegerField()
    ram_mib = serializers.IntegerField()
    nvme_gib = serializers.IntegerField()
    cap_control = serializers.BooleanField(
        help_text="false: of some of them the power cannot be limited, and they count at nameplate at all times"
    )
    nvlink_gpus = serializers.IntegerField(help_text="of the largest NVLink domain in it; 0: none")


class ListingShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    title = serializers.CharField()
    description = serializers.CharField()
    state = serializers.ChoiceField(Listing.State.choices)
    visibility = serializers.ChoiceField(Listing.Visibility.choices)
    version = serializers.IntegerField()
    published_at = serializers.DateTimeField(allow_null=True)
    operator = serializers.DictField()
    site = serializers.DictField()
    gpu_model = serializers.DictField(allow_null=True)
    host = EachHostShape(allow_null=True, help_text="what each of its hosts has at the least; frozen into contracts")
    interconnect = serializers.CharField()
    fabric_gbps = serializers.IntegerField()
    runtime = serializers.CharField()
    prices = serializers.DictField(
        child=shapes.PriceShape(), help_text="spot: its floor; in a search with a window, or limits, what is asked for"
    )
    price_tiers = TierShape(many=True, help_text="other prices, by term, share due at signing and curtailment")
    spot_price = shapes.PriceShape(allow_null=True, help_text="of the interval in force; null: no spot, or none yet")
    verification = ListedVerificationShape(required=False, help_text="in search and on one listing")
    reliability = ReliabilityShape(allow_null=True, help_text="of its hosts together; null: not counted yet")
    terms = serializers.DictField()
    resale = serializers.DictField(
        allow_null=True,
        help_text="what a customer sells on: its id and the window that is taken as a whole; null: an operator's offer",
    )
    maintenance = shapes.WorkShape(many=True, help_text="announced work on hosts that it offers, soonest first")
    stock = StockShape(required=False)
    actions = serializers.ListField(child=serializers.CharField())


class SearchPage(shapes.page_of("Listing", ListingShape)):  # type: ignore[misc]
    as_of = serializers.DateTimeField()
    facets = serializers.DictField(required=False)
    nothing = serializers.DictField(required=False, help_text="only with no offer: which filter removed the last ones")
