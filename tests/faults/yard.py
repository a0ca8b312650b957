"""A site with physics of its own (sandbox.site), its agent's half of the protocol, and our real control loop, in simulated time.

Everything that control knows comes through `agents.observe`, everything that it wants through `agents.desired`; whether a
cap was crossed says the physics. Nothing here waits: a minute is twelve turns.
"""

from datetime import UTC, datetime, timedelta

from django.db import transaction

from marketplace.models import BillingStanding, Host, Job, Miner, Placement, PowerNode, ShedClaim
from marketplace.services import agents, feeds, jobs
from sandbox.site.physics import Physics
from sandbox.site.spec import host, miner, node
from scheduler import cycle, site_loop
from tests import factories as f
from tests.factories import NOW

TURN_S = 5
PRICES = {
    "difficulty": 148 * 10**12,
    "btc_usd_cents": 9_000_000,
    "block_height": 930_000,
    "fees_sat_per_block": 2_000_000,
}


def spec(miners=7, metered=True):
    """Two PDUs, a host and some machines on each: hashing and parked they fill every cap to 96.5 %."""
    h100 = (60, 1100, 4600, 200, 700)
    hosts = [host(f"h{i}", f"pdu-{i}", "H100-SXM", 8, h100) for i in (1, 2)]
    rows = [miner(i, "S21", f"pdu-{1 + i % 2}", 4028, 10) for i in range(2 * miners)]
    pdu = round((miners * 3500 + 1100) / 0.965)
    site = round((500 + 2 * miners * 3500 * 1.05 + 2 * 1100 * 1.25) / 0.965)
    nodes = [node("site", None, "site", site, fixed_w=500, gpu=1250, miner=1050)]
    nodes += [{**node(f"pdu-{i}", "site", "pdu", pdu), "metered": metered} for i in (1, 2)]
    return {"name": "yard", "seed": 3, "nodes": nodes, "hosts": hosts, "miners": rows}


