"""The fault harness's auditor: reads rows by plain SQL, knows no rule of the code under test but those of design/power.md and
design/scheduler.md as written down here again, and names every row that breaks one.

Never oversold: milli-GPU and VRAM of each GPU, CPU, RAM, NVMe of each host, watts at each node. Gangs whole. A job stands
where its placements say, once per (job, attempt, rank). What must happen next is told: a waiting job to a cycle, a contract
that is over to whoever ends its jobs. A reservation's GPUs go to nobody else.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from django.db import connection

from benchmarks import audit_power as power
from benchmarks import audit_rules as rules

OVER = {"released", "failed", "lost"}  # placements
DONE = {"succeeded", "failed", "cancelled"}  # jobs
WAITS, STANDS = {"queued", "requeued"}, {"placed", "running", "preempting"}
THERE = {"granted", "starting", "running", "draining", "unreachable"}  # placements whose watts are granted
LEAVING = {"draining", "unreachable"}
OPEN_ENDED = timedelta(hours=24)  # so long a job without a limit is taken to stand on GPUs that are reserved later
LAG = timedelta(seconds=120)  # and so much later it may begin, and be gone
TOLERATED = ("MarketError", "FencedError", "OperationalError", "InterfaceError", "AdminShutdown")

Row = dict[str, Any]


def rows(sql: str) -> list[Row]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        names = [c.name for c in cursor.description]
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


class Auditor:
    """Remembers what it saw at the last audit: some rules are about what is new since."""

    def __init__(self) -> None:
        self.hosts_before: dict[int, str] = {}
        self.newest_placement = 0
        self.live_before: set[int] = set()
        self.stood: list[Row] = []
        self.tainted: dict[int, list[str]] = {}
        self.works: set[int] = set()  # blocks of announced maintenance
        self.booked_before: dict[int, int] = {}
        self.power = power.Nodes()

    def audit(self, now: datetime) -> list[str]:
        """Everything that is wrong now, in words."""
        hosts = {r["id"]: r for r in rows("SELECT * FROM marketplace_host")}
        placements = rows(
            "SELECT p.*, g.state AS watts, g.id AS watts_id, j.max_seconds + j.checkpoint_grace_s AS max_s, c.kind"
            " FROM marketplace_placement p"
            " JOIN marketplace_job j ON j.id = p.job_id JOIN marketplace_contract c ON c.id = p.contract_id"
            " LEFT JOIN marketplace_powergrant g ON g.placement_id = p.id ORDER BY p.id"
        )
        jobs = {r["id"]: r for r in rows("SELECT * FROM marketplace_job")}
        contracts = {r["id"]: r for r in rows("SELECT * FROM marketplace_contract")}
        live = [p for p in placements if p["state"] not in OVER]
        found = [
            *self._hosts(hosts, live),
            *self._raised(hosts, placements),
            *self.power.look(hosts, rows),
            *_jobs(jobs, placements),
            *_gangs(jobs, placements),
            *rules.losses(jobs, placements),
            *_ceilings(contracts, live),
            *rules.limits(live, rows("SELECT id, gpu_limit FROM marketplace_organization")),
            *self._rules(hosts, jobs, contracts, live),
            *_told(jobs, contracts, now),
            *_ends_told(jobs, contracts),
            *(
                f"placement {p['id']} is {p['state']}, its watts are {p['watts']}"
                for p in placements
                if p["state"] in OVER and p["watts"] not in {None, "released"}
            ),
            *_reservations(live, contracts, self, now),
        ]
        self.newest_placement = max((p["id"] for p in placements), default=0)
        self.hosts_before = {pk: h["state"] for pk, h in hosts.items()}
        self.live_before, self.stood = {p["id"] for p in live}, live
        self.tainted = {pk: h["taints"] for pk, h in hosts.items()}
        self.booked_before = {pk: h["reserved_w"] for pk, h in hosts.items()}
        return found

    def _rules(
        self, hosts: dict[int, Row], jobs: dict[int, Row], contracts: dict[int, Row], live: list[Row]
    ) -> list[str]:
        """What jobs ask for beyond their shape (benchmarks.audit_rules)."""
        fresh = [p for p in live if p["id"] > self.newest_placement]
        told = rows("SELECT job_id FROM marketplace_jobevent WHERE reason LIKE 'moved to make room%'")
        auctions = rules.auctions(rows) if fresh else rules.Auctions()
        return [
            *rules.topology(jobs, hosts, live),
            *rules.ties(jobs, hosts, live, self.stood, self.newest_placement),
            *rules.places(jobs, hosts, contracts, fresh, self.tainted, auctions),
            *rules.moved(jobs, contracts, told),
        ]

    # --- hosts
    def _hosts(self, hosts: dict[int, Row], live: list[Row]) -> list[str]:
        found = []
        on: dict[int, list[Row]] = defaultdict(list)
        for p in live:
            on[p["host_id"]].append(p)
            if p["watts"] != ("granted" if p["state"] in THERE else "shedding"):
                found.append(f"placement {p['id']} is {p['state']}, its watts are {p['watts']}")
            shut = {self.hosts_before.get(p["host_id"]), hosts[p["host_id"]]["state"]}
            leaves = hosts[p["host_id"]]["leaves_at"]  # until its hour it takes what is sure to end before
            if p["id"] > self.newest_placement and "active" not in shut and None not in shut and leaves is None:
                found.append(
                    f"placement {p['id']} is new on host {p['host_id']}, which is {hosts[p['host_id']]['state']}"
                )
        for pk, h in hosts.items():
            here = on[pk]
            for i in range(h["gpu_count"]):
                milli = sum(p["gpu_milli"] for p in here if i in p["gpu_indices"])
                vram = sum(p["vram_mib"] for p in here if i in p["gpu_indices"])
                if milli > 1000 or vram > h["vram_mib"]:
                    found.append(f"GPU {pk}/{i} is sold {milli} milli, {vram} MiB")
                if (h["gpu_free"][i], h["vram_free"][i]) != (1000 - milli, h["vram_mib"] - vram):
                    found.append(
                        f"GPU {pk}/{i} says {h['gpu_free'][i]} milli, {h['vram_free'][i]} MiB free; sold {milli}, {vram}"
                    )
            for total, free, used in (
                ("vcpu_milli", "vcpu_free", "vcpu_milli"), ("ram_mib", "ram_free", "ram_mib"), ("nvme_gib", "nvme_free", "nvme_gib"),
            ):  # fmt: skip
                sold = sum(p[used] for p in here)
                if sold > h[total] or h[free] != h[total] - sold:
                    found.append(f"host {pk} has {h[total]} {total}, {sold} sold, says {h[free]} free")
            if h["cpu_only_active"] != sum(not p["gpu_indices"] for p in here):
                found.append(f"host {pk} counts {h['cpu_only_active']} placements without a GPU")
            least = power.host_w(h, [p for p in here if p["state"] in THERE])
            if h["reserved_w"] < least:
                found.append(f"host {pk} has {h['reserved_w']} W booked, what is granted there may draw {least} W")
        return found

    def _raised(self, hosts: dict[int, Row], placements: list[Row]) -> list[str]:
        """No watt is granted twice: a host is raised to what all that has stood there since the last audit may draw, and no further."""
        here: dict[int, list[Row]] = defaultdict(list)
        for p in placements:
            if p["state"] not in OVER or p["id"] in self.live_before or p["id"] > self.newest_placement:
                here[p["host_id"]].append(p)
        found = []
        for pk, h in hosts.items():
            most = max(power.host_w(h, here[pk]), self.booked_before.get(pk, 1 << 40))  # of a new one nothing is known
            if h["reserved_w"] > most:
                found.append(f"host {pk} was raised to {h['reserved_w']} W, what stands there may draw {most} W")
        return found


def _reservations(live: list[Row], contracts: dict[int, Row], memory: Auditor, now: datetime) -> list[str]:
    """No GPU is promised twice for one moment, and nobody else comes onto one that is closed for its claim.

    A promise is what is still to come: where others stand in, a row says its present GPUs of its past, too.

    Who came first: a placement is made, and a reservation becomes firm, under the cell's lock, so the order of their
    transactions' numbers is that of the facts. Whoever is no spot and came when the claim had begun is wrong in either order:
    GPUs on which he stood already would not have been promised for then. Announced work on a host takes what stands there into
    account, and locks its own row first: there, who comes onto what was announced at the last audit is wrong.
    """
    blocks = rows(
        "SELECT b.id, b.host_id, b.gpu_indices, r.contract_id, r.claims_at, r.ends_at,"
        " r.maintenance_id IS NOT NULL AND r.contract_id IS NULL AS works,"
        " greatest(b.xmin::text::bigint, r.xmin::text::bigint) AS born FROM marketplace_reservationblock b"
        " JOIN marketplace_reservation r ON r.id = b.reservation_id WHERE r.state = 'firm' ORDER BY b.id"
    )
    born = {
        e["placement_id"]: e["born"]
        for e in rows("SELECT placement_id, min(xmin::text::bigint) AS born FROM marketplace_placementevent GROUP BY 1")
    }
    found = []
    own: dict[tuple[int, int, int], list[Row]] = defaultdict(list)  # of what is over, the record
    for b in rows(
        "SELECT r.contract_id, b.host_id, b.gpu_indices, r.claims_at, r.ends_at FROM marketplace_reservationblock b"
        " JOIN marketplace_reservation r ON r.id = b.reservation_id WHERE r.contract_id IS NOT NULL AND (r.state = 'firm'"
        f" OR (r.state = 'released' AND r.ends_at <= '{now.isoformat()}'))"
    ):
        for i in b["gpu_indices"]:
            own[b["contract_id"], b["host_id"], i].append(b)
    holders: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for b in blocks:
        for i in b["gpu_indices"]:
            found += [
                f"GPU {b['host_id']}/{i} is promised to contracts {o['contract_id']} and {b['contract_id']}"
                for o in holders[b["host_id"], i]
                if max(o["claims_at"], b["claims_at"], now) < min(o["ends_at"], b["ends_at"]) and not (o["works"] or b["works"])
            ]  # fmt: skip
            holders[b["host_id"], i].append(b)
    for p in live:
        windows = [b for i in p["gpu_indices"] for b in holders[p["host_id"], i]]
        mine = [b for i in p["gpu_indices"] for b in own[p["contract_id"], p["host_id"], i]]
        if any(b["claims_at"] <= p["created_at"] < b["ends_at"] for b in mine):
            continue  # on its own; who has the same GPUs after it comes after it
        for b in windows:
            gone = p["created_at"] + LAG + (timedelta(seconds=p["max_s"]) if p["max_s"] else OPEN_ENDED)
            lent = p["created_at"] < b["claims_at"] and (
                p["kind"] == "spot" or gone.replace(microsecond=0) <= b["claims_at"]
            )
            if (
                p["contract_id"] != b["contract_id"]
                and p["created_at"] < b["ends_at"]
                and not lent
                and (not b["works"] or (b["id"] in memory.works and p["id"] > memory.newest_placement))
                and (born[p["id"]] > b["born"] or (p["kind"] != "spot" and b["claims_at"] <= p["created_at"]))
            ):
                found.append(
                    f"placement {p['id']} of contract {p['contract_id']} came onto GPUs of contract {b['contract_id']}:"
                    f" made {p['created_at']:%F %T} for at most {p['max_s'] or 'any'} s, theirs from {b['claims_at']:%F %T} to"
                    f" {b['ends_at']:%F %T}, host {b['host_id']}"
                )
    memory.works = {b["id"] for b in blocks if b["works"]}
    over = [c["id"] for c in contracts.values() if c["state"] not in {"active", "pending_payment"}]
    return found + [f"contract {b['contract_id']} is over and holds GPUs" for b in blocks if b["contract_id"] in over]


def _jobs(jobs: dict[int, Row], placements: list[Row]) -> list[str]:
    """Each job's state is that of its events, and its live placements are what that state demands."""
    found = []
    events: dict[int, list[Row]] = defaultdict(list)
    for e in rows("SELECT job_id, from_state, to_state FROM marketplace_jobevent ORDER BY id"):
        events[e["job_id"]].append(e)
    live: dict[int, list[Row]] = defaultdict(list)
    attempts: dict[int, int] = defaultdict(int)
    for p in placements:
        attempts[p["job_id"]] = max(attempts[p["job_id"]], p["attempt"])
        if p["state"] not in OVER:
            live[p["job_id"]].append(p)
    for pk, job in jobs.items():
        mine, story = live[pk], events[pk]
        if bool(mine) != (job["state"] in STANDS):
            found.append(f"job {pk} is {job['state']} with {len(mine)} live placements")
        if {p["attempt"] for p in mine} - {job["attempt"]}:
            found.append(f"job {pk}, attempt {job['attempt']}, has live placements of other attempts")
        placed = sum(e["to_state"] == "placed" != e["from_state"] for e in story)  # a note changes no state
        if not placed == job["attempt"] == attempts[pk]:
            found.append(
                f"job {pk} was placed {placed} times, counts {job['attempt']} attempts, its placements {attempts[pk]}"
            )
        if not story or story[-1]["to_state"] != job["state"]:
            found.append(f"job {pk} is {job['state']}; its events do not say so")
        if any(a["to_state"] != b["from_state"] or a["to_state"] in DONE for a, b in pairwise(story)):
            found.append(f"job {pk} has a broken story: {[e['to_state'] for e in story]}")
    return found


