"""Builders of rows for every test: plain functions, sensible defaults, `**fields` overrides any column.

    operator = factories.organization(is_operator=True)
    site = factories.site(operator)                          # 1 MW, nodes site > tx-1 > pdu-1, pdu-2
    host = factories.host(site, gpus=8)                      # reserved watts stand in every node above it
    contract = factories.contract(factories.listing(site, hosts=[host]), customer)
    job = factories.job(contract, gpus=2);  placement = factories.placement(job, host, [0, 1])
    api = factories.client(customer, role="engineer")        # or client(key=token), client(user=...)

Rows that follow from others are made as the services would leave them: free columns, reserved watts, node sums, events.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from django.db import connection, transaction
from rest_framework.test import APIClient

from marketplace.models import (
    Agent,
    ApiKey,
    BillingStanding,
    Cell,
    Contract,
    Gpu,
    GpuModel,
    Host,
    Job,
    Listing,
    Membership,
    Miner,
    Organization,
    Placement,
    PowerGrant,
    PowerNode,
    Quote,
    Site,
    User,
)
from marketplace.services import quoted, transitions
from marketplace.services.tokens import digest
from marketplace.tenancy import SCOPES, Actor
from scheduler.core import power

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
LADDER = (("sleep", 25, 0), ("eco", 2400, 155_000), ("normal", 3500, 200_000))
_number = count(1)


# --- who
def user(email: str | None = None, *, password: str | None = None, **fields: Any) -> User:
    """Without a password nobody can log in by form (hashing is slow on purpose); `client(user=...)` works all the same."""
    return User.objects.create_user(email or f"person{next(_number)}@example.org", password, **fields)


def staff(**fields: Any) -> User:
    return user(is_staff=True, is_superuser=True, **fields)


def organization(
    name: str | None = None, *, standing: str = "good", available_minor: int = 10_000_000, **fields: Any
) -> Organization:
    """A customer with a good card, unless told otherwise. It has no members: see `member`."""
    made = Organization.objects.create(name=name or f"Organization {next(_number)}", **fields)
    BillingStanding.objects.create(organization=made, state=standing, available_minor=available_minor, updated_at=NOW)
    return made


def member(organization: Organization, role: str = "owner", person: User | None = None) -> Membership:
    return Membership.objects.create(user=person or user(), organization=organization, role=role)


def actor(organization: Organization, role: str = "owner") -> Actor:
    """An Actor for calls of services; makes no rows."""
    return Actor(
        kind="user",
        organization_id=organization.pk,
        role=role,
        livemode=organization.livemode,
        label=f"{role}@example.org",
    )


def key(organization: Organization, scopes: Iterable[str] = SCOPES, **fields: Any) -> tuple[ApiKey, str]:
    """(row, token)."""
    n = next(_number)
    token = f"tr_{'live' if organization.livemode else 'test'}_factory{n:036d}"
    fields = {"name": f"key {n}", "prefix": f"tr_{n:013d}", **fields}
    return ApiKey.objects.create(organization=organization, digest=digest(token), scopes=list(scopes), **fields), token


def client(
    organization: Organization | None = None,
    role: str = "owner",
    *,
    key: str | None = None,
    user: User | None = None,
    agent: str | None = None,
) -> APIClient:
    """An API client: a new member of `organization`, or an API key's token, or a person, or an agent's key, or nobody."""
    made = APIClient()
    if key or agent:
        made.credentials(HTTP_AUTHORIZATION=f"Bearer {key or agent}")
    elif user is not None:
        made.force_login(user)
    elif organization is not None:
        made.force_login(member(organization, role).user)
    return made


# --- where
def cell(*, livemode: bool = True, **fields: Any) -> Cell:
    n = next(_number)
    return Cell.objects.create(livemode=livemode, **{"name": f"cell-{n}", "region": "us-tx", **fields})


def gpu_model(name: str = "H100-SXM", vram_mib: int = 81_920, tdp_w: int = 700) -> GpuModel:
    return GpuModel.objects.get_or_create(name=name, defaults={"vram_mib": vram_mib, "tdp_w": tdp_w})[0]


def site(
    organization: Organization | None = None,
    cell_: Cell | None = None,
    *,
    power_w: int = 1_000_000,
    pdus: int = 2,
    metering: str = "meter",
    **fields: Any,
) -> Site:
    """A site with the tree `site` > `tx-1` > `pdu-1` ... `pdu-N`, each of the full power; overhead at the root only."""
    owner = organization or globals()["organization"](is_operator=True, is_customer=False)
    n = next(_number)
    made = Site.objects.create(
        organization=owner,
        cell=cell_ or cell(livemode=owner.livemode),
        contract_power_w=power_w,
        **{"name": f"Site {n}", "region": "us-tx", "timezone": "America/Chicago", **fields},
    )
    root = node(
        made,
        "site",
        kind="site",
        cap_w=power_w,
        metering=metering,
        overhead_gpu_permille=made.pue_permille,
        overhead_miner_permille=made.miner_pue_permille,
    )
    transformer = node(made, "tx-1", parent=root, kind="transformer", cap_w=power_w, metering=metering)
    for i in range(1, pdus + 1):
        node(made, f"pdu-{i}", parent=transformer, cap_w=power_w, metering=metering)
    return made


def node(site: Site, name: str, *, parent: PowerNode | None = None, cap_w: int, **fields: Any) -> PowerNode:
    metering = fields.get("metering", "meter")
    return PowerNode.objects.create(
        site=site,
        name=name,
        parent=parent,
        depth=parent.depth + 1 if parent else 0,
        cap_w=cap_w,
        **{"metering": metering, "margin_w": power.margin_w(cap_w, metering), **fields},
    )


def a_node(site: Site, name: str | PowerNode | None = None) -> PowerNode:
    """A node by name; by default the first PDU."""
    if isinstance(name, PowerNode):
        return name
    return site.power_nodes.get(name=name) if name else site.power_nodes.filter(kind="pdu").order_by("name")[0]


def reserve(node: PowerNode, watts: int, kind: str) -> None:
    """Count `watts` more of a device of `kind` (gpu, miner) at its node and every node above."""
    at: PowerNode | None = node
    while at is not None:
        at.refresh_from_db()
        k = at.overhead_gpu_permille if kind == "gpu" else at.overhead_miner_permille
        at.reserved_mw += watts * k
        at.save(update_fields=["reserved_mw"])
        at = at.parent


def host(
    site: Site,
    name: str | None = None,
    *,
    gpus: int = 8,
    power_node: str | PowerNode | None = None,
    gpu_model: GpuModel | None = None,
    **fields: Any,
) -> Host:
    """An idle host, parked: 8 H100 by default, 192 vCPU, 2 TiB."""
    model = gpu_model or globals()["gpu_model"]()
    columns: dict[str, Any] = {
        "name": name or f"h{next(_number):04d}",
        "leaf": "leaf-1",
        "spine": "spine-1",
        "vcpu_milli": 192_000,
        "ram_mib": 2_097_152,
        "nvme_gib": 28_000,
        "vram_mib": model.vram_mib,
        "standby_w": 60,
        "parked_w": 1_100,
        "base_w": 4_600,
        "gpu_min_w": 200,
        "gpu_max_w": model.tdp_w,
        "cap_control": True,
        **fields,
    }
    idle = columns["parked_w"] if columns["cap_control"] else columns["base_w"] + gpus * columns["gpu_max_w"]
    made = Host.objects.create(
        site=site,
        cell=site.cell,
        power_node=a_node(site, power_node),
        gpu_model=model,
        gpu_count=gpus,
        **{
            "nvlink_domains": [0] * gpus,
            "gpu_free": [1000] * gpus,
            "vram_free": [columns["vram_mib"]] * gpus,
            "vcpu_free": columns["vcpu_milli"],
            "ram_free": columns["ram_mib"],
            "nvme_free": columns["nvme_gib"],
            "reserved_w": idle,
            "desired_limits_w": [columns["gpu_min_w"]] * gpus,
            **columns,
        },
    )
    Gpu.objects.bulk_create(Gpu(host=made, index=i) for i in range(gpus))
    reserve(made.power_node, made.reserved_w, "gpu")
    return made


def unmark(host: Host) -> None:
    """As if nothing of the host had ever changed (`changed_in`), past the trigger that marks it."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # a table with checks to come cannot be altered
        cursor.execute("ALTER TABLE marketplace_host DISABLE TRIGGER host_changed_update")
        cursor.execute("UPDATE marketplace_host SET changed_in = 0 WHERE id = %s", [host.pk])
        cursor.execute("ALTER TABLE marketplace_host ENABLE TRIGGER host_changed_update")
        cursor.execute("SET CONSTRAINTS ALL DEFERRED")


