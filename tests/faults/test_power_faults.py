"""Every row of the failure table in design/power.md, played on a site whose physics, not our books, say what was drawn."""

from datetime import timedelta
from importlib import import_module
from itertools import pairwise

import pytest
from django.apps import apps
from django.db import transaction

from agent.safety import HostFacts, Memory, MinerFacts, Tree, decide
from marketplace.locks import Lock, acquire
from marketplace.models import Miner, Placement, PowerNode, ShedBatch, ShedClaim, Site
from marketplace.services import feeds, power
from scheduler import cycle, site_loop
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    made = Yard()
    made.turn(3)  # three looks at calm
    return made


def test_honest_machines_give_their_watts_within_a_minute_and_take_them_back(yard):
    one, two = yard.submit(), yard.submit()
    yard.until(lambda: yard.state(one) == yard.state(two) == "running", seconds=60)
    assert not ShedClaim.objects.filter(state="failed").exists()
    yard.turn(6)
    yard.end(one)
    yard.end(two)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists(), seconds=400)
    assert Miner.objects.filter(state="ok").count() == 14


def test_a_host_heard_only_after_the_command_may_draw_what_it_was_granted():
    """Its watts were part of what the meter saw and nobody admitted to; what it draws later was not, and is in no margin."""
    yard = Yard()
    yard.silent = {"h1", "h2"}
    yard.turn(3)
    before = dict(PowerNode.objects.values_list("name", "margin_w"))
    jobs = [yard.submit(), yard.submit()]
    yard.turn()
    yard.silent = set()
    yard.until(lambda: all(yard.state(job) == "running" for job in jobs), seconds=120)
    for _ in range(24):
        yard.turn()
        assert dict(PowerNode.objects.values_list("name", "margin_w")) == before
    assert ShedBatch.objects.exclude(answered={}).exists()


# --- acks, no drop: once more with a fresh session; mark unresponsive; choose a replacement; never grant on it
def asked(yard, job_gpus=8):
    """Submit a job; the machines that are asked for its watts, before they have heard of it."""
    job = yard.submit(gpus=job_gpus)
    yard.link = False
    yard.turn()
    yard.link = True
    return job, list(Miner.objects.filter(shed_claims__state="commanded").order_by("pk").values_list("name", flat=True))


@pytest.mark.parametrize("fault", ["phantom", "ack_ignore"])
def test_acks_and_does_not_drop(yard, fault):
    job, batch = asked(yard)
    liar = batch[0]
    yard.fleet.set_fault(liar, fault)
    generation = yard.miner(liar).desired_generation
    yard.until(lambda: yard.claims(liar)[-1].attempts == 2, seconds=60)
    assert yard.claims(liar)[-1].state == "commanded"
    asleep = set(Miner.objects.filter(desired_mode=0).values_list("name", flat=True))
    assert asleep - set(batch), "somebody else is asked while it gets its second chance"
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.until(lambda: yard.miner(liar).state == "unresponsive", seconds=60)
    assert yard.miner(liar).desired_generation > generation  # commanded once more
    assert yard.miner(liar).reserved_w >= 3500  # nameplate
    failed = next(c for c in yard.claims(liar) if c.state == "failed")
    assert (failed.attempts, failed.reason) == (2, "phantom_load" if fault == "phantom" else "acknowledged_no_drop")
    replaced = set(Miner.objects.filter(desired_mode=0, state="ok").values_list("name", flat=True)) - set(batch)
    assert replaced, "somebody else sleeps in its place"
    yard.fleet.set_fault(liar, "")
    yard.until(lambda: not Miner.objects.filter(state="unresponsive").exists(), seconds=600)
    assert yard.claims(liar)[-1].state == "confirmed"  # a test of its own, which the meter believed


def tell(yard, name, mode):
    """Command one machine, as the loop does."""
    seen = yard.miner(name)
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        command = power.Command(seen.pk, mode, seen.desired_generation)
        return power.command_miners(yard.site.pk, [command], now=yard.now)