def kept_for_nobody() -> list[str]:
    """When all is over and read back: hosts that still have watts booked as if somebody stood there."""
    found = rows(
        "SELECT h.* FROM marketplace_host h WHERE h.applied_generation >= h.desired_generation AND NOT EXISTS (SELECT 1 FROM"
        " marketplace_placement p WHERE p.host_id = h.id AND p.state NOT IN ('released', 'failed', 'lost')) ORDER BY h.id"
    )
    return [
        f"host {h['id']} keeps {h['reserved_w']} W, nobody stands there"
        for h in found
        if h["reserved_w"] != power.host_w(h, [])
    ]


def _gangs(jobs: dict[int, Row], placements: list[Row]) -> list[str]:
    found = []
    gangs: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for p in placements:
        gangs[p["job_id"], p["attempt"]].append(p)
    for (pk, attempt), gang in gangs.items():
        job = jobs[pk]
        if job["on_replica_loss"] != "restart_gang":  # replicas come and go: benchmarks.audit_rules.losses
            continue
        if sorted(p["rank"] for p in gang) != list(range(job["replicas"])):
            found.append(f"job {pk}, attempt {attempt}: ranks {sorted(p['rank'] for p in gang)} of {job['replicas']}")
        if len({p["site_id"] for p in gang}) > 1:
            found.append(f"job {pk}, attempt {attempt} stands at two sites")
        # Where one is gone without success, the others are on their way out.
        broken = any(p["state"] in OVER and not (p["state"] == "released" and p["exit_code"] == 0) for p in gang)
        if broken and any(p["state"] not in OVER | LEAVING for p in gang):
            found.append(f"job {pk}, attempt {attempt} goes on without a replica: {[p['state'] for p in gang]}")
    return found


