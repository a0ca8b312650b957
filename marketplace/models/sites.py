"""Where: cells, sites, the power tree, hosts and their GPUs, miners, and the agents that speak for them."""

from typing import Any

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import F, Func, Q

from marketplace.models.accounts import Organization
from marketplace.tenancy import TenantModel, TenantQuerySet

MAX_GPUS_PER_HOST = 16


class AllNonNegative(Func):
    """`0 <= ALL(array)`: the database itself refuses an oversold GPU."""

    template = "0 <= ALL(%(expressions)s)"
    output_field: Any = models.BooleanField()
    conditional = True


class Cell(TenantModel):
    """The unit that one scheduling cycle plans. `generation` fences an older cycle's commit."""

    PREFIX = "cel"

    name = models.CharField(max_length=40, unique=True)
    region = models.CharField(max_length=40)
    livemode = models.BooleanField(default=True)
    generation = models.BigIntegerField(default=0)
    layout = models.BigIntegerField(
        default=0, editable=False, help_text="Grows when a host leaves the cell (set by a trigger)"
    )

    def __str__(self) -> str:
        return self.name


class Site(TenantModel):
    PREFIX = "sit"

    class Mode(models.TextChoices):
        AUTO = "auto"
        HOLD = "hold"
        SHED = "shed"
        OFF = "off"

    class PoolScheme(models.TextChoices):
        """How the pool pays: subsidy and fees as expected, the subsidy alone, or by blocks found (the same on average as FPPS)."""

        FPPS = "fpps"
        PPS = "pps"
        PPLNS = "pplns"

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="sites")
    cell = models.ForeignKey(Cell, on_delete=models.PROTECT, related_name="sites")
    name = models.CharField(max_length=80)
    region = models.CharField(max_length=40)
    country = models.CharField(max_length=2, default="US")
    timezone = models.CharField(max_length=40, default="UTC")
    grid_operator = models.CharField(max_length=40, blank=True)
    contract_power_w = models.BigIntegerField()
    pue_permille = models.PositiveIntegerField(default=1250, help_text="Power usage effectiveness x 1000, for GPU load")
    miner_pue_permille = models.PositiveIntegerField(default=1050)
    energy_price_microusd_per_kwh = models.BigIntegerField(
        default=45_000, help_text="Tariff where no price feed is attached"
    )
    tariff = models.JSONField(
        default=list, blank=True, help_text="what is added to the price of energy, by time (scheduler.core.tariffs)"
    )
    pool_scheme = models.CharField(max_length=8, choices=PoolScheme, default=PoolScheme.FPPS)
    pool_fee_ppm = models.PositiveIntegerField(
        null=True, blank=True, help_text="the pool's fee in millionths; empty: POOL_FEE_PERMILLE"
    )
    switch_cost_uusd = models.PositiveIntegerField(
        default=20_000,
        help_text="what it costs when a miner changes its mode, micro-USD: wear, and what is not hashed on the way",
    )
    carbon_g_per_kwh = models.PositiveIntegerField(null=True, blank=True)
    renewable_permille = models.PositiveIntegerField(null=True, blank=True)
    mode = models.CharField(max_length=8, choices=Mode, default=Mode.AUTO)
    desired_generation = models.BigIntegerField(
        default=0, help_text="Grows with every change of what shall be at this site"
    )
    safety_generation = models.BigIntegerField(
        default=0, help_text="Grows with every change of caps, margins or shed order"
    )
    dispatched_at = models.DateTimeField(null=True, blank=True, help_text="last slow tier of the dispatch")
    sampled_at = models.DateTimeField(null=True, blank=True, help_text="energy is accounted for up to here")
    created_at = models.DateTimeField(auto_now_add=True)

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "name"], name="site_name_once")]

    def __str__(self) -> str:
        return self.name


class ControlPulse(models.Model):
    """One row: when the control plane was last seen alive. Leases do not run out while it was not (services.leases)."""

    at = models.DateTimeField()
    resumed_at = models.DateTimeField(null=True, help_text="when it was back after its last absence")

    def __str__(self) -> str:
        return f"{self.at:%F %T}"


