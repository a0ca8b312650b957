"""A replica of a running gang is lost: the others go on by the job's own policy, on the real database and through the agent's door."""

from datetime import timedelta

import pytest
from django.db import transaction

from billing import usage
from marketplace.models import Cell, Host, Job, JobEvent, Placement, PlacementEvent, PowerNode
from marketplace.services import agents, jobs, leases, placements, power, sites
from scheduler import commit, cycle, site_loop, snapshot, why
from scheduler.core.plan import plan
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def at(seconds):
    return NOW + timedelta(seconds=seconds)


class Market:
    """One site of two leaves with three hosts each; a job of three replicas, each a whole host, in one leaf."""

    def __init__(self, **spec):
        self.site = f.site(pdus=1)
        self.hosts = [f.host(self.site, power_node="pdu-1", leaf=f"leaf-{i // 3}", beat_at=NOW) for i in range(6)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=at(900))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.contract = f.contract(f.listing(self.site, hosts=self.hosts), f.organization(), gpu_count=64)
        spec = {
            "command": ["true"], "gpus": 8, "vcpu_milli": 1000, "ram_mib": 1024, "replicas": 3, "topology": "leaf",
            "topology_required": True, "on_replica_loss": "replace_replica", **spec,
        }  # fmt: skip
        self.job = jobs.submit(f.actor(self.contract.organization), self.contract, spec, now=NOW)
        self.cycle(0)
        self.report("running", 5)
        assert self.fresh().state == "running"

    def fresh(self):
        self.job.refresh_from_db()
        return self.job

    def cycle(self, seconds):
        Host.objects.update(beat_at=at(seconds))
        type(self.agent).objects.update(last_sync_at=at(seconds), lease_until=at(seconds + 900))
        return cycle.run(self.job.cell_id, now=at(seconds))

    def live(self):
        return {p.rank: p for p in Placement.objects.filter(job=self.job).exclude(state__in=Placement.FINAL)}

    def report(self, state, seconds, *ranks, **fields):
        """The agent's word on these ranks, or on all that live."""
        live = self.live()
        rows = [
            {"pk": p.pk, "generation": p.generation, "state": state, "running_at": at(seconds), **fields}
            for rank, p in sorted(live.items())
            if not ranks or rank in ranks
        ]
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            placements.observe(self.agent, rows, now=at(seconds))

    def lose(self, rank, seconds, reason="host_lost", last_beat=None):
        """Its host dies: the agent says so with the second of the last beat."""
        when = at(seconds if last_beat is None else last_beat)
        self.report("failed", seconds, rank, reason=reason, finished_at=when)

    def told(self):
        rows = agents.desired(self.agent, {"sequence": 1, "known_safety": -1}, now=NOW)["placements"]
        return {row["rank"]: row for row in rows}

    def billed(self, placement, until):
        placement.refresh_from_db()
        spans = usage.billable(
            placement, PlacementEvent.objects.filter(placement=placement).order_by("id"), until=at(until)
        )
        return sum(span.seconds for span in spans)

    def leaves(self):
        return {p.host.leaf for p in self.live().values()}

    def story(self):
        return [e.reason for e in JobEvent.objects.filter(job=self.job).order_by("id") if e.from_state == e.to_state]

    def sound(self):
        assert sites.recompute_reserved(self.site) == dict(
            PowerNode.objects.filter(site=self.site).values_list("id", "reserved_mw")
        )
        for host in Host.objects.all():
            held = {
                g for p in Placement.objects.filter(host=host).exclude(state__in=Placement.FINAL) for g in p.gpu_indices
            }
            assert host.gpu_free == [0 if g in held else 1000 for g in range(8)]


