"""A market of one site for races: what may happen to it, and whether its books are sound."""

from dataclasses import replace
from datetime import timedelta

from django.db import connection, transaction

from marketplace.locks import Lock, _number
from marketplace.models import (
    Cell,
    Host,
    Job,
    Placement,
    PowerGrant,
    PowerNode,
)
from marketplace.services import contracts, jobs, placements, quotes, sites
from scheduler import cycle, site_loop, snapshot
from scheduler.core.plan import plan
from tests import factories as f
from tests.factories import NOW

ACTIVE = {"placed", "running", "preempting"}


class Market:
    def __init__(self, hosts=1, miners=0, power_w=1_000_000, gpu_count=64):
        self.site = f.site(power_w=power_w, pdus=1)
        self.hosts = [f.host(self.site, power_node="pdu-1") for _ in range(hosts)]
        self.miners = [f.miner(self.site, power_node="pdu-1") for _ in range(miners)]
        self.agent, _ = f.agent(self.site, last_sync_at=NOW, lease_until=NOW + timedelta(days=1))
        PowerNode.objects.update(measured_w=1000, measured_at=NOW)
        self.contract = f.contract(f.listing(self.site, hosts=self.hosts), f.organization(), gpu_count=gpu_count)
        self.cell = self.contract.cell
        self.actor = f.actor(self.contract.organization)

    def submit(self, gpus=8, **spec):
        spec = {"command": ["true"], "gpus": gpus, "vcpu_milli": 1000, "ram_mib": 1024, **spec}
        return jobs.submit(self.actor, self.contract, spec, now=NOW)

    def planned(self, *only):
        """(snapshot, plan) of the cell as it stands, for these jobs alone."""
        taken = snapshot.take(Cell.objects.get(pk=self.cell.pk), now=NOW)
        taken = replace(taken, requests=[r for r in taken.requests if not only or r.job in {j.pk for j in only}])
        made = plan(taken.fleet, taken.requests, taken.running, policy=taken.policy, seed=1, now_s=0)
        assert made.placements or made.preemptions
        return taken, made

    def cycle(self):
        return cycle.run(self.cell.pk, now=NOW)

    def report(self, job, state, **fields):
        """The agent's word on every live placement of the job."""
        live = Placement.objects.filter(job=job).exclude(state__in=Placement.FINAL)
        with transaction.atomic():
            placements.lock_sites([self.site.pk])
            rows = [{"pk": p.pk, "generation": p.generation, "state": state, **fields} for p in live]
            placements.observe(self.agent, rows, now=NOW + timedelta(seconds=30))

    def sound(self):
        """Host columns are totals less live placements; node sums are those of their devices and under their caps; each job
        stands where its placements say.
        """
        live = list(Placement.objects.exclude(state__in=Placement.FINAL))
        for host in Host.objects.all():
            here = [p for p in live if p.host_id == host.pk]
            for i in range(host.gpu_count):
                on_gpu = [p for p in here if i in p.gpu_indices]
                assert host.gpu_free[i] == 1000 - sum(p.gpu_milli for p in on_gpu) >= 0
                assert host.vram_free[i] == host.vram_mib - sum(p.vram_mib for p in on_gpu) >= 0
            assert host.vcpu_free == host.vcpu_milli - sum(p.vcpu_milli for p in here)
            assert host.ram_free == host.ram_mib - sum(p.ram_mib for p in here)
            assert host.nvme_free == host.nvme_gib - sum(p.nvme_gib for p in here)
            assert host.cpu_only_active == sum(not p.gpu_indices for p in here)
            granted = [p for p in here if p.state in Placement.AT_SITE]
            active = {i for p in granted for i in p.gpu_indices}
            assert host.reserved_w >= (host.base_w + len(active) * host.gpu_max_w if granted else 0)
        nodes = PowerNode.objects.filter(site=self.site)
        assert sites.recompute_reserved(self.site) == dict(nodes.values_list("id", "reserved_mw"))
        for node in PowerNode.objects.all():
            assert node.reserved_mw <= node.allowed_mw
        for job in Job.objects.all():
            mine = [p for p in live if p.job_id == job.pk]
            assert bool(mine) == (job.state in ACTIVE), (job.state, [p.state for p in mine])
            assert {p.attempt for p in mine} <= {job.attempt}
            assert sorted(p.rank for p in mine) == sorted({p.rank for p in mine})
            moves = [e.to_state for e in job.events.all()]
            assert moves[-1] == job.state
            assert moves.count("placed") == job.attempt
        wrong = PowerGrant.objects.filter(state="released").exclude(placement__state__in=Placement.FINAL)
        assert not wrong.exists()
        assert not PowerGrant.objects.filter(placement__state__in=Placement.FINAL).exclude(state="released").exists()

    def finish(self):
        """Run everything to its end; each job must come to one."""
        for _ in range(60):
            self.cycle()
            site_loop.run(self.site.pk, now=NOW)
            left = Job.objects.exclude(state__in=Job.FINAL)
            if not left:
                break
            for job in left:
                self.report(job, "running")
                self.report(job, "exited", exit_code=0)
        assert not Job.objects.exclude(state__in=Job.FINAL).exists()
        self.sound()
        for host in Host.objects.all():
            assert (host.gpu_free, host.vcpu_free) == ([1000] * 8, host.vcpu_milli)


def blocked() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0]


def holds_site(pk) -> bool:
    """Whether this connection holds the site's lock."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()"
            " AND classid::bigint << 32 | objid::bigint = %s",
            [_number(Lock.SITE, pk)],
        )
        return bool(cursor.fetchone()[0])


def sold(market, gpus, **window):
    """A reserved contract of the market's listing, bought by somebody else."""
    buyer = f.actor(f.organization())
    wanted = quotes.Request("reserved", gpus, **{"ends_at": NOW + timedelta(hours=2), **window})
    made = quotes.quote(buyer, market.contract.listing_id, wanted, now=NOW)
    return contracts.accept(buyer, made.pk, now=NOW)