class SiteOwnedQuerySet(TenantQuerySet):
    tenant_paths = ("site__organization",)


class PowerNode(TenantModel):
    """A node of the power tree. Invariant: reserved_mw + 1000 * (fixed_w + margin_w) <= 1000 * cap_w (marketplace.services.power)."""

    PREFIX = "nod"

    class Kind(models.TextChoices):
        SITE = "site"
        BUILDING = "building"
        TRANSFORMER = "transformer"
        PDU = "pdu"

    class Metering(models.TextChoices):
        METER = "meter"
        FIRMWARE = "firmware"
        NAMEPLATE = "nameplate"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="power_nodes")
    parent = models.ForeignKey("self", null=True, blank=True, on_delete=models.PROTECT, related_name="children")
    name = models.CharField(max_length=60)
    kind = models.CharField(max_length=16, choices=Kind, default=Kind.PDU)
    depth = models.PositiveSmallIntegerField(default=0)
    cap_w = models.BigIntegerField(help_text="Continuous rating, W")
    limit_w = models.BigIntegerField(
        null=True, blank=True, help_text="A curtailment's cap, W; the lower of the two holds"
    )
    hashing_limit_w = models.BigIntegerField(
        null=True, blank=True, help_text="An economic curtailment's, W: hashing keeps under it, work is not bound by it"
    )
    fixed_w = models.BigIntegerField(default=0, help_text="Always on, W")
    margin_w = models.BigIntegerField(default=0, help_text="Kept free by metering quality, W")
    metering = models.CharField(max_length=12, choices=Metering, default=Metering.NAMEPLATE)
    overhead_gpu_permille = models.PositiveIntegerField(default=1000)
    overhead_miner_permille = models.PositiveIntegerField(default=1000)
    reserved_mw = models.BigIntegerField(
        default=0, help_text="Sum over devices below of reserved W x overhead per mille, in mW"
    )
    measured_w = models.BigIntegerField(null=True, blank=True)
    measured_at = models.DateTimeField(null=True, blank=True)

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["site", "name"], name="power_node_name_once")]

    def __str__(self) -> str:
        return f"{self.site}/{self.name}"

    @property
    def allowed_mw(self) -> int:
        """Most that devices below may reserve, mW: the lower of cap and limit, less what is always on and the margin."""
        cap = self.cap_w if self.limit_w is None else min(self.cap_w, self.limit_w)
        return 1000 * (cap - self.fixed_w - self.margin_w)


class GpuModel(models.Model):
    name = models.CharField(max_length=40, unique=True)
    vram_mib = models.PositiveIntegerField()
    tdp_w = models.PositiveIntegerField()

    def __str__(self) -> str:
        return self.name