def _ceilings(contracts: dict[int, Row], live: list[Row]) -> list[str]:
    used: dict[int, int] = defaultdict(int)
    for p in live:
        used[p["contract_id"]] += len(p["gpu_indices"]) * p["gpu_milli"]
    return [f"contract {pk} holds {milli} milli-GPU of {contracts[pk]['gpu_count']} GPUs"
            for pk, milli in used.items() if milli > 1000 * contracts[pk]["gpu_count"]]  # fmt: skip


def _told(jobs: dict[int, Row], contracts: dict[int, Row], now: datetime) -> list[str]:
    """Somebody will hear of each job that waits, and of each contract whose end its jobs have not seen."""
    messages = {(m["topic"], m["key"]) for m in rows("SELECT * FROM marketplace_outboxmessage WHERE parked_at IS NULL")}
    found = [
        f"message {m['topic']} {m['key']} failed: {m['last_error'][:300]}"
        for m in rows("SELECT topic, key, last_error FROM marketplace_outboxmessage WHERE last_error <> ''")
        if not m["last_error"].startswith(TOLERATED) or "deadlock" in m["last_error"]
    ]
    seen = {d["job_id"]: d["at"] for d in rows("SELECT job_id, at FROM scheduler_decision")}
    since = {
        e["job_id"]: e["at"] for e in rows("SELECT job_id, max(at) AS at FROM marketplace_jobevent GROUP BY job_id")
    }
    for pk, job in jobs.items():
        contract = contracts[job["contract_id"]]
        if contract["state"] == "active":
            told = ("scheduler.run_cycle", str(job["cell_id"])) in messages
            looked_at = pk in seen and seen[pk] >= since[pk]
            open_now = contract["starts_at"] <= since[pk] and (contract["ends_at"] is None or contract["ends_at"] > now)
            if job["state"] in WAITS and open_now and not told and not looked_at:
                found.append(f"job {pk} waits, and no cycle was told")
        elif job["state"] not in DONE and job["cancel_requested_at"] is None:
            told = ("marketplace.end_contract_jobs", str(contract["id"])) in messages
            if not told:
                found.append(
                    f"job {pk} is {job['state']}, its contract {contract['state']}, and nobody was told to end it"
                )
    return found