def miner(
    site: Site,
    name: str | None = None,
    *,
    power_node: str | PowerNode | None = None,
    modes: Sequence[tuple[str, int, int]] = LADDER,
    mode: int = -1,
    **fields: Any,
) -> Miner:
    """A miner that confirmed `mode` (default: its top mode) with a reading at NOW."""
    at = mode % len(modes)
    n = next(_number)
    watts = modes[at][1]
    made = Miner.objects.create(
        site=site,
        power_node=a_node(site, power_node),
        mode_names=[m[0] for m in modes],
        mode_watts=[m[1] for m in modes],
        mode_ghs=[m[2] for m in modes],
        **{
            "name": name or f"m{n:05d}",
            "model": "S21",
            "address": f"127.1.{n // 250 % 250}.{n % 250}:4028",
            "desired_mode": at,
            "commanded_w": watts,
            "confirmed_w": watts,
            "measured_w": watts,
            "measured_ghs": modes[at][2],
            "measured_at": NOW,
            "reserved_w": watts,
            **fields,
        },
    )
    reserve(made.power_node, made.reserved_w, "miner")
    return made


def agent(site: Site, **fields: Any) -> tuple[Agent, str]:
    """(row, key)."""
    n = next(_number)
    token = f"agk_factory{n:036d}"
    return Agent.objects.create(site=site, digest=digest(token), **{"name": f"agent-{n}", **fields}), token