class Host(TenantModel):
    """A GPU server. The `*_free` columns are the truth that commit re-checks; the database refuses negative ones."""

    PREFIX = "hst"

    class State(models.TextChoices):
        ACTIVE = "active"
        DRAINING = "draining"
        MAINTENANCE = "maintenance"
        LOST = "lost"
        RETIRED = "retired"

    class PowerState(models.TextChoices):
        OFF = "off"
        PARKED = "parked"
        CAPPED = "capped"
        FULL = "full"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="hosts")
    cell = models.ForeignKey(Cell, on_delete=models.PROTECT, related_name="hosts")
    power_node = models.ForeignKey(PowerNode, on_delete=models.PROTECT, related_name="hosts")
    listing = models.ForeignKey(
        "marketplace.Listing", null=True, blank=True, on_delete=models.SET_NULL, related_name="hosts"
    )
    gpu_model = models.ForeignKey(GpuModel, on_delete=models.PROTECT, related_name="hosts")
    name = models.CharField(max_length=60)
    state = models.CharField(max_length=12, choices=State, default=State.ACTIVE)
    state_reason = models.CharField(max_length=200, blank=True)
    leaves_at = models.DateTimeField(
        null=True, blank=True, help_text="while draining: until then it takes what ends before; empty: nothing new"
    )
    back_at = models.DateTimeField(
        null=True, blank=True, help_text="when maintenance that took it gives it back; empty: nothing does by itself"
    )
    taints = ArrayField(
        models.CharField(max_length=80),
        default=list,
        blank=True,
        help_text="only jobs that tolerate all of them come here",
    )
    leaf = models.CharField(max_length=40, blank=True)
    spine = models.CharField(max_length=40, blank=True)
    gpu_count = models.PositiveSmallIntegerField()
    vcpu_milli = models.BigIntegerField()
    ram_mib = models.BigIntegerField()
    nvme_gib = models.BigIntegerField(default=0)
    vram_mib = models.PositiveIntegerField(help_text="per GPU")
    nvlink_domains = ArrayField(models.SmallIntegerField(), help_text="per GPU index")
    gpu_free = ArrayField(models.IntegerField(), help_text="milli-GPU free, per GPU index")
    vram_free = ArrayField(models.IntegerField(), help_text="MiB free, per GPU index")
    vcpu_free = models.BigIntegerField()
    ram_free = models.BigIntegerField()
    nvme_free = models.BigIntegerField(default=0)
    cpu_only_active = models.PositiveIntegerField(default=0, help_text="placements without a GPU")
    # watts, see docs/power.md
    standby_w = models.PositiveIntegerField(default=60)
    parked_w = models.PositiveIntegerField()
    base_w = models.PositiveIntegerField()
    gpu_min_w = models.PositiveIntegerField()
    gpu_max_w = models.PositiveIntegerField()
    cap_control = models.BooleanField(default=True)
    power_state = models.CharField(max_length=8, choices=PowerState, default=PowerState.PARKED)
    reserved_w = models.PositiveIntegerField(help_text="Counted in the power ledger now")
    desired_power_state = models.CharField(max_length=8, choices=PowerState, default=PowerState.PARKED)
    desired_limits_w = ArrayField(models.PositiveIntegerField(), help_text="per GPU index")
    call_gpu_w = models.PositiveIntegerField(
        null=True, blank=True, help_text="while a call of the grid holds its GPUs lower: the most each of them may draw"
    )
    desired_generation = models.BigIntegerField(default=0)
    applied_generation = models.BigIntegerField(default=0)
    measured_w = models.PositiveIntegerField(null=True, blank=True)
    beat_at = models.DateTimeField(null=True, blank=True)
    changed_in = models.BigIntegerField(
        default=0, editable=False, help_text="transaction that last changed what the scheduler reads (set by a trigger)"
    )

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "name"], name="host_name_once"),
            models.CheckConstraint(condition=AllNonNegative(F("gpu_free")), name="host_gpu_not_oversold"),
            models.CheckConstraint(condition=AllNonNegative(F("vram_free")), name="host_vram_not_oversold"),
            models.CheckConstraint(
                condition=Q(vcpu_free__gte=0, ram_free__gte=0, nvme_free__gte=0), name="host_shape_not_oversold"
            ),
            models.CheckConstraint(condition=Q(gpu_count__lte=MAX_GPUS_PER_HOST), name="host_gpu_count"),
        ]
        indexes = [models.Index(fields=["cell", "changed_in"], name="host_changed")]

    @property
    def gpu_most_w(self) -> int:
        """What one of its GPUs may draw now."""
        return self.gpu_max_w if self.call_gpu_w is None else min(self.gpu_max_w, self.call_gpu_w)

    def __str__(self) -> str:
        return self.name


