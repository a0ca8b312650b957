"""What goes into and comes out of the routes of sites, hosts and miners."""

from zoneinfo import available_timezones

from rest_framework import serializers

from marketplace.api.base import Shape
from marketplace.models import Host, Miner, PowerNode, Site
from marketplace.services import drains, imports, job_rules
from marketplace.services.columns import MAX_W

MICRO = 1_000_000
TIMEZONES = frozenset(available_timezones())


def _timezone(text: str) -> None:
    if text not in TIMEZONES:
        raise serializers.ValidationError("not a name of the tz database, such as America/Chicago")


class SitePowerShape(serializers.Serializer):
    cap_w = serializers.IntegerField(help_text="the lower of the contract power and a curtailment's limit")
    fixed_w = serializers.IntegerField()
    margin_w = serializers.IntegerField()
    reserved_w = serializers.IntegerField(help_text="what devices may draw, with their overhead")
    headroom_w = serializers.IntegerField()
    measured_w = serializers.IntegerField(allow_null=True)


class UpdateSiteShape(Shape):
    name = serializers.CharField(max_length=80, required=False)
    country = serializers.RegexField("^[A-Z]{2}$", required=False, help_text="ISO 3166")
    timezone = serializers.CharField(max_length=40, required=False, validators=[_timezone])
    grid_operator = serializers.CharField(max_length=40, required=False, allow_blank=True)
    energy_price_microusd_per_kwh = serializers.IntegerField(min_value=0, max_value=10**9, required=False)
    carbon_g_per_kwh = serializers.IntegerField(min_value=0, max_value=5000, required=False, allow_null=True)
    renewable_permille = serializers.IntegerField(min_value=0, max_value=1000, required=False, allow_null=True)
    tariff = serializers.ListField(
        child=serializers.DictField(),
        required=False,
        max_length=20,
        help_text="parts by time of use and coincident peak: docs/power.md",
    )
    pool_scheme = serializers.ChoiceField(Site.PoolScheme.choices, required=False)
    pool_fee_ppm = serializers.IntegerField(min_value=0, max_value=200_000, required=False, allow_null=True)
    switch_cost_uusd = serializers.IntegerField(
        min_value=0, max_value=100 * MICRO, required=False, help_text="of one miner's change of mode, micro-USD"
    )


class CreateSiteShape(UpdateSiteShape):
    name = serializers.CharField(max_length=80)
    region = serializers.RegexField(r"^[a-z0-9-]{2,34}$", help_text="such as us-tx")
    contract_power_w = serializers.IntegerField(min_value=1000, max_value=MAX_W)
    fixed_w = serializers.IntegerField(min_value=0, max_value=MAX_W, required=False, default=0)
    pue_permille = serializers.IntegerField(min_value=1000, max_value=5000, required=False, default=1250)
    miner_pue_permille = serializers.IntegerField(min_value=1000, max_value=5000, required=False, default=1050)
    metering = serializers.ChoiceField(PowerNode.Metering.choices, required=False, default="meter")


class SiteShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["site"])
    created_at = serializers.DateTimeField()
    name = serializers.CharField()
    cell = serializers.CharField(help_text="the region's planning unit")
    region = serializers.CharField()
    country = serializers.CharField()
    timezone = serializers.CharField()
    grid_operator = serializers.CharField()
    contract_power_w = serializers.IntegerField()
    pue_permille = serializers.IntegerField()
    miner_pue_permille = serializers.IntegerField()
    energy_price_microusd_per_kwh = serializers.IntegerField()
    carbon_g_per_kwh = serializers.IntegerField(allow_null=True)
    renewable_permille = serializers.IntegerField(allow_null=True)
    tariff = serializers.ListField(child=serializers.DictField())
    pool_scheme = serializers.ChoiceField(Site.PoolScheme.choices)
    pool_fee_ppm = serializers.IntegerField(allow_null=True, help_text="empty: the house's default")
    switch_cost_uusd = serializers.IntegerField(help_text="of one miner's change of mode, micro-USD")
    mode = serializers.ChoiceField(Site.Mode.choices)
    frozen = serializers.BooleanField(help_text="by the platform's freeze: whatever its mode, nothing rises")
    power = SitePowerShape()
    actions = serializers.ListField(child=serializers.CharField(), help_text="modes that can follow")


