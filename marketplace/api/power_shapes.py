"""What the API answers about a site's watts, for the OpenAPI document."""

from rest_framework import serializers

from marketplace.api.shapes import page_of
from marketplace.models import Curtailment, FeedValue, PowerNode, Site


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
    mandatory = serializers.BooleanField()
    state = serializers.ChoiceField(Curtailment.State.choices)
    actions = serializers.ListField(child=serializers.CharField())


CurtailmentPage = page_of("Curtailment", CurtailmentShape)
