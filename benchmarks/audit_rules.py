"""What a job's own rules demand of where it stands, audited by plain SQL: a part of benchmarks.auditor, and as blind to the code.

Domains are named here by what the operator wrote on the host: a leaf is (site, leaf), a spine (site, spine). Rules that bind a
placement when it comes (taints, a near job, a price) are looked at when it is new; rules that bind for as long as it stands
(apart, inside one domain, at most so many of one) at every audit.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from marketplace import ids

Row = dict[str, Any]
OVER = {"released", "failed", "lost"}
WIDTH = {"site": 0, "spine": 1, "leaf": 2, "host": 3}


def domain(host: Row, level: str) -> tuple[Any, ...]:
    """Where a host is, as far as the level looks."""
    if level == "host":
        return (host["id"],)
    if level == "site" or not host[level]:  # a host without a name there is a domain of its own
        return (host["site_id"],) if level == "site" else (host["site_id"], "host", host["id"])
    return host["site_id"], host[level]


def affinity(job: Row) -> list[Row]:
    kept = job["affinity"]
    return json.loads(kept) if isinstance(kept, str) else kept


def topology(jobs: dict[int, Row], hosts: dict[int, Row], live: list[Row]) -> list[str]:
    """A gang that must stand inside one domain does; no domain has more of it than it allows; NVLink where it is required."""
    found = []
    gangs: dict[int, list[Row]] = defaultdict(list)
    for p in live:
        gangs[p["job_id"]].append(p)
        job, host = jobs[p["job_id"]], hosts[p["host_id"]]
        if job["nvlink"] == "required" and len(p["gpu_indices"]) > 1:
            linked = {host["nvlink_domains"][i] for i in p["gpu_indices"]}
            if len(linked) > 1 or -1 in linked:
                found.append(f"placement {p['id']} needs one NVLink domain and has {sorted(linked)}")
    for pk, gang in gangs.items():
        job = jobs[pk]
        if job["topology"] in WIDTH and job["topology_required"]:
            where = {domain(hosts[p["host_id"]], job["topology"]) for p in gang}
            if len(where) > 1:
                found.append(f"job {pk} must stand in one {job['topology']} and stands in {len(where)}")
        most, level = job["max_per_domain"], job["spread_level"] or ("host" if job["topology"] == "spread" else "")
        if level and most is None and job["topology_required"] and job["topology"] == "spread":
            most = 1
        if level and most is not None:
            many = max(Counter(domain(hosts[p["host_id"]], level) for p in gang).values())
            if many > most:
                found.append(f"job {pk} has {many} replicas in one {level}, {most} at most")
    return found


def ties(jobs: dict[int, Row], hosts: dict[int, Row], live: list[Row], before: list[Row], newest: int) -> list[str]:
    """Who must be apart is, for as long as both stand; who must be near came to where such a job stood."""
    ruled = [pk for pk in {p["job_id"] for p in live} if affinity(jobs[pk])]
    on: dict[int, list[Row]] = defaultdict(list)
    for p in live:
        on[p["job_id"]].append(p)
    there = {p["id"]: p for p in [*before, *live]}.values()
    found = []
    for pk in sorted(ruled):
        job = jobs[pk]
        for rule in affinity(job):
            others = [p for p in there if _meant(jobs[p["job_id"]], job, rule)]
            if rule["rule"] == "apart":
                theirs = {domain(hosts[p["host_id"]], rule["level"]) for p in others if p["state"] not in OVER}
                mine = {domain(hosts[p["host_id"]], rule["level"]) for p in on[pk]}
                if mine & theirs:
                    found.append(f"job {pk} stands in one {rule['level']} with what it must be apart from")
                continue
            if not others and set(job["labels"]) >= set(rule["labels"]):
                continue  # the first of those that stand together
            theirs = {domain(hosts[p["host_id"]], rule["level"]) for p in others}
            found += [
                f"placement {p['id']} came to no {rule['level']} of what job {pk} must be near"
                for p in on[pk]
                if p["id"] > newest and domain(hosts[p["host_id"]], rule["level"]) not in theirs
            ]
    return found


def _meant(other: Row, job: Row, rule: Row) -> bool:
    same = other["organization_id"] == job["organization_id"] and other["id"] != job["id"]
    return same and set(other["labels"]) >= set(rule["labels"])


class Auctions(NamedTuple):
    """Prices by listing and start; the limit of who stood there, by contract and start; and when limits were others, the oldest first."""

    prices: dict[tuple[int, datetime], int] = {}
    stood: dict[tuple[int, datetime], int] = {}
    was: dict[int, list[tuple[datetime, int]]] = {}

    def told(self, contract: Row, at: datetime) -> tuple[int, int] | None:
        """(price, limit that counts) for who begins then; None where nobody has auctioned: nobody pays more than his limit there."""
        start = at.replace(minute=at.minute // 5 * 5, second=0, microsecond=0)
        price = self.prices.get((contract["listing_id"], start))
        later = [limit for when, limit in self.was.get(contract["id"], ()) if when > at]
        limit = self.stood.get((contract["id"], start), [*later, contract["limit_price"]][0])
        return None if price is None else (price, limit)


def auctions(rows: Callable[[str], list[Row]]) -> Auctions:
    """As they stand."""
    was: dict[int, list[tuple[datetime, int]]] = defaultdict(list)
    for r in rows(
        "SELECT subject, at, (before->>'limit_price')::bigint AS was FROM marketplace_auditevent"
        " WHERE verb = 'contract.limit_changed' ORDER BY id"
    ):
        was[ids.decode("ctr", r["subject"]) or 0].append((r["at"], r["was"]))
    return Auctions(
        {
            (r["listing_id"], r["start"]): r["price"]
            for r in rows("SELECT listing_id, start, price FROM marketplace_spotinterval WHERE NOT carried")
        },
        {
            (r["contract_id"], r["start"]): r["limit_price"]
            for r in rows("SELECT contract_id, start, limit_price FROM marketplace_spotresult")
        },
        was,
    )


def places(
    jobs: dict[int, Row],
    hosts: dict[int, Row],
    contracts: dict[int, Row],
    fresh: list[Row],
    tainted: dict[int, Any],
    auctioned: Auctions,
) -> list[str]:
    """New placements: on hosts whose taints the job bears, at the site asked for, for no more than the job or its bid would pay."""
    found = []
    for p in fresh:
        job, host, contract = jobs[p["job_id"]], hosts[p["host_id"]], contracts[p["contract_id"]]
        borne, then = set(job["tolerations"]), tainted[host["id"]] if host["id"] in tainted else host["taints"]
        if not any(borne >= set(taints) for taints in (host["taints"], then)):
            found.append(
                f"placement {p['id']} came to host {host['id']} with taints {host['taints']} that it does not bear"
            )
        if job["site_id"] not in {None, p["site_id"]}:
            found.append(f"placement {p['id']} is at site {p['site_id']}, its job asked for {job['site_id']}")
        limits = [limit for limit in (job["price_limit"],) if limit is not None]
        price = contract["price"]
        if contract["kind"] == "spot":
            told = auctioned.told(contract, p["created_at"])
            if told is None:
                continue
            price = told[0]
            limits.append(told[1])
        if limits and price > min(limits):
            found.append(f"placement {p['id']} costs {price} and would pay {min(limits)}")
    return found


def limits(live: list[Row], organizations: list[Row]) -> list[str]:
    """No organization holds more than it may."""
    held: Counter[int] = Counter()
    for p in live:
        held[p["organization_id"]] += len(p["gpu_indices"]) * p["gpu_milli"]
    return [f"organization {o['id']} holds {held[o['id']]} milli-GPU, {o['gpu_limit']} GPUs at most"
            for o in organizations if held[o["id"]] > 1000 * o["gpu_limit"]]  # fmt: skip


def losses(jobs: dict[int, Row], placements: list[Row]) -> list[str]:
    """Gangs whose replicas come and go: each rank stands once, who is gone is known to be, and enough are left."""
    found = []
    gangs: dict[int, list[Row]] = defaultdict(list)
    for p in placements:
        if p["attempt"] == jobs[p["job_id"]]["attempt"] and jobs[p["job_id"]]["on_replica_loss"] != "restart_gang":
            gangs[p["job_id"]].append(p)
    for pk, gang in gangs.items():
        job, lost = jobs[pk], set(jobs[pk]["lost_ranks"])
        live = [p for p in gang if p["state"] not in OVER]
        newest = {p["rank"]: p for p in sorted(gang, key=lambda p: (p["rank"], p["epoch"], p["id"]))}
        twice = [rank for rank, many in Counter(p["rank"] for p in live).items() if many > 1]
        if twice or set(newest) != set(range(job["replicas"])):
            found.append(f"job {pk}: ranks {sorted(newest)} of {job['replicas']}, standing twice {twice}")
        if lost & {p["rank"] for p in live}:
            found.append(f"job {pk} does without ranks {sorted(lost)}, and one of them stands")
        if max((p["epoch"] for p in gang), default=0) > job["epoch"]:
            found.append(f"job {pk} is in epoch {job['epoch']}, its placements are ahead of it")
        if job["state"] != "running":
            continue
        gone = {r for r, p in newest.items() if p["state"] in OVER and p["exit_code"] != 0}
        if gone - lost and any(p["release_requested_at"] is None for p in live):
            found.append(f"job {pk} goes on and does not know that ranks {sorted(gone - lost)} are gone")
        if job["on_replica_loss"] == "shrink" and job["replicas"] - len(lost) < (
            job["min_replicas"] or job["replicas"]
        ):
            found.append(f"job {pk} goes on without ranks {sorted(lost)}, {job['min_replicas']} must be left")
    return found


def moved(jobs: dict[int, Row], contracts: dict[int, Row], events: list[Row]) -> list[str]:
    """Nobody is moved to make room who did not agree to it, or who could not save his work."""
    found = []
    for e in events:
        job = jobs[e["job_id"]]
        agreed = job["movable"] or contracts[job["contract_id"]]["kind"] == "spot"
        if not agreed or not job["checkpoint_grace_s"] or job["replicas"] > 1:
            found.append(f"job {job['id']} was moved and had not agreed to it")
    return found