def test_who_does_not_drop_from_a_lower_mode_counts_at_its_nameplate_all_the_same(yard):
    """It drew 2400 W when it stopped obeying: nobody knows that it will not draw 3500."""
    name = yard.under("pdu-1")[0]
    assert tell(yard, name, 1) == 1
    yard.until(lambda: yard.miner(name).confirmed_w == 2400, seconds=50)
    yard.fleet.set_fault(name, "ack_ignore")
    assert tell(yard, name, 0) == 1
    yard.until(lambda: yard.miner(name).state == "unresponsive", seconds=60)
    assert yard.miner(name).measured_w < 2600
    assert yard.miner(name).reserved_w == 3500


def test_a_liar_that_is_tested_and_lies_again_is_not_believed(yard):
    _, batch = asked(yard)
    liar = batch[0]
    yard.fleet.set_fault(liar, "phantom")
    failed = lambda: sum(c.state == "failed" for c in yard.claims(liar))  # noqa: E731
    yard.until(lambda: failed() == 2, seconds=600)
    assert yard.miner(liar).state == "unresponsive"
    assert yard.miner(liar).reserved_w >= 3500


def test_a_test_that_the_sites_own_loop_put_to_sleep_is_made_again_and_keeps_nobody_waiting(yard):
    """Told to wake for its test, and latched by the agent in that moment: it sleeps on, and hears of nothing but a newer generation."""
    _, batch = asked(yard)
    liars = batch[:2]
    for name in liars:
        yard.fleet.set_fault(name, "phantom")
    yard.until(lambda: {yard.miner(name).state for name in liars} == {"unresponsive"}, seconds=120)
    for name in liars:
        yard.fleet.set_fault(name, "")
    tested = lambda: next((m for m in map(yard.miner, liars) if m.desired_mode), None)  # noqa: E731
    latched = yard.until(tested, seconds=300)
    i = yard.fleet.index[latched.name]
    yard.generation[latched.name], yard.wanted[latched.name] = latched.desired_generation, yard.fleet.ladders[i][0][0]
    yard.fleet.asleep[i] = True
    yard.fleet._retarget(i)
    yard.until(lambda: not Miner.objects.filter(state="unresponsive").exists(), seconds=1200)
    assert yard.miner(latched.name).desired_generation > latched.desired_generation
    assert {yard.claims(name)[-1].state for name in liars} == {"confirmed"}


def doubted(yard, *names):
    """Machines that were told to sleep and drew on."""
    for name in names:
        yard.fleet.set_fault(name, "phantom")
        assert tell(yard, name, 0) == 1
    yard.until(lambda: {yard.miner(name).state for name in names} == {"unresponsive"}, seconds=120)
    for name in names:
        yard.fleet.set_fault(name, "")


def test_who_never_wakes_for_its_test_is_told_less_and_less_often(yard):
    dead = yard.under("pdu-1")[0]
    doubted(yard, dead)
    yard.fleet.set_fault(dead, "ack_ignore")  # it sleeps now, acknowledges that it shall wake, and sleeps on
    began, told = yard.now, []
    while yard.now < began + timedelta(minutes=165):
        yard.now += timedelta(seconds=115)
        yard.turn()
        machine = yard.miner(dead)
        if machine.desired_mode and machine.changed_at not in told:
            told.append(machine.changed_at)
    minutes = [(later - at) / timedelta(minutes=1) for at, later in pairwise(told)]
    assert minutes == pytest.approx([3, 6, 12, 24, 48, 60], abs=2.1)
    assert machine.state == "unresponsive"
    yard.fleet.set_fault(dead, "")
    yard.now += timedelta(hours=1)
    yard.until(lambda: yard.miner(dead).state == "ok", seconds=300)


def test_who_wakes_late_for_its_test_is_judged_at_once(yard):
    late = yard.under("pdu-1")[0]
    doubted(yard, late)
    yard.fleet.set_fault(late, "ack_ignore")
    began = yard.now
    while yard.now < began + timedelta(minutes=30):
        yard.now += timedelta(seconds=115)
        yard.turn()
    yard.fleet.set_fault(late, "")
    i = yard.fleet.index[late]
    yard.fleet.asleep[i], yard.fleet.profile[i] = False, 2
    yard.fleet._retarget(i)
    yard.until(lambda: yard.miner(late).state == "ok", seconds=180)


