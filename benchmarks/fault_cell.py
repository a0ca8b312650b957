"""A small random cell for the fault harness: its sites, hosts, miners, customers and contracts, all drawn from a seed.

Built of the real rows; every watt can be had when all miners sleep, so that each job can come to its end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from django.utils import timezone

from benchmarks.fault_site import Asic, Machine, Node, Yard
from marketplace.models import Agent, Cell, Contract, Gpu, Host, Listing, Miner, Organization, PowerNode, Site
from tests import factories

MODES = ("sleep", "eco", "normal")
LADDER = (25, 2400, 3500)
SHAPES = ((2, 300, 700), (4, 500, 1500), (8, 1100, 4600))  # GPUs, parked W, base W

real_now = timezone.now


class Clock:
    """The time of the run: django.utils.timezone.now answers it, ahead of the server's, so that what is delayed is due."""

    def __init__(self) -> None:
        self.now = max(datetime.now(UTC), factories.NOW).replace(second=0, microsecond=0) + timedelta(days=1)

    def __call__(self) -> datetime:
        return self.now

    def __enter__(self) -> Self:
        timezone.now = self
        return self

    def __exit__(self, *_: object) -> None:
        timezone.now = real_now


@dataclass
class World:
    """What was built, by seed."""

    seed: int
    dice: random.Random
    clock: Clock
    cell: Cell
    yards: list[Yard] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    customers: list[Organization] = field(default_factory=list)
    contracts: list[int] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)  # plans that wait for their commit
    late: list[tuple[Yard, dict[str, Any]]] = field(default_factory=list)  # answers on their way to an agent

    @property
    def now(self) -> datetime:
        return self.clock.now

    def pass_time(self, step: timedelta) -> None:
        self.clock.now += step
        for yard in self.yards:
            yard.pass_time(self.now)


def build(seed: int, clock: Clock) -> World:
    dice = random.Random(seed)
    world = World(seed, dice, clock, factories.cell())
    model = factories.gpu_model()
    operator = factories.organization(is_operator=True, is_customer=False)
    for _ in range(dice.choice((1, 1, 1, 2))):
        site = factories.site(operator, world.cell, pdus=dice.choice((1, 2)))
        hosts = _hosts(site, model, dice)
        miners = _miners(site, dice, clock.now)
        _caps(site, hosts, miners, dice, clock.now)
        agent, _ = factories.agent(
            site, last_sync_at=clock.now, lease_until=clock.now + timedelta(minutes=15), boot="boot-1"
        )
        world.listings.append(factories.listing(site, hosts=hosts))
        world.yards.append(_yard(site, agent, hosts, miners, dice, clock.now))
    _customers(world)
    return world