class Gpu(models.Model):
    """A device's identity and health; how much of it is free stands on its host."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="gpus")
    index = models.PositiveSmallIntegerField()
    serial = models.CharField(max_length=64, blank=True)
    healthy = models.BooleanField(default=True)
    last_error = models.CharField(max_length=120, blank=True)
    sick_at = models.DateTimeField(null=True, blank=True, help_text="since when it is not healthy")
    well_at = models.DateTimeField(
        null=True, blank=True, help_text="errors up to then count no more: it was found well"
    )

    class Meta:
        constraints = [models.UniqueConstraint(fields=["host", "index"], name="gpu_index_once")]
        indexes = [models.Index(fields=["host"], condition=models.Q(healthy=False), name="gpu_sick")]

    def __str__(self) -> str:
        return f"{self.host}/{self.index}"


class Miner(TenantModel):
    """An ASIC with its ladder of modes; index 0 of the ladder is sleep. Only readings confirm a watt."""

    PREFIX = "min"

    class State(models.TextChoices):
        OK = "ok"
        UNRESPONSIVE = "unresponsive"
        MAINTENANCE = "maintenance"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="miners")
    power_node = models.ForeignKey(PowerNode, on_delete=models.PROTECT, related_name="miners")
    name = models.CharField(max_length=60)
    model = models.CharField(max_length=40)
    driver = models.CharField(max_length=16, default="luxos")
    address = models.CharField(max_length=80, blank=True)
    mode_names = ArrayField(models.CharField(max_length=24))
    mode_watts = ArrayField(models.PositiveIntegerField())
    mode_ghs = ArrayField(models.PositiveIntegerField(), help_text="GH/s")
    state = models.CharField(max_length=16, choices=State, default=State.OK)
    manual = models.BooleanField(default=False, help_text="The operator holds it by hand; dispatch leaves it alone")
    desired_mode = models.PositiveSmallIntegerField(default=0)
    desired_generation = models.BigIntegerField(default=0)
    applied_generation = models.BigIntegerField(default=0)
    changed_at = models.DateTimeField(null=True, blank=True, help_text="last commanded change, for dwell")
    commanded_w = models.PositiveIntegerField()
    confirmed_w = models.PositiveIntegerField()
    measured_w = models.PositiveIntegerField(null=True, blank=True)
    measured_ghs = models.PositiveIntegerField(null=True, blank=True)
    measured_at = models.DateTimeField(null=True, blank=True)
    low_samples = models.PositiveSmallIntegerField(
        default=0, help_text="fresh samples in a row that confirm the commanded watts"
    )
    reserved_w = models.PositiveIntegerField(help_text="Counted in the power ledger now")

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["site", "name"], name="miner_name_once"),
            models.CheckConstraint(condition=Q(desired_mode__gte=0), name="miner_mode_positive"),
        ]
        indexes = [models.Index(fields=["site", "power_node"])]

    def __str__(self) -> str:
        return self.name


class EnrolmentToken(models.Model):
    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="enrolment_tokens")
    digest = models.CharField(max_length=64, unique=True)
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True, blank=True)

    objects = SiteOwnedQuerySet.as_manager()

    def __str__(self) -> str:
        return f"for {self.site}"


class Agent(TenantModel):
    PREFIX = "agt"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="agents")
    name = models.CharField(max_length=60)
    version = models.CharField(max_length=24, blank=True)
    runtime = models.CharField(max_length=24, default="process")
    digest = models.CharField(max_length=64, unique=True)
    boot = models.CharField(max_length=40, blank=True)
    sequence = models.BigIntegerField(default=0)
    last_sync_at = models.DateTimeField(null=True, blank=True)
    lease_until = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["site", "name"], name="agent_name_once")]

    def __str__(self) -> str:
        return f"{self.site}/{self.name}"


class AgentEvent(models.Model):
    """What an agent spooled and delivered, once by its id."""

    agent = models.ForeignKey(Agent, on_delete=models.CASCADE, related_name="events")
    event_id = models.UUIDField()
    at = models.DateTimeField()
    kind = models.CharField(max_length=40)
    subject = models.CharField(max_length=80, blank=True)
    data = models.JSONField(default=dict)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["agent", "event_id"], name="agent_event_once")]
        indexes = [models.Index(fields=["agent", "at"])]

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}"