def test_a_doubted_machine_that_is_silent_keeps_nobody_waiting(yard):
    """Both were told once and did not wake. The one that was told first speaks no more: the turn is the other's."""
    silent, other = yard.under("pdu-1")[:2]
    doubted(yard, silent, other)
    for name in (silent, other):
        yard.fleet.set_fault(name, "ack_ignore")
    yard.until(lambda: yard.miner(silent).desired_mode, seconds=300)
    yard.silent.add(silent)
    yard.until(lambda: yard.miner(other).desired_mode, seconds=300)
    yard.fleet.set_fault(other, "")
    yard.until(lambda: yard.miner(other).state == "ok", seconds=600)
    assert yard.miner(silent).state == "unresponsive"


def test_machines_that_are_not_believed_are_tested_while_somebody_waits_for_their_watts(yard):
    first, _ = asked(yard)
    for miner in Miner.objects.all():
        yard.fleet.set_fault(miner.name, "phantom")
    yard.until(lambda: not Miner.objects.filter(state="ok").exists(), seconds=280)
    for miner in Miner.objects.all():
        yard.fleet.set_fault(miner.name, "")
    yard.until(lambda: Miner.objects.filter(state="ok").exists(), seconds=600)
    first.refresh_from_db()
    assert first.state == "placed", "one wait followed another"
    assert first.attempt > 1
    yard.until(lambda: yard.state(first) == "running", seconds=2400)


# --- no answer / stale: reserve nameplate
def test_no_answer(yard):
    job, batch = asked(yard)
    yard.silent.add(batch[0])
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.until(lambda: yard.miner(batch[0]).state == "unresponsive", seconds=60)
    assert yard.miner(batch[0]).reserved_w >= 3500
    sleeper = Miner.objects.filter(desired_mode=0, state="ok").exclude(name=batch[0]).first()
    assert sleeper.reserved_w == 25
    yard.silent.add(sleeper.name)
    yard.turn(32)  # longer than a reading is fresh
    sleeper.refresh_from_db()
    assert sleeper.reserved_w == 3500, "nobody knows what it draws"


# --- meter stale: no new grants, no wakes at the site; keep running
def test_meter_stale(yard):
    first = yard.submit()
    yard.until(lambda: yard.state(first) == "running", seconds=120)
    yard.physics.meter_stale[2] = True  # the other PDU's
    yard.turn(32)
    Miner.objects.filter(power_node__name="pdu-2").update(manual=True)  # watts are not what is missing
    asleep = Miner.objects.filter(desired_mode=0).count()
    second = yard.submit(gpus=1)
    yard.turn(4)
    assert not Placement.objects.filter(job=second, state__in=("granted", "starting", "running")).exists()
    assert yard.state(first) == "running"
    yard.end(first)
    yard.turn(8)
    assert Miner.objects.filter(desired_mode=0).count() == asleep, "there is room, and nothing is woken into it"
    yard.physics.meter_stale[2] = False
    yard.until(lambda: Miner.objects.filter(desired_mode=0).count() < asleep, seconds=120)
    assert yard.state(second) in {"placed", "running"}


def test_a_meter_that_has_never_reported_stops_wakes_and_what_fits_is_granted():
    yard = Yard()
    yard.physics.meter_stale[2] = True
    yard.turn(3)
    name = yard.under("pdu-1")[0]
    assert tell(yard, name, 0) == 1
    yard.turn(30)
    assert yard.miner(name).reserved_w == 25, "its own meter speaks"
    assert yard.miner(name).desired_mode == 0, "there is room, and it pays"
    assert tell(yard, name, 2) == 0
    job = yard.submit(gpus=1)
    yard.until(lambda: yard.state(job) == "running", seconds=60)
    yard.end(job)
    yard.physics.meter_stale[2] = False
    yard.until(lambda: yard.miner(name).desired_mode, seconds=120)