def test_only_the_lost_rank_is_placed_again_in_the_gangs_own_leaf():
    market = Market()
    before = market.live()
    leaf = market.leaves()
    lost = before[1]
    Host.objects.filter(pk=lost.host_id).update(state="lost")
    market.lose(1, 60, last_beat=50)
    job = market.fresh()
    assert (job.state, job.lost_ranks, job.epoch, job.restarts, job.attempt) == ("running", [1], 1, 1, 1)
    assert {r: p.pk for r, p in market.live().items()} == {0: before[0].pk, 2: before[2].pk}
    assert all(p.release_requested_at is None for p in market.live().values())

    # No host is left in that leaf: it waits rather than break its topology, though the other leaf is empty.
    assert market.cycle(61).jobs_placed == 0
    assert market.fresh().decision.reason == "TOPOLOGY"
    assert market.fresh().lost_ranks == [1]
    Host.objects.filter(pk=lost.host_id).update(state="active")
    assert market.cycle(70).jobs_placed == 1
    job = market.fresh()
    assert (job.state, job.lost_ranks, job.attempt) == ("running", [], 1)
    now = market.live()
    assert sorted(now) == [0, 1, 2]
    assert (now[0].pk, now[2].pk) == (before[0].pk, before[2].pk)
    assert (now[1].pk != lost.pk, now[1].attempt, now[1].epoch) == (True, 1, 1)
    assert market.leaves() == leaf
    market.report("running", 80, 1)
    assert market.fresh().repair_since is None
    assert market.story() == [
        "lost rank 1 (host_lost): to be placed again",
        "lost ranks placed again",
        "the gang is whole again",
    ]
    market.report("exited", 100, exit_code=0, finished_at=at(100))
    assert (market.fresh().state, market.job.restarts) == ("succeeded", 1)
    market.sound()
    # Nobody is billed from the last beat of the dead host until the gang is whole: 5..50 and 80..100.
    assert market.billed(before[0], 200) == market.billed(before[2], 200) == 45 + 20
    assert market.billed(lost, 200) == 45
    assert market.billed(now[1], 200) == 20


def test_an_explanation_shows_each_rank_where_it_stands_now():
    market = Market()
    lost = market.live()[1]
    Host.objects.filter(pk=lost.host_id).update(state="lost")
    market.lose(1, 60)
    assert why.explain(market.fresh(), deep=False)["outcome"] == "waiting"
    Host.objects.filter(pk=lost.host_id).update(state="active")
    market.cycle(70)
    stands = [(rank, p.host.name) for rank, p in sorted(market.live().items())]
    for seconds in (71, 80):  # before the newcomer runs, and then
        answer = why.explain(market.fresh(), fresh=True)
        assert answer["outcome"] == "placed"
        assert [(r["rank"], r["host"]) for r in answer["placed"]["replicas"]] == stands
        market.report("running", seconds, 1)


def test_the_others_are_told_by_a_new_table_and_the_newcomer_starts_alone():
    market = Market()
    names = {rank: p.host.name for rank, p in market.live().items()}
    first = market.told()
    assert [row["rank"] for row in first[2]["ranks"]] == [0, 1, 2]
    assert (first[2]["epoch"], first[2]["world_size"], first[2]["master_host"]) == (0, 3, names[0])
    generation, site_generation = first[2]["generation"], market.site.desired_generation
    market.lose(0, 60)
    told = market.told()
    assert sorted(told) == [1, 2]
    assert [row["rank"] for row in told[2]["ranks"]] == [1, 2]
    assert (told[2]["epoch"], told[2]["world_size"], told[2]["desired"]) == (1, 3, "run")
    market.site.refresh_from_db()
    assert market.site.desired_generation > site_generation
    market.cycle(61)
    told = market.told()
    newcomer = market.live()[0]
    assert told[0]["gang"] == [newcomer.public_id]  # it waits for nobody: the others run
    assert [(row["rank"], row["placement"]) for row in told[1]["ranks"]] == [
        (rank, p.public_id) for rank, p in sorted(market.live().items())
    ]
    assert {row["master_host"] for row in told.values()} == {newcomer.host.name}
    assert told[2]["generation"] == generation  # nothing about it has changed
    assert set(first[1]["gang"]) == {row["placement"] for row in first[0]["ranks"]}