class Yard:
    def __init__(self, *, priced=True, **shape):
        self.spec = spec(**shape)
        self.physics = Physics(self.spec)
        self.fleet = self.physics.fleet
        self.site = f.site(power_w=self.spec["nodes"][0]["cap_w"], pdus=0)
        for kind in ("pdu", "transformer", "site"):
            PowerNode.objects.filter(site=self.site, kind=kind).delete()
        for row in self.spec["nodes"]:
            self._node(row)
        for row in self.spec["hosts"]:
            f.host(self.site, row["name"], power_node=row["power_node"], applied_generation=0)
        for row in self.spec["miners"]:
            f.miner(self.site, row["name"], power_node=row["power_node"], modes=row["modes"])
        self.agent, self.agent_key = f.agent(
            self.site, last_sync_at=NOW, lease_until=NOW + timedelta(minutes=15), runtime="bubblewrap"
        )
        customer = f.organization()
        BillingStanding.objects.update_or_create(organization=customer, defaults={"state": "good", "updated_at": NOW})
        listing = f.listing(self.site, hosts=list(Host.objects.filter(site=self.site)), runtime="bubblewrap")
        self.contract = f.contract(listing, customer, gpu_count=16)
        self.actor = f.actor(customer)
        self.now, self.sequence = NOW, 0
        self.link = self.control = True
        self.silent = set()  # miners and hosts that give no reading
        self.generation, self.wanted = {}, {}  # of each miner, as applied
        self.host_generation = {}
        self.work = {}  # placement pk -> (generation, state)
        self.saves = timedelta()  # what work takes to save its state, once it is asked to leave
        self.asked_at = {}  # placement pk -> when the site heard of it
        self.priced = priced
        self.parts = [
            "_command_miners",
            "_set_limits",
            "_run_work",
        ]  # of an answer, in the order in which they are obeyed
        self.counts = {}

    def _node(self, row):
        parent = row["parent"] and PowerNode.objects.get(site=self.site, name=row["parent"])
        columns = ("kind", "cap_w", "fixed_w", "overhead_gpu_permille", "overhead_miner_permille")
        metering = "meter" if row["metered"] else "firmware"
        f.node(self.site, row["name"], parent=parent or None, metering=metering, **{c: row[c] for c in columns})

    # --- time

    def turn(self, count=1):
        """Five seconds, a report, and a turn of the loop; no node is over its cap at any instant of it."""
        for _ in range(count):
            for _ in range(TURN_S):
                self.now += timedelta(seconds=1)
                self.physics.step(1.0, self.now.timestamp())
            assert not self.physics.over_instants, self.physics.over_instants[:1]
            if self.priced:
                for kind, value in PRICES.items():
                    feeds.store(kind, value, source="test", observed_at=self.now.replace(second=0), now=self.now)
            if self.link:
                self.report()
                self.obey()
            if self.control:
                waits = Job.objects.filter(state__in=("queued", "requeued"))
                if waits.exists() or Placement.objects.filter(state="intended").exists():
                    cycle.run(self.contract.cell_id, now=self.now)
                self.counts = site_loop.run(self.site.pk, now=self.now)
                books_balance(self.site)
            if self.link:
                self.obey()

    def until(self, done, *, seconds):
        for _ in range(seconds // TURN_S):
            if found := done():
                return found
            self.turn()
        raise AssertionError(f"not within {seconds} s")

    # --- the agent's half

    def step(self, what):
        """The agent is about to do one thing; who cuts it off does so here."""

    def dark(self, i):
        return not self.physics.energised()[self.physics.miner_node[i]] or self.fleet.boot_left[i] > 0

    def report(self):
        self.sequence += 1
        physics = self.physics
        miners = []
        for i, name in enumerate(self.fleet.names):
            if name in self.silent or self.dark(i):
                continue
            generation = self.generation.get(name, 0)
            for ago in (1, 0):  # the machines on their way are read each second
                watts, ghs = self.fleet.reading(i)
                at = self.now - timedelta(seconds=ago)
                row = [name, self.fleet.mode(i), generation, round(watts), round(ghs), at]
                miners.append((ago, row))
        hosts = [
            {
                "name": name, "beat_at": self.now, "power_state": physics.hosts.power_state(h),
                "generation": self.host_generation.get(name, 0),
                "measured_w": round(float(physics.hosts.watts()[h])), "limits_w": physics.hosts.limits(h), "gpu_errors": [],
            }
            for h, name in enumerate(physics.hosts.names)
            if name not in self.silent
        ]  # fmt: skip
        meters = [(name, w, datetime.fromtimestamp(at, UTC)) for name, w, at in physics.meters() if at]
        rows = {
            "boot": "one",
            "agent_time": self.now,
            "inventory": None,
            "events": [],
            "hosts": [],
            "meters": [],
            "placements": [],
        }
        self.step("report")
        agents.observe(
            self.agent, {**rows, "sequence": self.sequence, "miners": [r for ago, r in miners if ago]}, now=self.now
        )
        self.step("report, half told")
        self.sequence += 1
        placements = [{"pk": pk, "generation": g, "state": s} for pk, (g, s) in self.work.items()]
        full = {**rows, "hosts": hosts, "meters": meters, "placements": placements}
        agents.observe(
            self.agent, {**full, "sequence": self.sequence, "miners": [r for ago, r in miners if not ago]}, now=self.now
        )
        self.agent.refresh_from_db()

    def obey(self):
        told = agents.desired(self.agent, {"sequence": self.sequence, "known_safety": -1}, now=self.now)
        self.step("answer")
        self.safety = told["safety"]
        pks = {p.public_id: str(p.pk) for p in Placement.objects.filter(site=self.site, state__in=Placement.AT_SITE)}
        self.gives_way = {pks[row["id"]]: tuple(row["gives_way"]) for row in told["placements"]}
        for part in self.parts:
            getattr(self, part)(told)

    def _command_miners(self, told):
        for name, mode, generation in told["miners"]:
            i = self.fleet.index[name]
            if name in self.silent or self.dark(i) or generation <= self.generation.get(name, 0):
                continue
            self.step("machine")
            self.generation[name] = generation  # acknowledged
            self.wanted[name] = mode
            if self.fleet.fault[i] != "ack_ignore":
                modes = [m for m, _, _ in self.fleet.ladders[i]]
                self.fleet.asleep[i] = mode == modes[0]
                self.fleet.profile[i] = modes.index(mode) or self.fleet.profile[i]
                self.fleet._retarget(i)
        for i, name in enumerate(self.fleet.names):  # found hashing although it was sent to sleep: down again
            if self.dark(i):
                continue
            wanted = self.wanted.get(name)
            if (
                wanted == self.fleet.ladders[i][0][0]
                and not self.fleet.asleep[i]
                and self.fleet.fault[i] != "ack_ignore"
            ):
                self.fleet.asleep[i] = True
                self.fleet._retarget(i)

    def _set_limits(self, told):
        for row in told["hosts"]:
            self.step("limits")
            h = self.physics.hosts.index[row["name"]]
            self.physics.hosts.set_limits(h, row["limits_w"])
            self.host_generation[row["name"]] = row["generation"]

    def _run_work(self, told):
        wanted = {p.pk: p for p in Placement.objects.filter(site=self.site, state__in=Placement.AT_SITE)}
        for pk in [*self.work]:
            if pk not in wanted or wanted[pk].desired != "run":
                asked_at = self.asked_at.setdefault(pk, self.now)
                if pk in wanted and wanted[pk].desired == "drain" and self.now < asked_at + self.saves:
                    self.work[pk] = (self.work[pk][0], "draining")
                    continue
                self.step("end")
                self.physics.hosts.detach(str(pk))
                self.work[pk] = (self.work[pk][0], "exited") if pk in wanted else self.work.pop(pk)
        for pk, p in wanted.items():
            if p.desired == "run" and pk not in self.work and told["mode"] == "auto":
                h = self.physics.hosts.index[p.host.name]
                if self.physics.hosts.limits(h)[p.gpu_indices[0]] > p.host.gpu_min_w:
                    self.step("start")
                    self.physics.hosts.attach(str(pk), h, p.gpu_indices, 1.0)
                    self.work[pk] = (p.generation, "running")

    # --- its people

    def book(self, kind, **terms):
        return f.contract(
            self.contract.listing, self.contract.organization, kind=kind, gpu_count=16,
            **{"flexible_notice_s": 60, "flexible_hours_per_month": 1, **terms},
        )  # fmt: skip

    def submit(self, gpus=8, contract=None, **more):
        body = {"command": ["true"], "gpus": gpus, "vcpu_milli": 8000, "ram_mib": 1024, **more}
        return jobs.submit(self.actor, contract or self.contract, body, now=self.now)

    def end(self, job):
        with transaction.atomic():
            for p in Placement.objects.filter(job=job, state="running"):
                self.physics.hosts.detach(str(p.pk))
                self.work[p.pk] = (p.generation, "exited")
        jobs.cancel(self.actor, job, now=self.now)

    def state(self, job):
        job.refresh_from_db()
        return job.state

    # --- what is known of it

    def miner(self, name):
        return Miner.objects.get(site=self.site, name=name)

    def under(self, pdu):
        return [row["name"] for row in self.spec["miners"] if row["power_node"] == pdu]

    def claims(self, name):
        return list(ShedClaim.objects.filter(miner__name=name, site=self.site).order_by("id"))


def books_balance(site):
    """The nodes' sums are those of their devices."""
    nodes = {n.pk: n for n in PowerNode.objects.filter(site=site)}
    gpu, asic = dict.fromkeys(nodes, 0), dict.fromkeys(nodes, 0)
    for model, sums in ((Host, gpu), (Miner, asic)):
        for home, watts in model.objects.filter(site=site).values_list("power_node_id", "reserved_w"):
            node_id = home
            while node_id is not None:
                sums[node_id] += watts
                node_id = nodes[node_id].parent_id
    for pk, n in nodes.items():
        assert n.reserved_mw == gpu[pk] * n.overhead_gpu_permille + asic[pk] * n.overhead_miner_permille