class ModeShape(Shape):
    mode = serializers.ChoiceField(Site.Mode.choices)


class UpdatePowerNodeShape(Shape):
    cap_w = serializers.IntegerField(min_value=1, max_value=MAX_W, required=False)
    fixed_w = serializers.IntegerField(min_value=0, max_value=MAX_W, required=False)
    metering = serializers.ChoiceField(PowerNode.Metering.choices, required=False)
    overhead_gpu_permille = serializers.IntegerField(min_value=1000, max_value=5000, required=False)
    overhead_miner_permille = serializers.IntegerField(min_value=1000, max_value=5000, required=False)


class NewPowerNodeShape(UpdatePowerNodeShape):
    name = serializers.CharField(max_length=60)
    parent = serializers.CharField(  # type: ignore[assignment]
        max_length=60, required=False, default="", allow_blank=True, help_text="its name"
    )
    kind = serializers.ChoiceField(["building", "transformer", "pdu"], required=False, default="pdu")
    cap_w = serializers.IntegerField(min_value=1, max_value=MAX_W, help_text="continuous rating, W")


class PowerNodeShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["power_node"])
    site = serializers.CharField()
    name = serializers.CharField()
    kind = serializers.ChoiceField(PowerNode.Kind.choices)
    parent = serializers.CharField(allow_null=True)  # type: ignore[assignment]
    depth = serializers.IntegerField()
    cap_w = serializers.IntegerField()
    limit_w = serializers.IntegerField(allow_null=True, help_text="what a curtailment leaves")
    fixed_w = serializers.IntegerField()
    margin_w = serializers.IntegerField()
    metering = serializers.ChoiceField(PowerNode.Metering.choices)
    overhead_gpu_permille = serializers.IntegerField()
    overhead_miner_permille = serializers.IntegerField()
    reserved_w = serializers.IntegerField()
    headroom_w = serializers.IntegerField()
    measured_w = serializers.IntegerField(allow_null=True)
    measured_at = serializers.DateTimeField(allow_null=True)


class ImportShape(Shape):
    kind = serializers.ChoiceField(imports.KINDS)
    csv = serializers.CharField(max_length=8 << 20, trim_whitespace=False, help_text="at most 20,000 rows")


class RowErrorShape(serializers.Serializer):
    line = serializers.IntegerField(help_text="the heading is line 1")
    column = serializers.CharField()
    value = serializers.CharField(allow_blank=True)
    message = serializers.CharField()


class ImportCountsShape(serializers.Serializer):
    created = serializers.IntegerField(required=False)
    updated = serializers.IntegerField(required=False)
    unchanged = serializers.IntegerField(required=False)
    drained = serializers.IntegerField(required=False)


class ImportReportShape(serializers.Serializer):
    object = serializers.ChoiceField(["import_report"])
    kind = serializers.ChoiceField(imports.KINDS)
    dry_run = serializers.BooleanField()
    rows = serializers.IntegerField()
    counts = ImportCountsShape()
    errors = RowErrorShape(many=True, help_text="the first 200")  # type: ignore[assignment]
    error_count = serializers.IntegerField()


class EnrolmentShape(serializers.Serializer):
    object = serializers.ChoiceField(["enrolment_token"])
    site = serializers.CharField()
    token = serializers.CharField(allow_null=True, help_text="shown once; null when the answer is replayed")
    url = serializers.CharField(help_text="what the agent is told: python -m agent enrol --url URL")
    expires_at = serializers.DateTimeField()


class AgentShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["agent"])
    created_at = serializers.DateTimeField()
    site = serializers.CharField()
    name = serializers.CharField()
    version = serializers.CharField()
    runtime = serializers.CharField()
    last_sync_at = serializers.DateTimeField(allow_null=True)
    lease_until = serializers.DateTimeField(allow_null=True)
    revoked_at = serializers.DateTimeField(allow_null=True)


class SickGpuShape(serializers.Serializer):
    index = serializers.IntegerField()
    since = serializers.DateTimeField(allow_null=True)
    error = serializers.CharField(help_text="what it reported")


class HostShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["host"])
    site = serializers.CharField()
    power_node = serializers.CharField(help_text="its name")
    listing = serializers.CharField(allow_null=True)
    name = serializers.CharField()
    state = serializers.ChoiceField(Host.State.choices)
    state_reason = serializers.CharField()
    leaves_at = serializers.DateTimeField(allow_null=True, help_text="while draining: it takes what ends before then")
    taints = serializers.ListField(
        child=serializers.CharField(), help_text="only jobs that tolerate all of them come here"
    )
    gpu_model = serializers.CharField()
    gpus = serializers.IntegerField()
    vram_mib = serializers.IntegerField(help_text="per GPU")
    vcpu_milli = serializers.IntegerField()
    ram_mib = serializers.IntegerField()
    nvme_gib = serializers.IntegerField()
    leaf = serializers.CharField()
    spine = serializers.CharField()
    nvlink_domains = serializers.ListField(child=serializers.IntegerField(), help_text="per GPU")
    gpu_free = serializers.ListField(child=serializers.IntegerField(), help_text="thousandths free, per GPU")
    vcpu_free_milli = serializers.IntegerField()
    ram_free_mib = serializers.IntegerField()
    nvme_free_gib = serializers.IntegerField()
    sick_gpus = SickGpuShape(many=True, help_text="nothing uses them; the host drains until a benchmark passes")
    cap_control = serializers.BooleanField()
    power_state = serializers.ChoiceField(Host.PowerState.choices)
    reserved_w = serializers.IntegerField()
    measured_w = serializers.IntegerField(allow_null=True)
    beat_at = serializers.DateTimeField(allow_null=True)
    reliability_permille = serializers.IntegerField(allow_null=True, help_text="null: not counted yet")
    actions = serializers.ListField(child=serializers.CharField())


class DrainShape(Shape):
    reason = serializers.CharField(max_length=120, help_text="for you: on the host and in the audit trail")
    category = serializers.ChoiceField(
        list(drains.CATEGORIES), required=False, default="other", help_text="the kind of work, as customers read it"
    )
    public = serializers.BooleanField(
        required=False, default=False, help_text="those whose jobs run there may read the reason, too"
    )
    until = serializers.DateTimeField(
        required=False, allow_null=True, default=None, help_text="when it is likely back, as customers read it"
    )
    evict = serializers.BooleanField(
        required=False, default=False, help_text="ask what runs to leave too: checkpoint signal, grace, requeue"
    )
    by = serializers.DateTimeField(
        required=False, allow_null=True, default=None,
        help_text="until then it takes what is sure to end before; what still runs then is asked to leave",
    )  # fmt: skip


class TaintsShape(Shape):
    taints = serializers.ListField(child=serializers.RegexField(job_rules.TAINT), max_length=16)


class DrainedShape(serializers.Serializer):
    """What became of a site's hosts."""

    object = serializers.ChoiceField(["drain"])
    site = serializers.CharField()
    hosts = serializers.IntegerField(help_text="how many of them it changed")


class MinerModeShape(serializers.Serializer):
    name = serializers.CharField()
    watts = serializers.IntegerField()
    ghs = serializers.IntegerField(help_text="GH/s")


class MinerShape(serializers.Serializer):
    id = serializers.CharField()
    object = serializers.ChoiceField(["miner"])
    site = serializers.CharField()
    power_node = serializers.CharField(help_text="its name")
    name = serializers.CharField()
    model = serializers.CharField()
    driver = serializers.CharField()
    address = serializers.CharField()
    modes = MinerModeShape(many=True, help_text="the ladder; the first is sleep")
    state = serializers.ChoiceField(Miner.State.choices)
    manual = serializers.BooleanField()
    mode = serializers.CharField(help_text="the one commanded")
    reserved_w = serializers.IntegerField()
    measured_w = serializers.IntegerField(allow_null=True)
    measured_ghs = serializers.IntegerField(allow_null=True)
    measured_at = serializers.DateTimeField(allow_null=True)


class ManualShape(Shape):
    manual = serializers.BooleanField()
    mode = serializers.CharField(max_length=24, required=False, help_text="of its ladder; only with manual: true")