def test_two_losses_at_once_are_placed_at_once_and_the_last_one_restarts_the_gang():
    market = Market()
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        live = market.live()
        rows = [
            {"pk": live[r].pk, "generation": 1, "state": "failed", "reason": "host_lost", "finished_at": at(60)}
            for r in (0, 2)
        ]
        placements.observe(market.agent, rows, now=at(60))
    assert (market.fresh().lost_ranks, market.job.epoch, market.job.restarts) == ([0, 2], 1, 1)
    market.lose(1, 61)
    job = market.fresh()
    assert (job.state, job.lost_ranks, job.repair_since, job.restarts) == ("requeued", [], None, 2)
    assert market.cycle(62).jobs_placed == 1
    assert (market.fresh().attempt, len(market.live())) == (2, 3)
    market.sound()


def test_newcomers_that_were_placed_together_start_together():
    """One has its watts, the other waits for miners: nobody runs, and is billed, beside a rank that is not there."""
    market = Market()
    market.lose(0, 60)
    market.lose(2, 60)
    market.cycle(61)
    first, _, last = (p for _, p in sorted(market.live().items()))
    Placement.objects.filter(pk=last.pk).update(state="shedding")
    assert sorted(market.told()) == [1]
    Placement.objects.filter(pk=last.pk).update(state="granted")
    told = market.told()
    assert sorted(told) == [0, 1, 2]
    assert told[0]["gang"] == told[2]["gang"] == [first.public_id, last.public_id]


def test_a_plan_for_one_loss_is_void_after_the_next():
    market = Market()
    market.lose(0, 60)
    cell = Cell.objects.get(pk=market.job.cell_id)
    stale = snapshot.take(cell, now=at(61))
    made = plan(stale.fleet, stale.requests, stale.running, policy=stale.policy, seed=1, now_s=0)
    assert [p.replica for p in made.placements] == [0]
    market.lose(1, 62)
    outcome = commit.commit(stale, made, now=at(63))
    assert (outcome.placed, list(outcome.conflicts)) == ([], [market.job.pk])
    assert market.fresh().lost_ranks == [0, 1]
    assert market.cycle(64).placements == 2
    assert sorted(market.live()) == [0, 1, 2]
    stale.cell.refresh_from_db()  # the same plan once more, past the fence: its rank has been placed
    stale.generation = stale.cell.generation
    assert commit.commit(stale, made, now=at(65)).placed == []
    market.sound()


def test_a_newcomer_that_is_lost_before_it_runs_is_placed_again_until_the_restarts_are_used():
    market = Market(max_restarts=2)
    for n, seconds in enumerate((60, 70), 1):
        market.lose(1, seconds, reason="start_failed")
        assert (market.fresh().epoch, market.job.restarts) == (n, n)
        market.cycle(seconds + 1)
        assert market.live()[1].epoch == n
    market.lose(1, 80, reason="start_failed")  # a third time is one too many: the gang is taken down
    assert all(p.desired == "drain" for p in market.live().values())
    market.report("exited", 90, exit_code=143, reason="drained")
    assert (market.fresh().state, market.job.state_reason) == ("failed", "start_failed, 2 restarts used")
    market.sound()


def test_a_failure_of_its_own_ends_the_gang_whatever_the_policy():
    market = Market()
    market.report("exited", 60, 1, exit_code=3)
    assert market.fresh().lost_ranks == []
    assert all(p.desired == "drain" for p in market.live().values())
    market.report("exited", 70, exit_code=143, reason="drained")
    assert (market.fresh().state, market.job.state_reason) == ("failed", "exit code 3")


def test_a_site_that_is_lost_as_a_whole_starts_the_gang_again():
    market = Market()
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        leases.watch(market.site, now=at(901))
    assert (market.fresh().state, market.job.lost_ranks, market.job.epoch) == ("requeued", [], 0)
    assert market.live() == {}


