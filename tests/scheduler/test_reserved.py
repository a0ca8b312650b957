"""What is promised can be had: capacity admitted by count, numbered by device, lent out meanwhile, and claimed at its hour."""

import random
from collections import defaultdict
from datetime import timedelta

import pytest
from django.db import transaction
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.models import Host, Placement, PowerNode, Reservation
from marketplace.services import holds, jobs, placements
from marketplace.services.holds import Lodger, Taken
from scheduler import commit, cycle, snapshot
from scheduler.core import capacity
from scheduler.core.capacity import FOREVER, LEVELS, Claim, Hosts, Pool, Shape
from scheduler.core.fit import bounds, deadlines
from scheduler.core.plan import plan
from scheduler.core.types import Fleet, Kind, Level, Policy, Reason, Request, Topology
from scheduler.models import Decision
from scheduler.standing import LAG_S
from tests import factories as f
from tests.factories import NOW

STAYS_S = LAG_S + 30  # beyond its limit, at most: with the grace that a job has unless it says so
AHEAD = 24  # hours for which work without an end is taken to stand (reserved.CLAIM_AHEAD)
POLICY = Policy(unknown_s=AHEAD)
CORE = {"host": Level.HOST, "leaf": Level.LEAF, "spine": Level.SPINE, "site": Level.SITE}


