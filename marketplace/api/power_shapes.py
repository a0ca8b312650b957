"""What the API answers about a site's watts, for the OpenAPI document."""

from rest_framework import serializers

from marketplace.api.shapes import page_of
from marketplace.models import Curtailment, FeedValue, GridSource, PowerNode, Site


class PowerStateShape(serializers.Serializer):
    """A node's books; watts."""

    id = serializers.CharField()
    name = serializers.CharField()
    parent = serializers.CharField(allow_null=True, help_text="its name")  # type: ignore[assignment]  # a column's name; DRF's own attribute is the instance's
    kind = serializers.ChoiceField(PowerNode.Kind.choices)
    cap_w = serializers.IntegerField()
    limit_w = serializers.IntegerField(allow_null=True, help_text="what a curtailment leaves")
    fixed_w = serializers.IntegerField()
    margin_w = serializers.IntegerField()
    reserved_w = serializers.IntegerField()
    free_w = serializers.IntegerField()
    measured_w = serializers.IntegerField(allow_null=True)
    measured_at = serializers.DateTimeField(allow_null=True)


class MinersAwakeShape(serializers.Serializer):
    awake = serializers.IntegerField()
    asleep = serializers.IntegerField()


class FeedShape(serializers.Serializer):
    """The newest value of a feed; a stale one is shown and not used."""

    kind = serializers.ChoiceField(FeedValue.Kind.choices)
    value = serializers.IntegerField()
    zone = serializers.CharField()
    source = serializers.CharField()  # type: ignore[assignment]  # a column's name; DRF's own attribute is the instance's
    observed_at = serializers.DateTimeField()
    stale = serializers.BooleanField()


class PowerNowShape(serializers.Serializer):
    object = serializers.CharField()
    site = serializers.CharField()
    mode = serializers.ChoiceField(Site.Mode.choices)
    frozen = serializers.BooleanField(help_text="by the platform's freeze: whatever its mode, nothing rises")
    nodes = PowerStateShape(many=True, help_text="parents first")
    miners = MinersAwakeShape()
    pending_w = serializers.IntegerField(help_text="granted, and still being shed")
    hashprice_microusd_per_ph_day = serializers.IntegerField(allow_null=True)
    energy_microusd_per_mwh = serializers.IntegerField(
        help_text="the market's or the site's, with what the tariff adds"
    )
    tariff_microusd_per_mwh = serializers.IntegerField(help_text="of that, what the tariff adds now")
    feeds = FeedShape(many=True)


class MinuteShape(serializers.Serializer):
    start = serializers.DateTimeField()
    firm_w = serializers.IntegerField()
    flexible_w = serializers.IntegerField()
    spot_w = serializers.IntegerField()
    idle_gpu_w = serializers.IntegerField()
    hashing_w = serializers.IntegerField()
    overhead_w = serializers.IntegerField()
    metered_w = serializers.IntegerField(allow_null=True)
    cap_w = serializers.IntegerField()
    hashing_mwh = serializers.IntegerField(help_text="milliwatt-hours")
    ai_mwh = serializers.IntegerField(help_text="milliwatt-hours")
    hashing_microusd = serializers.IntegerField()
    energy_microusd = serializers.IntegerField()


class MinuteSumsShape(serializers.Serializer):
    hashing_mwh = serializers.IntegerField()
    ai_mwh = serializers.IntegerField()
    hashing_microusd = serializers.IntegerField()
    energy_microusd = serializers.IntegerField()


class SiteMinutesShape(serializers.Serializer):
    object = serializers.CharField()
    site = serializers.CharField()
    data = MinuteShape(many=True, help_text="newest last")  # type: ignore[assignment]  # lists are `data`
    sums = MinuteSumsShape()


class CurtailmentShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    site = serializers.CharField()
    node = serializers.CharField()
    source = serializers.CharField()  # type: ignore[assignment]  # a column's name; DRF's own attribute is the instance's
    reference = serializers.CharField()
    cap_w = serializers.IntegerField(help_text="what the node may draw meanwhile")
    starts_at = serializers.DateTimeField()
    ends_at = serializers.DateTimeField()
    ended_at = serializers.DateTimeField(allow_null=True, help_text="since then its limit does not stand any more")
    mandatory = serializers.BooleanField(help_text="economic otherwise: machines sleep, no job is touched")
    emergency = serializers.BooleanField(help_text="contracts that name emergencies give way too, last of all")
    grid_source = serializers.CharField(allow_null=True, help_text="the source that made it")
    state = serializers.ChoiceField(Curtailment.State.choices)
    actions = serializers.ListField(child=serializers.CharField())


CurtailmentPage = page_of("Curtailment", CurtailmentShape)


class MissShape(serializers.Serializer):
    miner = serializers.CharField()
    reason = serializers.CharField(
        help_text="stale_telemetry, unreachable, phantom_load, acknowledged_no_drop, below_minimum, dwell, maintenance"
    )
    watts = serializers.IntegerField(help_text="booked for it all the same")


class TouchedJobShape(serializers.Serializer):
    job = serializers.CharField()
    contract = serializers.CharField()
    kind = serializers.CharField()
    what = serializers.ChoiceField(
        ["left", "left_in_emergency", "held_lower"],
        help_text="left_in_emergency: firm, and its contract names emergencies",
    )
    at = serializers.DateTimeField()
    held_s = serializers.IntegerField(help_text="held_lower: seconds, of its replica that was held the longest")


class CallCreditShape(serializers.Serializer):
    contract = serializers.CharField()
    kind = serializers.CharField()
    why = serializers.ChoiceField(
        ["off_the_bill", "held_lower"],
        help_text="off_the_bill: the contract's jobs left and it is free for the whole call; held_lower: by the power withheld",
    )
    milli_gpu_seconds = serializers.IntegerField()
    amount_minor = serializers.IntegerField(
        help_text="by the clock, minor units of the currency; invoices say it exactly"
    )
    currency = serializers.CharField()


class SecondShape(serializers.Serializer):
    at = serializers.DateTimeField()
    watts = serializers.IntegerField(help_text="mean of the step")
    delivered_w = serializers.IntegerField(help_text="baseline less watts")


class CurtailmentReportShape(serializers.Serializer):
    object = serializers.CharField()
    curtailment = serializers.CharField()
    finished = serializers.BooleanField(help_text="false: so far")
    baseline_w = serializers.IntegerField()
    baseline_how = serializers.ChoiceField(["meter", "books"])
    delivered_wh = serializers.IntegerField()
    under_after_s = serializers.IntegerField(
        allow_null=True, help_text="until the meter was under the cap; null: never"
    )
    restored_s = serializers.IntegerField(allow_null=True, help_text="from its end until it was as before")
    hashing_lost_microusd = serializers.IntegerField()
    energy_saved_microusd = serializers.IntegerField()
    paid_microusd = serializers.IntegerField(help_text="by its programme, for what was delivered")
    misses = MissShape(many=True)
    jobs = TouchedJobShape(many=True)
    credits = CallCreditShape(many=True, help_text="what customers do not pay because of it")
    seconds = SecondShape(many=True)


class GridSourceShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.CharField()
    site = serializers.CharField()
    node = serializers.CharField()
    kind = serializers.ChoiceField(GridSource.Kind.choices)
    name = serializers.CharField()
    enabled = serializers.BooleanField()
    cap_w = serializers.IntegerField(help_text="what the node is held to where the signal names no watts")
    pays_uusd_mwh = serializers.IntegerField()
    stale_after_s = serializers.IntegerField()
    stale_policy = serializers.ChoiceField(GridSource.Stale.choices)
    settings = serializers.DictField(help_text="of its kind; a secret is never shown")
    has_secret = serializers.BooleanField()
    heard_at = serializers.DateTimeField(allow_null=True)
    silent = serializers.BooleanField(help_text="for longer than stale_after_s: its policy holds")
    reading = serializers.IntegerField(allow_null=True)
    error = serializers.CharField()


GridSourcePage = page_of("GridSource", GridSourceShape)