def _hosts(site: Site, model: Any, dice: random.Random) -> list[Host]:
    pdus = list(site.power_nodes.filter(kind="pdu").order_by("pk"))
    gpus, parked, base = dice.choice(SHAPES)
    linked = dice.choice(([0] * gpus, [0] * gpus, [i // (gpus // 2) for i in range(gpus)], [-1] * gpus))
    rows = []
    for i in range(dice.choice((1, 2, 3, 4))):
        capped = dice.random() < 0.85
        rows.append(
            Host(
                site=site, cell=site.cell, power_node=dice.choice(pdus), gpu_model=model, name=f"h{i}", leaf=f"leaf-{i // 2}",
                spine="spine-1", gpu_count=gpus, vcpu_milli=64_000, vcpu_free=64_000, ram_mib=262_144, ram_free=262_144,
                nvme_gib=1000, nvme_free=1000, vram_mib=model.vram_mib, nvlink_domains=linked, gpu_free=[1000] * gpus,
                vram_free=[model.vram_mib] * gpus, standby_w=60, parked_w=parked, base_w=base, gpu_min_w=200, gpu_max_w=700,
                cap_control=capped, power_state="parked" if capped else "full",
                desired_power_state="parked" if capped else "full", reserved_w=parked if capped else base + gpus * 700,
                desired_limits_w=[200 if capped else 700] * gpus, beat_at=None,
            )
        )  # fmt: skip
    made = Host.objects.bulk_create(rows)
    Gpu.objects.bulk_create(Gpu(host=host, index=i) for host in made for i in range(gpus))
    return made


def _miners(site: Site, dice: random.Random, now: datetime) -> list[Miner]:
    pdus = list(site.power_nodes.filter(kind="pdu").order_by("pk"))
    return Miner.objects.bulk_create(
        Miner(
            site=site, power_node=dice.choice(pdus), name=f"m{i}", model="S21", address="", mode_names=list(MODES),
            mode_watts=list(LADDER), mode_ghs=[0, 155_000, 200_000], desired_mode=2, commanded_w=LADDER[2],
            confirmed_w=LADDER[2], measured_w=LADDER[2], measured_ghs=200_000, measured_at=now, reserved_w=LADDER[2],
        )
        for i in range(dice.choice((0, 3, 6)))
    )  # fmt: skip


def _caps(site: Site, hosts: list[Host], miners: list[Miner], dice: random.Random, now: datetime) -> None:
    """Caps under which all hosts run at full power when all miners sleep (two of them may stay awake), or everything at once."""
    slack = dice.choice((1.0, 1.0, 1.0, 2.0))
    nodes = {node.pk: node for node in site.power_nodes.all()}
    for node in nodes.values():
        below = {pk for pk in nodes if _under(nodes, pk, node.pk)}
        mine, theirs = [h for h in hosts if h.power_node_id in below], [m for m in miners if m.power_node_id in below]
        kg, km = node.overhead_gpu_permille, node.overhead_miner_permille
        full = (
            sum(h.base_w + h.gpu_count * 700 for h in mine) * kg + (len(theirs) * 25 + min(2, len(theirs)) * 3500) * km
        )
        idle = sum(h.reserved_w for h in mine) * kg + sum(m.reserved_w for m in theirs) * km
        node.reserved_mw = idle
        node.cap_w = int((max(full, idle) // 1000 + 1000) * slack / 0.98) + 1
        node.margin_w = -(-node.cap_w * 20 // 1000)
        node.measured_w, node.measured_at = idle // 1000, now
        node.save()
    site.contract_power_w = max(n.cap_w for n in nodes.values() if n.parent_id is None)
    site.save()


def _under(nodes: dict[int, PowerNode], pk: int | None, top: int) -> bool:
    while pk is not None and pk != top:
        pk = nodes[pk].parent_id
    return pk == top


def _yard(site: Site, agent: Agent, hosts: list[Host], miners: list[Miner], dice: random.Random, now: datetime) -> Yard:
    nodes = {n.pk: n for n in site.power_nodes.all()}
    machines = {
        h.name: Machine(
            h.name, nodes[h.power_node_id].name, h.gpu_count, h.vram_mib, h.base_w, h.parked_w, 200, 700, h.cap_control,
            list(h.desired_limits_w), h.power_state,
        )
        for h in hosts
    }  # fmt: skip
    asics = {m.name: Asic(m.name, nodes[m.power_node_id].name, list(MODES), list(LADDER), 2) for m in miners}
    if asics and dice.random() < 0.4:
        odd = dice.choice(list(asics.values()))
        odd.deaf, odd.mute = dice.choice(((True, False), (False, True)))
    tree = {
        n.name: Node(
            n.name, nodes[n.parent_id].name if n.parent_id else None, n.cap_w, n.fixed_w, n.overhead_gpu_permille,
            n.overhead_miner_permille,
        )
        for n in nodes.values()
    }  # fmt: skip
    return Yard(
        site.pk, agent.pk, random.Random(dice.random()), machines, asics, tree, lease_until=now + timedelta(minutes=15)
    )


def _customers(world: World) -> None:
    """Two buyers by the hour and one of spot at every listing; some contracts end while the run goes on."""
    dice = world.dice
    world.customers = [factories.organization() for _ in range(3)]
    for listing in world.listings:
        gpus = sum(listing.hosts.values_list("gpu_count", flat=True))
        for n, kind in enumerate(("on_demand", "on_demand", "spot")):
            ends = world.now + timedelta(minutes=dice.choice((2, 10, 60))) if dice.random() < 0.2 else None
            ceiling = gpus if n != 1 else max(2, gpus // 2)
            made: Contract = factories.contract(
                listing, world.customers[n], kind=kind, gpu_count=ceiling, ends_at=ends, limit_price=900_000 + n * 1000
            )
            world.contracts.append(made.pk)
    for customer in world.customers:  # one contract alone stays within its organization's limit; all together may not
        if dice.random() < 0.3:
            customer.gpu_limit = max(customer.contracts.values_list("gpu_count", flat=True), default=1)
            customer.save(update_fields=["gpu_limit"])