def test_meter_stale_grants_not_even_what_a_host_has_booked_still(yard):
    """Who has just left has its host's watts booked until its limits are read back: they are no grant for who comes then."""
    jobs = [yard.submit(), yard.submit()]
    yard.until(lambda: all(yard.state(job) == "running" for job in jobs), seconds=240)
    yard.physics.meter_stale[0] = True
    yard.turn(32)
    yard.end(jobs[0])
    third = yard.submit()
    yard.turn(6)
    assert yard.state(third) == "placed"
    assert not Placement.objects.filter(job=third, state__in=Placement.AT_SITE).exists()
    yard.physics.meter_stale[0] = False
    yard.until(lambda: yard.state(third) == "running", seconds=120)


# --- meter > 95 % of cap: stop wakes, shed hashing under that node
def test_meter_over_95_percent(yard):
    yard.physics.fixed[1] += 0.965 * yard.physics.cap[1] - yard.physics.true_w[1]  # somebody plugs in a heater
    yard.turn(8)
    asleep = Miner.objects.filter(desired_mode=0)
    assert asleep.exists()
    assert {m.power_node.name for m in asleep} == {"pdu-1"}
    assert yard.physics.meter_w[1] < 0.95 * yard.physics.cap[1]
    yard.physics.fixed[1] += 0.96 * yard.physics.cap[1] - yard.physics.true_w[1]
    yard.turn()
    sleeper = asleep.first()
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        wake = power.Command(sleeper.pk, 2, sleeper.desired_generation)
        assert power.command_miners(yard.site.pk, [wake], now=yard.now) == 0


# --- meter > cap: the site's own loop sleeps machines, then caps GPUs; a breaker is not a control
def own_loop(yard, seconds, memory, done, grow=lambda _second: 0.0):
    """The site's own loop, with nobody else: each second the physics goes on, it decides, and its devices obey. `grow`: watts that
    somebody adds at pdu-1; `done`: what was done, (what, whom, whose).
    """
    physics, fleet = yard.physics, yard.fleet
    for second in range(seconds):
        yard.now += timedelta(seconds=1)
        physics.fixed[1] += grow(second)
        physics.step(1.0, yard.now.timestamp())
        floor = {h: max(physics.hosts.limits(i)) <= 200 for i, h in enumerate(physics.hosts.names)}
        work = {h: [] for h in physics.hosts.names}
        for key, (i, *_) in physics.hosts.workloads.items():
            work[physics.hosts.names[i]].append(key)
        miners = {
            name: MinerFacts(name, row["power_node"], round(fleet.true_w[i]), 25, shed=bool(fleet.asleep[i]))
            for i, (name, row) in enumerate(zip(fleet.names, yard.spec["miners"], strict=True))
        }
        hosts = {
            row["name"]: HostFacts(row["name"], row["power_node"], floor[row["name"]], tuple(work[row["name"]]))
            for row in yard.spec["hosts"]
        }
        meters = {name: (w, at) for name, w, at in physics.meters()}
        tree, order = Tree(yard.safety["nodes"]), yard.safety["shed_order"]
        found = decide(
            tree,
            order,
            meters,
            miners,
            hosts,
            memory,
            yard.now.timestamp(),
            stale_s=15,
            settle_s=8,
            gives_way=yard.gives_way,
        )
        for name, node in found.shed:
            done.append(("sleep", name, node))
            fleet.asleep[fleet.index[name]] = True
            fleet._retarget(fleet.index[name])
        for name, node in found.cap_hosts:
            done.append(("cap", name, node))
            physics.hosts.set_limits(physics.hosts.index[name], [200] * 8)
        for key, node in found.evict:
            done.append(("evict", key, node))
            physics.hosts.detach(key)


def test_meter_over_the_cap(yard):
    physics, done = yard.physics, []
    physics.fixed[1] += 1.08 * physics.cap[1] - physics.true_w[1]
    own_loop(yard, 40, Memory(), done)
    assert not physics.trips
    assert physics.true_w[1] <= physics.cap[1]
    assert {(what, yard.miner(name).power_node.name) for what, name, _ in done} == {("sleep", "pdu-1")}


