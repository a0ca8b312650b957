"""What goes into and comes out of the routes of the forward market."""

from rest_framework import serializers

from marketplace.api import shapes
from marketplace.api.base import PublicId, Shape
from marketplace.models import Resale, StandingBid
from marketplace.services.availability import HOLDING
from marketplace.services.forward import book
from scheduler.core.capacity import LEVELS

MOST = 1 << 50


class ResaleTermsQuery(Shape):
    gpu_count = serializers.IntegerField(
        min_value=1, max_value=1_000_000, help_text="a multiple of the contract's chunk"
    )
    starts_at = serializers.DateTimeField(help_text="to the minute, inside the contract's window")
    ends_at = serializers.DateTimeField()
    price = serializers.IntegerField(min_value=1, max_value=MOST, help_text="millionths of the major unit per GPU-hour")


class ResaleRequest(ResaleTermsQuery):
    contract = PublicId("ctr")
    expires_at = serializers.DateTimeField(
        required=False,
        allow_null=True,
        default=None,
        help_text="what is unsold then goes back; left out: as late as can be",
    )


class ResaleTermsShape(serializers.Serializer):
    object = serializers.CharField()
    contract = serializers.CharField()
    gpus = serializers.IntegerField(
        help_text="the most that can be offered in the window: what running jobs may need is not"
    )
    chunk = serializers.IntegerField()
    expires_at = serializers.DateTimeField(help_text="the latest: then the GPUs would have to be clear for a buyer")
    fee_permille = serializers.IntegerField(help_text="the platform's part of the price")
    buyer_pays = shapes.MoneyShape(help_text="at signing, for all of it")
    credited = shapes.MoneyShape(help_text="to the seller, as the window is billed: the price less the fee")
    stays_due = shapes.MoneyShape(help_text="of the seller's own commitment for the same GPUs and hours")


class ResaleShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    state = serializers.ChoiceField(Resale.State.choices)
    reason = serializers.CharField(help_text="why it is closed")
    seller = serializers.DictField()
    contract = serializers.CharField()
    listing = serializers.CharField(help_text="how the market sees it: search, quote and accept as any other")
    gpu_count = serializers.IntegerField()
    sold_gpus = serializers.IntegerField()
    left_gpus = serializers.IntegerField(help_text="still on offer")
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField()
    closed_at = serializers.DateTimeField(allow_null=True)
    price = shapes.PriceShape()
    fee_permille = serializers.IntegerField()
    actions = serializers.ListField(child=serializers.CharField())


class BidRequest(Shape):
    gpu_model = serializers.CharField(max_length=40, help_text="by name")
    region = serializers.CharField(max_length=40)
    site = PublicId("sit", required=False, help_text="only there; left out: anywhere in the region")
    kind = serializers.ChoiceField([kind.value for kind in HOLDING], required=False, default="reserved")
    gpu_count = serializers.IntegerField(min_value=1, max_value=1_000_000)
    min_gpus = serializers.IntegerField(
        min_value=1, max_value=1_000_000, required=False, allow_null=True, default=None,
        help_text="the least that one quote may be of; left out: all or nothing",
    )  # fmt: skip
    level = serializers.ChoiceField(
        LEVELS, required=False, default="site", help_text="all GPUs of a quote in one such cell"
    )
    earliest = serializers.DateTimeField(help_text="the first start, to the minute")
    latest = serializers.DateTimeField(
        required=False, allow_null=True, default=None, help_text="the last start; left out: it begins at earliest"
    )
    duration_s = serializers.IntegerField(
        min_value=3600, max_value=1096 * 86_400, help_text="from start to end, whole minutes"
    )
    limit_price = serializers.IntegerField(
        min_value=1, max_value=MOST, help_text="millionths per GPU-hour: the most you would pay"
    )
    expires_at = serializers.DateTimeField(help_text="not after the last start")
    auto_accept = serializers.BooleanField(
        required=False,
        default=False,
        help_text="sign each quote at once, at up to the limit: a binding consent, kept with the bid",
    )
    reference = serializers.CharField(max_length=80, required=False, default="", allow_blank=True)
    metadata = serializers.DictField(required=False, default=dict)


class BidShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    created_at = serializers.DateTimeField()
    state = serializers.ChoiceField(StandingBid.State.choices)
    note = serializers.CharField(help_text="what stands in its way, or what became of it")
    gpu_model = serializers.CharField()
    region = serializers.CharField()
    site = serializers.CharField(allow_null=True)
    kind = serializers.CharField()
    gpu_count = serializers.IntegerField()
    filled_gpus = serializers.IntegerField()
    min_gpus = serializers.IntegerField()
    level = serializers.ChoiceField(LEVELS)
    earliest = serializers.DateTimeField()
    latest = serializers.DateTimeField()
    duration_s = serializers.IntegerField()
    limit_price = shapes.PriceShape()
    expires_at = serializers.DateTimeField()
    closed_at = serializers.DateTimeField(allow_null=True)
    auto_accept = serializers.BooleanField()
    consent = serializers.DictField(allow_null=True, help_text="to auto_accept: who, when, in which words")
    reference = serializers.CharField()
    metadata = serializers.DictField()
    actions = serializers.ListField(child=serializers.CharField())


class BookQuery(Shape):
    gpu_model = serializers.CharField(max_length=40)
    region = serializers.CharField(max_length=40)
    currency = serializers.CharField(min_length=3, max_length=3, required=False, default="USD")
    months = serializers.IntegerField(
        min_value=1, max_value=book.MONTHS, required=False, default=3, help_text="from this one on"
    )


class BookLevelShape(serializers.Serializer):
    price = shapes.PriceShape()
    gpus = serializers.IntegerField()
    count = serializers.IntegerField(help_text="of bids or offers")


class BookMonthShape(serializers.Serializer):
    start = serializers.DateTimeField()
    end = serializers.DateTimeField()
    bids = BookLevelShape(many=True, help_text="the highest first")
    offers = BookLevelShape(
        many=True, help_text="the lowest first: listings with room for the rest of the month, and resales"
    )


class BookShape(serializers.Serializer):
    object = serializers.CharField()
    gpu_model = serializers.CharField()
    region = serializers.CharField()
    currency = serializers.CharField()
    as_of = serializers.DateTimeField()
    months = BookMonthShape(many=True)


class FillShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    at = serializers.DateTimeField()
    gpu_model = serializers.CharField(allow_null=True)
    region = serializers.CharField()
    gpu_count = serializers.IntegerField()
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    price = shapes.PriceShape()
    resale = serializers.BooleanField(help_text="a customer sold it on; else a bid met an operator's own offer")
