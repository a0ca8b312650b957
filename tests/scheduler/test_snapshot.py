"""What a snapshot offers of hosts: shares that go with reserved GPUs, silent sites, hosts that leave; and that a cycle looks for
who could give way only when it must.
"""

from datetime import timedelta

import numpy as np
import pytest

from marketplace.models import Agent, BillingStanding, Host, Placement, Reservation, ReservationBlock
from marketplace.services import jobs
from scheduler import cycle, fleet, snapshot
from scheduler.core.types import HostFlag, Level
from scheduler.models import Cycle
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


@pytest.fixture
def market():
    fleet.forget()
    site = f.site()
    host = f.host(site)
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15))
    listing = f.listing(site, hosts=[host])
    return site, host, f.contract(listing, f.organization(), gpu_count=64)


def reserve(contract, host, gpus):
    """A firm reservation of these GPUs, in force now."""
    made = Reservation.objects.create(
        listing=contract.listing,
        contract=contract,
        state="firm",
        starts_at=NOW,
        ends_at=NOW + timedelta(days=1),
        claims_at=NOW,
    )
    ReservationBlock.objects.create(reservation=made, host=host, gpu_indices=gpus)


def offers(contract):
    taken = snapshot.take(contract.cell, now=NOW)
    rows = {int(pool): i for i, pool in enumerate(taken.fleet.pool)}
    return taken, rows


def test_cpu_that_goes_with_reserved_gpus_is_offered_once(market):
    _, host, contract = market
    firm = f.contract(contract.listing, f.organization(), kind="reserved", gpu_count=4)
    reserve(firm, host, [0, 1, 2, 3])
    taken, rows = offers(contract)
    mine, rest = rows[-firm.pk], rows[contract.listing_id]
    assert taken.fleet.gpu_free[mine].tolist()[:8] == [1000] * 4 + [0] * 4
    assert taken.fleet.gpu_free[rest].tolist()[:8] == [0] * 4 + [1000] * 4
    assert taken.fleet.cpu_free[[mine, rest]].tolist() == [96_000, 96_000]
    assert taken.host_of[mine] == taken.host_of[rest] == host.pk
    # Others have used three quarters of the host: a quarter is left, and all of it is owed to the reservation.
    Host.objects.filter(pk=host.pk).update(vcpu_free=48_000)
    taken, rows = offers(contract)
    assert taken.fleet.cpu_free[[rows[-firm.pk], rows[contract.listing_id]]].tolist() == [48_000, 0]
    # Its own job holds half of its share: half of it is owed still, the rest of what is free is open.
    Host.objects.filter(pk=host.pk).update(vcpu_free=192_000)
    host.refresh_from_db()
    f.placement(f.job(firm, gpus=1, vcpu_milli=48_000), host, [0], vcpu_milli=48_000)
    Host.objects.filter(pk=host.pk).update(vcpu_free=144_000)
    taken, rows = offers(contract)
    assert taken.fleet.cpu_free[[rows[-firm.pk], rows[contract.listing_id]]].tolist() == [48_000, 96_000]


def test_a_site_that_is_silent_gets_nothing_new_though_its_lease_runs(market):
    _, _, contract = market
    for age, blocked in ((30, False), (89, False), (91, True)):
        Agent.objects.update(last_sync_at=NOW - timedelta(seconds=age))
        taken = snapshot.take(contract.cell, now=NOW)
        assert bool(taken.fleet.flags[0] & int(HostFlag.UNREACHABLE)) == blocked
    Agent.objects.update(last_sync_at=NOW, revoked_at=NOW)
    assert snapshot.take(contract.cell, now=NOW).fleet.flags[0] & int(HostFlag.UNREACHABLE)


def test_a_host_that_leaves_by_a_named_hour_still_takes_what_ends_before(market):
    _, host, contract = market
    Host.objects.filter(pk=host.pk).update(state="draining")
    assert snapshot.take(contract.cell, now=NOW).fleet.flags[0] & int(HostFlag.DRAINING)
    Host.objects.filter(pk=host.pk).update(leaves_at=NOW + timedelta(hours=1), taints=["burn-in"])
    taken = snapshot.take(contract.cell, now=NOW)
    assert not taken.fleet.flags[0] & int(HostFlag.DRAINING)
    assert taken.fleet.leaves.tolist() == [int((NOW + timedelta(hours=1)).timestamp())]
    assert taken.fleet.taints.tolist() == [1 << taken.names.taints["burn-in"]]


def test_who_could_give_way_is_read_only_when_somebody_found_no_room(market, monkeypatch):
    _, _, contract = market
    asked = []
    take = snapshot.take
    monkeypatch.setattr(
        snapshot, "take", lambda *a, running, **k: asked.append(running) or take(*a, running=running, **k)
    )
    f.job(contract, gpus=8)
    cycle.run(contract.cell_id, now=NOW)
    assert asked == [False]
    f.job(contract, gpus=8)
    cycle.run(contract.cell_id, now=NOW)
    assert asked == [False, False, True]  # no room: once more, with them
    cycle.run(contract.cell_id, now=NOW)
    assert asked == [False, False, True, True]  # and at once, while somebody waits
    assert Cycle.objects.order_by("id").last().jobs_considered == 1