def test_meter_over_the_cap_with_jobs_caps_gpus_and_then_evicts(yard):
    """A load that grows until no machine is left to sleep, then beyond what the GPUs can give: the last rung is the youngest job,
    and nothing of the other PDU is touched. The breaker holds throughout.
    """
    jobs = [yard.submit(gpus=4) for _ in range(4)]
    yard.until(lambda: all(yard.state(job) == "running" for job in jobs), seconds=240)
    yard.turn(6)
    here = {str(p.pk) for p in Placement.objects.filter(host__name="h1")}
    assert len(here) == 2
    physics, memory, done = yard.physics, Memory(), []
    cap, other = physics.cap[1], physics.true_w[2]

    def until_left(watts):  # of the PDU's cap, by a load that grows for 40 s
        step = (cap - watts - physics.fixed[1]) / 40
        return lambda second: step if second < 40 else 0.0

    own_loop(yard, 100, memory, done, until_left(8_000))
    assert [what for what, *_ in done][-1] == "cap"
    assert {name for what, name, _ in done if what == "cap"} == {"h1"}
    assert set(yard.under("pdu-1")) == {n for n in yard.under("pdu-1") if yard.fleet.asleep[yard.fleet.index[n]]}
    assert here <= set(physics.hosts.workloads), "capped, not evicted"
    assert physics.true_w[1] <= cap
    done.clear()
    own_loop(yard, 100, memory, done, until_left(4_000))
    assert [what for what, *_ in done] == ["evict"] * len(done)
    assert done[0][1] == max(here, key=int), "the youngest first"
    assert physics.true_w[1] <= cap
    assert not physics.trips
    assert {node for *_, node in done} == {"pdu-1"}
    assert physics.true_w[2] == pytest.approx(other, rel=0.05)


