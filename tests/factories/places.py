"""Where: cells, sites with their power trees, hosts, miners, agents."""

from collections.abc import Sequence
from typing import Any

from django.db import connection, transaction

from marketplace.models import Agent, Cell, Gpu, GpuModel, Host, Miner, Organization, PowerNode, Site
from marketplace.services.tokens import digest
from scheduler.core import power
from tests.factories import people
from tests.factories.rows import NOW, number

LADDER = (("sleep", 25, 0), ("eco", 2400, 155_000), ("normal", 3500, 200_000))


def cell(*, livemode: bool = True, **fields: Any) -> Cell:
    n = next(number)
    return Cell.objects.create(livemode=livemode, **{"name": f"cell-{n}", "region": "us-tx", **fields})


def gpu_model(name: str = "H100-SXM", vram_mib: int = 81_920, tdp_w: int = 700) -> GpuModel:
    return GpuModel.objects.get_or_create(name=name, defaults={"vram_mib": vram_mib, "tdp_w": tdp_w})[0]


_h100 = gpu_model  # for builders with a parameter of that name


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
    owner = organization or people.organization(is_operator=True, is_customer=False)
    n = next(number)
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
    model = gpu_model or _h100()
    columns: dict[str, Any] = {
        "name": name or f"h{next(number):04d}",
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
    n = next(number)
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
    n = next(number)
    token = f"agk_factory{n:036d}"
    return Agent.objects.create(site=site, digest=digest(token), **{"name": f"agent-{n}", **fields}), token