# --- what is offered and agreed
def listing(site: Site, *, hosts: Iterable[Host] = (), state: str = "published", **fields: Any) -> Listing:
    """A published offer of every kind; `hosts` are put into it."""
    made = Listing.objects.create(
        organization=site.organization,
        site=site,
        state=state,
        **{
            "gpu_model": gpu_model(),
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
            "terms": quoted.terms_of(listing),
            **fields,
        },
    )


def contract(
    listing: Listing | None = None, organization: Organization | None = None, *, kind: str = "on_demand", **fields: Any
) -> Contract:
    """An active contract since NOW, open-ended unless `ends_at` is given, with its first event."""
    of = listing or globals()["listing"](site())
    made = Contract.objects.create(
        organization=organization or globals()["organization"](livemode=of.organization.livemode),
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
    _created(Contract, made)
    return made


def job(contract: Contract, *, state: str = "queued", **fields: Any) -> Job:
    """One replica with one whole GPU, queued at NOW."""
    made = Job.objects.create(
        organization=contract.organization,
        contract=contract,
        cell=contract.cell,
        state=state,
        **{
            "name": f"job {next(_number)}",
            "command": ["python3", "-c", "print('ok')"],
            "vcpu_milli": 8_000,
            "ram_mib": 32_768,
            "created_at": NOW,
            "queued_at": NOW,
            **fields,
        },
    )
    _created(Job, made)
    return made


_UNGRANTED = ("intended", "shedding")


def placement(
    job: Job, host: Host, gpu_indices: Sequence[int] | None = None, *, state: str = "intended", **fields: Any
) -> Placement:
    """A replica on a host, as a committed plan leaves it: free columns taken, watts booked once granted (not while `intended`,
    `shedding`), with its grant.
    """
    host.refresh_from_db()
    final = state in Placement.FINAL
    indices = list(range(job.gpus) if gpu_indices is None else gpu_indices)
    columns = {
        "attempt": job.attempt + 1,
        "rank": fields.pop("rank", job.placements.count()),
        "gpu_milli": job.gpu_milli,
        "vram_mib": job.vram_mib or host.vram_mib * job.gpu_milli // 1000,
        "vcpu_milli": job.vcpu_milli,
        "ram_mib": job.ram_mib,
        "nvme_gib": job.nvme_gib,
        "created_at": NOW,
        **fields,
    }
    delta = 0
    if not final:
        for i in indices:
            host.gpu_free[i] -= columns["gpu_milli"]
            host.vram_free[i] -= columns["vram_mib"]
        host.vcpu_free -= columns["vcpu_milli"]
        host.ram_free -= columns["ram_mib"]
        host.nvme_free -= columns["nvme_gib"]
        host.cpu_only_active += not indices
        delta = reserved_w(host) - host.reserved_w
        if state not in _UNGRANTED:
            host.reserved_w += delta
            reserve(host.power_node, delta, "gpu")
            if host.cap_control:
                host.power_state = host.desired_power_state = "capped"
                host.desired_limits_w = [host.gpu_max_w if f < 1000 else host.gpu_min_w for f in host.gpu_free]
        host.save()
    made = Placement.objects.create(
        job=job,
        contract=job.contract,
        organization=job.organization,
        host=host,
        site=host.site,
        cell=host.cell,
        gpu_indices=indices,
        state=state,
        **{"watts_delta": max(delta, 0), "granted_at": None if state in _UNGRANTED else NOW, **columns},
    )
    _created(Placement, made)
    granted = state not in _UNGRANTED
    PowerGrant.objects.create(
        placement=made,
        host=host,
        site=host.site,
        delta_w=max(delta, 0),
        state="released" if final else "granted" if granted else "shedding",
        created_at=made.created_at,
        granted_at=made.created_at if granted else None,
        released_at=made.created_at if final else None,
    )
    return made


def reserved_w(host: Host) -> int:
    """What the host's free columns say it may draw, W."""
    return power.host_reserved_w(
        gpus=host.gpu_count,
        active_gpus=sum(free < 1000 for free in host.gpu_free),
        standby_w=host.standby_w,
        parked_w=host.parked_w,
        base_w=host.base_w,
        gpu_min_w=host.gpu_min_w,
        gpu_max_w=host.gpu_max_w,
        cap_control=host.cap_control,
        powered=host.power_state != "off",
        cpu_only=host.cpu_only_active > 0,
    )


def _created(model: Any, row: Any) -> None:
    with transaction.atomic():
        transitions.record_created(model, [row.pk], state=row.state, now=row.created_at, actor="factory")