def test_the_columns_of_a_cell_without_hosts(market):
    taken = snapshot.take(f.cell(), now=NOW)
    assert len(taken.fleet) == 0
    assert taken.host_of == []
    assert taken.fleet.gpu_free.dtype == np.int32


def test_a_gang_without_gpus_waits_for_the_smallest_part_of_the_fabric_that_could_ever_hold_it():
    """Two leaves of two hosts, 192 vCPU each: four replicas of 96 vCPU go into one leaf or nowhere, two into one host."""
    site = f.site()
    for i in range(4):
        f.host(site, f"h{i}", leaf=f"leaf-{i // 2}", vcpu_milli=192_000)
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15))
    listing = f.listing(site, hosts=Host.objects.all())
    contract = f.contract(listing, f.organization(), gpu_count=64)
    BillingStanding.objects.filter(organization=contract.organization).update(state="good")
    spec = {"command": ["true"], "gpus": 0, "vcpu_milli": 96_000, "ram_mib": 1024, "topology_required": True}

    def levels():
        taken = snapshot.take(site.cell, now=NOW)
        return {taken.jobs[r.job].replicas: r.topology.pack for r in taken.requests}

    jobs_of = {
        n: jobs.submit(f.actor(contract.organization), contract, {**spec, "replicas": n}, now=NOW) for n in (2, 4, 6)
    }
    assert levels() == {2: Level.HOST, 4: Level.LEAF, 6: Level.SPINE}
    Host.objects.filter(name__in=["h0", "h2"]).update(vcpu_free=100_000)
    fleet.forget()
    cycle.run(site.cell_id, now=NOW)
    where = {n: set(job.placements.values_list("host__name", flat=True)) for n, job in jobs_of.items()}
    assert (len(where[2]), where[4], where[6]) == (1, set(), set())
    waits = jobs_of[4].decision
    assert (waits.reason, waits.binding) == ("TOPOLOGY", "topology, short by 1")


def test_the_mix_knows_the_models_that_are_asked_for_and_leaves_them_to_those_who_insist():
    """Two hosts in one listing; many insist on the first's model. Who does not goes to the other, though it stands behind."""
    site = f.site()
    f.host(site, "h0")
    f.host(site, "h1", gpu_model=f.gpu_model("A100-SXM"))
    f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15))
    listing = f.listing(site, hosts=Host.objects.all(), gpu_model=None)
    contract = f.contract(listing, f.organization(), gpu_count=16)
    ask = {"command": ["true"], "gpus": 1, "vcpu_milli": 8000, "ram_mib": 1024}

    def first_goes_to(**more):
        job = jobs.submit(f.actor(contract.organization), contract, {**ask, **more}, now=NOW)
        taken = snapshot.take(site.cell, now=NOW)
        (placed,) = cycle._plan(taken).placements
        job.state = "cancelled"
        job.save()
        return taken.host_of[placed.host], taken

    first, second = Host.objects.order_by("name").values_list("pk", flat=True)
    assert first_goes_to()[0] == first
    for _ in range(8):
        f.job(contract, state="succeeded", gpu_models=["H100-SXM"], **ask)
    f.job(contract, state="succeeded", gpu_models=["nobody has it"], replicas=2, **ask)
    f.job(contract, state="succeeded", **{**ask, "gpus": 0})
    where, taken = first_goes_to()
    h100 = 1 << taken.model_of[Host.objects.get(pk=first).gpu_model_id]
    assert taken.policy.shapes == (
        (8000, 1024, 1, 1000, h100, 8), (8000, 1024, 1, 1000, 0, 2), (8000, 1024, 1, 1000, 1 << 62, 2),
        (8000, 1024, 0, 1000, 0, 1),
    )  # fmt: skip
    assert where == second
    assert first_goes_to(gpu_models=["H100-SXM"])[0] == first
    listing.gpu_model = Host.objects.get(pk=first).gpu_model  # all of them are of one: so is who names none
    listing.save()
    assert first_goes_to()[1].policy.shapes[0] == (8000, 1024, 1, 1000, h100, 9 + 3)


def test_a_share_that_names_no_vram_holds_its_part_of_it_and_who_names_it_holds_that(market):
    site, host, contract = market
    ask = {"command": ["true"], "gpus": 1, "gpu_milli": 250, "vcpu_milli": 1000, "ram_mib": 1024}
    quarter, named = (
        jobs.submit(f.actor(contract.organization), contract, {**ask, **more}, now=NOW)
        for more in ({}, {"vram_mib": 30_000})
    )
    cycle.run(site.cell_id, now=NOW)
    held = dict(Placement.objects.values_list("job_id", "vram_mib"))
    assert held == {quarter.pk: host.vram_mib // 4, named.pk: 30_000}
    host.refresh_from_db()
    assert host.vram_mib - host.vram_free[0] == host.vram_mib // 4 + 30_000
    # VRAM is what it lacks now, not the GPU: half of one is free.
    much = jobs.submit(f.actor(contract.organization), contract, {**ask, "vram_mib": 40_000}, now=NOW)
    Host.objects.update(gpu_free=[500] + [0] * 7, vram_free=[host.vram_free[0]] + [0] * 7)
    fleet.forget()
    cycle.run(site.cell_id, now=NOW)
    assert much.decision.reason == "NO_VRAM"