def test_a_rank_that_is_done_is_not_lost_and_the_rest_may_still_lose():
    market = Market()
    market.report("exited", 60, 0, exit_code=0)
    market.lose(1, 61)
    assert market.fresh().lost_ranks == [1]
    market.cycle(62)
    assert market.told()[1]["desired"] == "run"  # listed, though rank 0 will never be again
    market.report("running", 63, 1)
    market.report("exited", 70, exit_code=0)
    assert market.fresh().state == "succeeded"


def test_a_gang_shrinks_to_its_minimum_and_then_starts_again():
    market = Market(on_replica_loss="shrink", min_replicas=2)
    before = market.live()
    market.lose(0, 60, last_beat=50)
    job = market.fresh()
    assert (job.state, job.lost_ranks, job.epoch, job.repair_since) == ("running", [0], 1, None)
    assert market.cycle(61) is None  # nothing waits
    told = market.told()
    assert {(row["rank"], row["world_size"]) for row in told.values()} == {(0, 2), (1, 2)}
    assert [row["host"] for row in told[0]["ranks"]] == [before[1].host.name, before[2].host.name]
    assert told[1]["master_host"] == before[1].host.name
    assert market.billed(before[1], 100) == 45 + 40  # free from the last beat until it went on without
    market.lose(1, 70)
    assert market.live()[2].desired == "drain"  # one is too few
    market.report("exited", 75, exit_code=143, reason="drained")
    assert (market.fresh().state, market.job.lost_ranks) == ("requeued", [])
    assert market.cycle(76).placements == 3
    market.sound()


def test_a_shrunk_gang_that_ends_well_has_succeeded():
    market = Market(on_replica_loss="shrink", min_replicas=1)
    market.lose(2, 60)
    market.lose(0, 61)
    assert (market.fresh().state, market.job.lost_ranks, market.job.epoch) == ("running", [0, 2], 2)
    market.report("exited", 70, exit_code=0)
    assert market.fresh().state == "succeeded"


def test_by_default_all_start_again_and_nobody_pays_for_the_silence():
    market = Market(on_replica_loss="restart_gang")
    before = market.live()
    market.lose(1, 60, last_beat=40)
    assert all(p.desired == "drain" for p in market.live().values())
    market.report("exited", 65, exit_code=143, reason="drained")
    assert market.fresh().state == "requeued"
    assert {market.billed(p, 100) for p in before.values()} == {35}


def test_a_newcomer_without_watts_goes_elsewhere_and_the_gang_goes_on():
    market = Market()
    market.lose(1, 60)
    market.cycle(61)
    newcomer = market.live()[1]
    Placement.objects.filter(pk=newcomer.pk).update(state="shedding")
    Job.objects.filter(pk=market.job.pk).update(restarts=3)
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        site_loop.give_up(power.Ledger.of(market.site.pk), now=at(61 + 301))
    job = market.fresh()
    assert (job.state, job.lost_ranks, job.restarts) == ("running", [1], 3)
    assert sorted(market.live()) == [0, 2]
    assert all(p.desired == "run" for p in market.live().values())
    assert market.cycle(363).placements == 1
    market.sound()


def test_a_waiting_rank_is_cancelled_or_preempted_with_its_gang():
    market = Market()
    market.lose(1, 60)
    with transaction.atomic():
        placements.lock_sites([market.site.pk])
        jobs.preempt([market.job.pk], now=at(61), actor="test", reason="preempted")
    assert market.cycle(62) is None
    market.report("exited", 65, exit_code=143, reason="drained")
    assert (market.fresh().state, market.job.lost_ranks, market.job.repair_since) == ("requeued", [], None)
    other = Market()
    other.lose(1, 60)
    jobs.cancel(f.actor(other.contract.organization), other.job, now=at(61))
    assert other.cycle(62) is None
    other.report("exited", 65, exit_code=143, reason="drained")
    assert (other.fresh().state, Job.objects.get(pk=other.job.pk).repair_since) == ("cancelled", None)