class World:
    """A site as the market and the cycles see it, hour by hour, without a database: the pure parts put together."""

    def __init__(self, dice):
        self.dice, self.now, self.number = dice, 0, 0
        self.gpus = dice.choice((2, 4, 8))
        self.rows = [(i, self.gpus, f"l{i // 2}", f"s{i // 4}") for i in range(dice.randrange(1, 7))]
        self.hosts = Hosts.of(self.rows)
        self.promises = {}  # contract -> (start, end, level, {host: devices})
        self.came = {}  # job -> when
        self.work = {}  # job -> (kind, end, [(host, devices)])
        self.kept = self.asked = self.lent = 0

    # --- the market
    def firm(self):
        """{host: {device: end}} of running work that is neither spot nor on its own promise."""
        taken = defaultdict(dict)
        for kind, end, where in self.work.values():
            for host, devices in where if kind == Kind.ON_DEMAND else ():
                taken[host] |= dict.fromkeys(devices, end)
        return taken

    def pool(self):
        claims = [
            Claim(key, start, end, tuple((h, len(d)) for h, d in at.items()), level)
            for key, (start, end, level, at) in self.promises.items()
        ]
        for host, ends in self.firm().items():
            claims += [Claim(("work", host, d), self.now, end, ((host, 1),)) for d, end in ends.items()]
        return Pool.build(self.hosts, claims)

    def ask(self):
        """What `largest` says can be booked, and one more cannot."""
        start = self.now + self.dice.randrange(60)
        end, level = start + self.dice.randrange(1, 60), self.dice.choice(LEVELS)
        pool = self.pool()
        most = capacity.largest(pool, Shape(1), level, start, end)
        assert not capacity.admit(pool, Shape(1), level, most + 1, start, end).admitted
        if not most:
            return
        self.asked += 1
        found = capacity.admit(pool, Shape(1), level, self.dice.randrange(1, most + 1), start, end)
        assert found.admitted
        self.number += 1
        mine = {}
        for host, count in found.hold:
            rivals = [
                Taken(key, s, e, tuple(at[host]), pinned=s <= self.now)
                for key, (s, e, _, at) in self.promises.items()
                if host in at
            ]
            rivals += [Taken(-1 - d, self.now, e, (d,), pinned=True) for d, e in self.firm().get(host, {}).items()]
            numbered = holds.number(range(self.gpus), rivals, start, end, count)
            if numbered is None:  # long work stands on devices promised for later: that promise is kept by its leaving
                assert any(r.key < 0 for r in rivals)
                return
            mine[host] = numbered[0]
            for key, devices in numbered[1].items():
                self.promises[key][3][host] = devices
        self.promises[self.number] = (start, end, level, mine)

    # --- the cycles
    def fleet(self):
        """Open rows with what is promised for later, and one row for each promise that has begun, as the snapshot makes them."""
        busy = {(h, d) for _, _, where in self.work.values() for h, devices in where for d in devices}
        begun = {k: p for k, p in self.promises.items() if p[0] <= self.now < p[1]}
        closed = {(h, d) for _, _, _, at in begun.values() for h, devices in at.items() for d in devices}
        later = [(start, at) for start, _, _, at in self.promises.values() if start > self.now]
        rows = []
        for host, gpus, leaf, spine in self.rows:
            place = {
                "host_id": host,
                "cpu_free": 10**6,
                "leaf": int(leaf[1:]),
                "spine": int(spine[1:]),
                "gpu_count": gpus,
            }
            place["gpu_active"] = sum(1 << d for d in range(gpus) if (host, d) in busy)
            open_ = [0 if (host, d) in busy | closed else 1000 for d in range(gpus)]
            claims = [(start, d) for start, at in later for d in at.get(host, ())]
            claimed = (
                {"claimed_at": min(s for s, _ in claims), "claimed_gpus": sum({1 << d for _, d in claims})}
                if claims
                else {}
            )
            rows.append({**place, "pool": 1, "gpu_free": open_, **claimed})
            for key, (*_, at) in begun.items():
                own = [1000 if d in at.get(host, ()) and (host, d) not in busy else 0 for d in range(gpus)]
                if host in at:
                    rows.append({**place, "pool": -key, "gpu_free": own})
        return Fleet.build(rows)

    def place(self, kind, replicas, gpus, pool, end, topology=Topology()):  # noqa: B008 (frozen)
        self.number += 1
        fleet = self.fleet()
        lasts = end - self.now if end < FOREVER else 0
        job = Request(
            job=self.number, kind=kind, replicas=replicas, gpus=gpus, pool=pool, topology=topology, duration_s=lasts
        )
        job.until, job.stays = bounds(job, self.now, *deadlines(fleet), POLICY)
        made = plan(fleet, [job], policy=POLICY, seed=self.now % 3, now_s=self.now)
        where = [(int(fleet.host_id[p.host]), p.gpus) for p in made.placements]
        if where:
            self.work[self.number] = (kind, end, where)
            self.came[self.number] = self.now
        return where

    def lend(self):
        """Somebody takes what stands free now, promised for later or not."""
        kind = self.dice.choice((Kind.SPOT, Kind.ON_DEMAND))
        end = self.dice.choice((self.now + self.dice.randrange(1, 50), FOREVER))
        self.place(kind, self.dice.choice((1, 1, 2)), self.dice.randrange(1, self.gpus + 1), 1, end)

    def hour(self):
        """Work ends, claims begin: strangers leave their devices, and the holder's own job comes, whole and in its cell."""
        self.now += self.dice.randrange(1, 12)
        self.work = {k: w for k, w in self.work.items() if w[1] > self.now}
        self.promises = {k: p for k, p in self.promises.items() if p[1] > self.now}
        for key, (start, end, level, at) in list(self.promises.items()):
            if start > self.now or key in self.claimed():
                continue
            for k, w in list(self.work.items()):
                if w[0] != Kind.FIRM and any(set(d) & set(at.get(h, ())) for h, d in w[2]):
                    del self.work[k]
                    self.lent += 1
                    # Who names an end is never there still, and who names none came long before.
                    assert w[0] == Kind.SPOT or (w[1] == FOREVER and self.came[k] + AHEAD <= start)
            count = sum(map(len, at.values()))
            where = self.place(Kind.FIRM, count, 1, -key, end, Topology(CORE[level], required=True))
            assert len(where) == count, f"promise {key} of {count} GPUs in one {level} is not to be had"
            self.work[self.number] = (Kind.FIRM, end, [*where, ("key", (key,))])
            self.kept += 1

    def claimed(self):
        return {d[0] for _, _, where in self.work.values() for h, d in where if h == "key"}


@pytest.mark.serverless
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_every_promise_is_kept_whatever_was_lent_meanwhile(seed):
    world = World(random.Random(seed))
    for _ in range(25):
        world.dice.choice((world.ask, world.lend, world.lend, world.hour))()
    for _ in range(15):
        world.hour()
    assert (
        capacity.violations(Pool.build(world.hosts, [c for c in world.pool().claims if isinstance(c.key, int)])) == ()
    )


@pytest.mark.serverless
def test_the_world_of_promises_is_no_empty_one():
    """Of forty worlds most see promises asked for, and kept against work that had to leave."""
    worlds = [World(random.Random(seed)) for seed in range(12)]
    for world in worlds:
        for _ in range(30):
            world.dice.choice((world.ask, world.lend, world.lend, world.hour))()
    assert sum(world.asked for world in worlds) > 40
    assert sum(world.kept for world in worlds) > 15
    assert sum(world.lent for world in worlds) > 5