# --- control plane away: running work goes on within its lease; the site holds or lowers, never raises
def test_control_away(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.turn(12)
    yard.control = yard.link = False
    drawn = yard.physics.true_w[0]
    yard.turn(30)
    assert yard.physics.true_w[0] < 1.02 * drawn
    assert len(yard.physics.hosts.workloads) == 1
    yard.control = yard.link = True
    yard.turn(3)
    assert yard.state(job) == "running"


# --- price or hashprice stale: keep the last plan, no increases
def test_price_stale(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.priced = False
    yard.end(job)
    yard.now += timedelta(days=2)  # nobody has said a price since
    yard.turn(10)
    asleep = Miner.objects.filter(desired_mode=0).count()
    assert asleep >= 3
    again = yard.submit()
    yard.until(lambda: yard.state(again) == "running", seconds=120)  # lowering needs no price
    yard.priced = True
    yard.end(again)
    yard.until(lambda: Miner.objects.filter(desired_mode=0).count() < asleep, seconds=200)


def test_energy_price_stale(yard):
    def said(uusd_mwh):
        feeds.store(
            "energy_microusd_per_mwh",
            uusd_mwh,
            source="test",
            observed_at=yard.now,
            now=yard.now,
            scope=yard.site.region,
        )

    said(40_000_000)
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.now += timedelta(hours=3)  # what hashing pays is known all the time
    yard.end(job)
    yard.turn(20)
    asleep = Miner.objects.filter(desired_mode=0).count()
    assert asleep >= 3
    said(40_000_000)
    yard.until(lambda: Miner.objects.filter(desired_mode=0).count() < asleep, seconds=200)


# --- duplicate beat, two schedulers: fencing generation; the older loses
def test_duplicate_beat(yard):
    yard.submit()
    yard.control = False
    yard.turn()
    cycle.run(yard.contract.cell_id, now=yard.now)
    site = Site.objects.get(pk=yard.site.pk)
    rates = feeds.rates(site, now=yard.now)
    ledgers = [power.Ledger.of(site.pk) for _ in range(2)]
    one, two = (site_loop.think(site_loop.Seen(site, ledger, [], rates, yard.now)) for ledger in ledgers)
    assert one.commands
    assert one == two
    done = []
    for thought in (one, two):
        with transaction.atomic():
            acquire((Lock.SITE, site.pk))
            done.append(power.command_miners(site.pk, thought.commands, now=yard.now))
    assert done == [len(one.commands), 0]
    assert ShedClaim.objects.count() == done[0]


def test_a_thought_of_before_the_mode_changed_wakes_nobody(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    sleeper = Miner.objects.filter(desired_mode=0).first()
    wake = power.Command(sleeper.pk, 2, sleeper.desired_generation)
    PowerNode.objects.update(cap_w=10**6)  # room enough
    Site.objects.update(mode="hold")
    with transaction.atomic():
        acquire((Lock.SITE, yard.site.pk))
        assert power.command_miners(yard.site.pk, [wake], now=yard.now) == 0
        Site.objects.update(mode="auto")
        assert power.command_miners(yard.site.pk, [wake], now=yard.now) == 1


# --- restart mid-event: state is in Postgres; desired vs observed; re-assert
def test_restart_mid_event(yard):
    job, batch = asked(yard)
    yard.control = False  # the worker dies with machines on their way down
    yard.turn(6)
    assert yard.state(job) == "placed"
    yard.control = True
    yard.until(lambda: yard.state(job) == "running", seconds=60)
    assert set(ShedClaim.objects.filter(state="confirmed").values_list("miner__name", flat=True)) == set(batch)


# --- power returns after an outage: what boots hashing counts, is slept, and nothing else wakes
def test_power_returns(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.turn(3)
    sleepers = set(Miner.objects.filter(desired_mode=0).values_list("name", flat=True))
    where = yard.miner(min(sleepers)).power_node.name
    n = yard.physics.node_index[where]
    sleepers &= set(yard.under(where))
    before = yard.physics.energised()
    yard.physics.closed[n] = False
    lost = before & ~yard.physics.energised()
    yard.fleet.power_cut(lost[yard.physics.miner_node])
    yard.physics.hosts.dark(lost[yard.physics.host_node])
    yard.turn(6)
    yard.physics.reset_breaker(where)
    assert not any(yard.fleet.asleep[yard.fleet.index[name]] for name in sleepers)  # they come back hashing
    yard.turn(12)
    assert all(yard.fleet.asleep[yard.fleet.index[name]] for name in sleepers)


def test_power_returns_nothing_is_woken_until_it_is_metered_and_then_group_by_group(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.turn(3)
    sleepers = set(Miner.objects.filter(desired_mode=0).values_list("name", flat=True))
    where = yard.miner(min(sleepers)).power_node.name
    n = yard.physics.node_index[where]
    before = yard.physics.energised()
    yard.physics.meter_stale[n] = True
    yard.physics.closed[n] = False
    lost = before & ~yard.physics.energised()
    yard.fleet.power_cut(lost[yard.physics.miner_node])
    yard.physics.hosts.dark(lost[yard.physics.host_node])
    yard.turn(34)
    below = Miner.objects.filter(power_node__name=where)
    assert all(m.reserved_w == m.mode_watts[-1] for m in below), "nobody knows what they will do when it returns"
    yard.end(job)
    yard.physics.reset_breaker(where)
    yard.turn(14)
    assert sleepers <= set(Miner.objects.filter(desired_mode=0).values_list("name", flat=True)), (
        "there is room, and no meter"
    )
    assert all(yard.fleet.asleep[yard.fleet.index[name]] for name in sleepers), "those that booted hashing were slept"
    yard.physics.meter_stale[n] = False
    asleep, steps = set(sleepers), []
    for _ in range(80):
        yard.turn()
        now = set(Miner.objects.filter(desired_mode=0).values_list("name", flat=True))
        woken = [yard.miner(name) for name in asleep - now]
        steps.append(sum(m.commanded_w for m in woken if m.power_node.name == where))
        asleep = now
    assert not asleep, "all hash again"
    assert max(steps) == 3500, "one by one: a machine is more than a tenth of this PDU's cap"
    assert sum(1 for watts in steps if watts) >= len(sleepers & set(yard.under(where)))


@pytest.mark.parametrize("staggered", [True, False])
def test_power_returns_and_what_wakes_at_once_would_trip_what_wakes_in_groups_does_not(yard, monkeypatch, staggered):
    """Everything sleeps when a PDU goes dark, boots hashing when its power returns, and is slept; then all of it may hash again."""
    if not staggered:
        monkeypatch.setattr(site_loop, "_staged", all_now)
    Site.objects.filter(pk=yard.site.pk).update(mode="shed")
    yard.turn(8)
    n = yard.physics.node_index["pdu-1"]
    before = yard.physics.energised()
    yard.physics.closed[n] = False
    yard.fleet.power_cut((before & ~yard.physics.energised())[yard.physics.miner_node])
    yard.turn(6)
    yard.physics.reset_breaker("pdu-1")
    yard.turn(16)
    assert all(yard.fleet.asleep), "those that booted hashing were slept"
    assert not yard.physics.trips, "no two of them came on in the same moment"
    Site.objects.filter(pk=yard.site.pk).update(mode="auto")
    yard.turn(24)
    tripped = {trip["node"] for trip in yard.physics.trips}
    assert ("pdu-1" in tripped) is not staggered
    if staggered:
        assert not tripped
        assert not Miner.objects.filter(power_node__name="pdu-1", desired_mode=0).exists(), "all hash again"


def all_now(_ledger, miners, _fleet, modes, changes):
    """`site_loop._staged` without its groups: every machine at once."""
    return [power.Command(miners[i].pk, int(modes[i]), miners[i].desired_generation) for i in map(int, changes)]


# --- what the meters saw before a command
def test_readings_above_the_meter_before_a_command_are_no_watts_after_it(yard):
    """In an outage the meter falls before the readings do. What was commanded then must not hold its watts for ever: no test would
    ever be due under a node that stands over its cap for them.
    """
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.turn(3)
    before = dict(PowerNode.objects.values_list("name", "margin_w"))
    for batch in ShedBatch.objects.filter(closed_at=None):
        batch.before = {pk: watts - 20_000 for pk, watts in batch.before.items()}
        batch.save()
    yard.turn(3)
    assert ShedBatch.objects.filter(closed_at=None).exists()
    assert dict(PowerNode.objects.values_list("name", "margin_w")) == before


# --- the history of sheds
def test_a_lowering_from_before_there_were_batches_is_no_failure(yard):
    """Its machine sleeps honestly; nothing is left to compare the meters with. It is believed like one that slept before."""
    job, asleep = asked(yard)
    before, *since = asleep
    assert since
    ShedClaim.objects.filter(miner=yard.miner(before)).update(batch=None, target_w=0)
    migration = import_module("marketplace.migrations.0017_open_sheds")
    migration.close_without_batch(apps, None)
    states = dict(ShedClaim.objects.values_list("miner__name", "state"))
    assert states == {before: "failed", **dict.fromkeys(since, "commanded")}  # those with a batch are judged by it
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    assert {yard.miner(name).state for name in asleep} == {"ok"}
    assert all(yard.miner(name).reserved_w >= yard.miner(name).commanded_w > 0 for name in asleep)


def test_what_is_long_over_of_sheds_is_forgotten(yard, settings):
    job, asleep = asked(yard)
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.end(job)
    yard.until(lambda: not Miner.objects.filter(desired_mode=0).exists(), seconds=400)
    yard.turn()
    assert ShedBatch.objects.exclude(closed_at=None).exists()
    later = yard.now + timedelta(days=settings.SHED_RECORD_DAYS, seconds=1)
    assert power.forget(later - timedelta(days=1)) == 0
    doubted = yard.miner(asleep[0])
    ShedClaim.objects.filter(miner=doubted).update(state="failed")
    Miner.objects.filter(pk=doubted.pk).update(state="unresponsive")
    assert power.forget(later) == 0
    Miner.objects.filter(pk=doubted.pk).update(state="ok")
    assert power.forget(later) == 1
    assert not ShedBatch.objects.exists()
    assert not ShedClaim.objects.exists()