def _ends_told(jobs: dict[int, Row], contracts: dict[int, Row]) -> list[str]:
    """What ended since its cell's last cycle began is room that a job which waited then has not been tried on: a cycle is told."""
    told = {
        m["key"]
        for m in rows(
            "SELECT key FROM marketplace_outboxmessage WHERE topic = 'scheduler.run_cycle' AND parked_at IS NULL"
        )
    }
    looked = {
        c["cell_id"]: c["at"] for c in rows("SELECT cell_id, max(started_at) AS at FROM scheduler_cycle GROUP BY 1")
    }
    ends = rows(
        "SELECT p.cell_id, max(e.at) AS at FROM marketplace_placementevent e JOIN marketplace_placement p ON p.id = e.placement_id"
        " WHERE e.to_state IN ('released', 'failed', 'lost') GROUP BY 1"
    )
    since = {
        e["job_id"]: e["at"] for e in rows("SELECT job_id, max(at) AS at FROM marketplace_jobevent GROUP BY job_id")
    }
    found = []
    for end in ends:
        if str(end["cell_id"]) in told or looked.get(end["cell_id"], end["at"]) >= end["at"]:
            continue
        found += [
            f"job {pk} waits, something ended at {end['at']:%T}, and no cycle was told"
            for pk, job in jobs.items()
            if job["state"] in WAITS and job["cell_id"] == end["cell_id"] and since[pk] < end["at"]
            and contracts[job["contract_id"]]["state"] == "active"
        ]  # fmt: skip
    return found