# --- CPU, RAM and NVMe go with the GPUs
@pytest.mark.serverless
def test_who_leaves_for_a_share_of_the_host():
    spot = [Lodger(1, (10, 0, 0), True, 5), Lodger(2, (10, 0, 0), True, 3)]
    firm = [Lodger(3, (20, 0, 0), False, 0), Lodger(4, (20, 0, 0), False, 0)]
    assert holds.leavers((10, 0, 0), (10, 0, 0), [*spot, *firm]) == []
    assert holds.leavers((10, 0, 0), (0, 0, 0), [*spot, *firm]) == [2]  # the lowest bid
    assert holds.leavers((30, 0, 0), (0, 0, 0), [*spot, *firm]) == [1, 4] or holds.leavers(
        (30, 0, 0), (0, 0, 0), [*spot, *firm]
    ) == [2, 4]
    assert holds.leavers((40, 0, 0), (0, 0, 0), firm) == [4, 3]  # the youngest first
    assert holds.leavers((0, 5, 0), (9, 0, 9), [*spot, *firm]) == []  # none of them holds any


@pytest.mark.serverless
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(0, 30)] * 3), st.tuples(*[st.integers(0, 30)] * 3),
    st.lists(st.tuples(st.tuples(*[st.integers(0, 20)] * 3), st.booleans(), st.integers(0, 5)), max_size=8),
)  # fmt: skip
def test_leavers_are_enough_and_none_of_them_in_vain(owed, free, drawn):
    lodgers = [Lodger(n, amounts, spot, bid) for n, (amounts, spot, bid) in enumerate(drawn)]
    going = set(holds.leavers(owed, free, lodgers))
    short = [max(0, want - have) for want, have in zip(owed, free, strict=True)]

    def enough(some):
        return all(sum(lodgers[n].amounts[i] for n in some) >= short[i] for i in range(3))

    if enough(range(len(lodgers))):
        assert enough(going)
        assert not any(enough(going - {n}) for n in going)


@pytest.mark.django_db
def test_a_promise_is_not_starved_by_what_stands_beside_its_gpus():
    """Two days before, somebody takes one GPU and nearly all memory of the host; at the hour the holder's job fits all the same."""
    site = f.site(pdus=1)
    host = f.host(site, power_node="pdu-1", beat_at=NOW)
    agent, _ = f.agent(site, last_sync_at=NOW, lease_until=NOW + timedelta(days=9))
    PowerNode.objects.update(measured_w=1000, measured_at=NOW)
    listing = f.listing(site, hosts=[host])
    hog = f.contract(listing, f.organization(), gpu_count=8)
    small = f.contract(listing, f.organization(), gpu_count=8)
    start = NOW + timedelta(days=2)
    holder = f.contract(
        listing, f.organization(), gpu_count=4, kind="reserved", starts_at=start, ends_at=start + timedelta(days=9)
    )
    promise = Reservation.objects.create(
        listing=listing, contract=holder, starts_at=start, ends_at=holder.ends_at, claims_at=start, state="firm"
    )
    promise.blocks.create(host=host, gpu_indices=[4, 5, 6, 7])

    def submit(contract, now, **spec):
        spec = {"command": ["true"], "gpus": 1, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        return jobs.submit(f.actor(contract.organization), contract, spec, now=now)

    def run(now):
        Host.objects.update(beat_at=now)
        type(agent).objects.update(last_sync_at=now)
        cycle.run(site.cell_id, now=now)

    big = submit(hog, NOW, ram_mib=host.ram_mib - 4096)
    other = submit(small, NOW)
    run(NOW)
    assert Placement.objects.exclude(gpu_indices__overlap=[4, 5, 6, 7]).count() == 2
    mine = submit(holder, start, gpus=4, ram_mib=host.ram_mib // 2, vcpu_milli=host.vcpu_milli // 2)
    run(start)
    big.refresh_from_db()
    other.refresh_from_db()
    assert (big.state, other.state) == ("preempting", "placed")  # one leaves, the other is in nobody's way
    with transaction.atomic():
        placements.lock_sites([site.pk])
        placements.finish(
            [p.pk for p in big.placements.all()], to="released", now=start, actor="test", reason="drained"
        )
    assert holds.crowding(site.cell_id, start) == []
    run(start + timedelta(seconds=1))
    mine.refresh_from_db()
    assert mine.state == "placed"
    assert holds.crowding(site.cell_id, start + timedelta(seconds=2)) == []  # its own jobs hold what it was owed


class Lent:
    """A host of eight GPUs, the upper four reserved from `start` on, two hours from now."""

    def __init__(self):
        self.site = f.site(pdus=1)
        self.host = f.host(self.site, power_node="pdu-1", beat_at=NOW)
        f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(days=9))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.listing = f.listing(self.site, hosts=[self.host])
        self.start = NOW + timedelta(hours=2)
        self.owner = f.contract(
            self.listing, f.organization(), gpu_count=4, kind="reserved", starts_at=self.start, ends_at=self.start + timedelta(days=9)
        )  # fmt: skip
        self.contracts = {
            kind: f.contract(self.listing, f.organization(), gpu_count=8, kind=kind, limit_price=900_000)
            for kind in ("on_demand", "spot")
        }

    def reserve(self):
        row = Reservation.objects.create(
            listing=self.listing, contract=self.owner, starts_at=self.start, ends_at=self.owner.ends_at, claims_at=self.start, state="firm"
        )  # fmt: skip
        row.blocks.create(host=self.host, gpu_indices=[4, 5, 6, 7])
        return row

    def submit(self, kind="on_demand", **spec):
        contract = self.contracts[kind]
        spec = {"command": ["true"], "gpus": 4, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        return jobs.submit(f.actor(contract.organization), contract, spec, now=NOW)

    def gpus(self, job):
        return [p.gpu_indices for p in Placement.objects.filter(job=job)]


@pytest.mark.django_db
def test_gpus_are_lent_until_their_claim_to_who_is_gone_by_then():
    here = Lent()
    here.reserve()
    long = here.submit(gpus=8, max_seconds=7201 - STAYS_S)
    endless = here.submit()
    cycle.run(here.site.cell_id, now=NOW)
    assert here.gpus(long) == []
    decision = Decision.objects.get(job=long)
    assert decision.reason == "RESERVED_SOON"
    assert here.gpus(endless) == [[0, 1, 2, 3]]
    short = here.submit(max_seconds=7200 - STAYS_S)
    cycle.run(here.site.cell_id, now=NOW)
    assert here.gpus(short) == [[4, 5, 6, 7]]
    assert holds.disturbed(Reservation.objects.all(), NOW) == set()  # it is gone in time: nothing need move


@pytest.mark.django_db
def test_spot_stands_on_reserved_gpus_until_their_claim_and_not_after():
    here = Lent()
    here.reserve()
    spot = here.submit("spot", gpus=8)
    cycle.run(here.site.cell_id, now=NOW)
    assert here.gpus(spot) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    type(here.site.agents.get()).objects.update(last_sync_at=here.start)
    Host.objects.update(beat_at=here.start)
    cycle.run(here.site.cell_id, now=here.start)
    spot.refresh_from_db()
    assert spot.state == "preempting"


@pytest.mark.django_db
def test_cpu_that_goes_with_reserved_gpus_is_lent_alike():
    here = Lent()
    here.reserve()
    half = here.host.vcpu_milli // 2
    greedy, modest = here.submit(vcpu_milli=half + 1000), here.submit(vcpu_milli=half)
    cycle.run(here.site.cell_id, now=NOW)
    assert here.gpus(greedy) == []
    assert here.gpus(modest) == [[0, 1, 2, 3]]
    short = here.submit(vcpu_milli=half, max_seconds=60)
    cycle.run(here.site.cell_id, now=NOW)
    assert here.gpus(short) == [[4, 5, 6, 7]]


@pytest.mark.django_db
def test_what_is_reserved_between_the_plan_and_its_commit_is_left_alone():
    here = Lent()
    long, short = here.submit(), here.submit(max_seconds=60)
    taken = snapshot.take(here.site.cell, now=NOW)
    taken.requests.sort(key=lambda r: r.job, reverse=True)
    made = plan(taken.fleet, taken.requests, policy=taken.policy, now_s=int(NOW.timestamp()))
    where = {p.job: p.gpus for p in made.placements}
    row = here.reserve()
    row.blocks.update(gpu_indices=list(where[long.pk]))
    outcome = commit.commit(taken, made, now=NOW)
    assert (outcome.placed, outcome.conflicts) == ([short.pk], {long.pk: Reason.RESERVED_SOON})
