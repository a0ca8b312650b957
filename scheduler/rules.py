"""What binds a request beyond its shape: rules of the job, where its kin stand, lost ranks of gangs that run.

    topology_of("spread", True)            -> core Topology of a job without further rules
    bind(requests, rows, taints, ...)      fills in the requests of jobs that have rules (`Job.ruled`), in place
    repairs(cell_id)                       -> {job id: Repair}: running jobs whose lost ranks wait

Only jobs that have rules are read here, in two statements whatever their number; a cell without any costs one look.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from django.db import connection

from billing.models import PriceVersion
from marketplace.models import Contract, Job, Placement
from marketplace.services import replicas, spot_prices
from scheduler.core.fit import bounds, deadlines
from scheduler.core.types import Fleet, Level, Policy, Request, Tie, Topology

_LEVEL: Final = {"host": Level.HOST, "leaf": Level.LEAF, "spine": Level.SPINE, "site": Level.SITE}
_NVLINK: Final = {"any": 0, "preferred": 1, "required": 2}


def topology_of(
    topology: str, required: bool, *, nvlink: str = "any", spread: str = "", most: int | None = None
) -> Topology:
    """The core's form. A required spread without a bound has one replica in each failure domain."""
    over = _LEVEL[spread] if spread else Level.HOST if topology == "spread" else Level.NONE
    bound = most or (1 if required and topology == "spread" else 0)
    return Topology(_LEVEL.get(topology, Level.NONE), required, _NVLINK[nvlink], over, bound if over else 0)


@dataclass(frozen=True)
class Repair:
    """A running gang with ranks to be placed again: committed only if its `epoch` is still this one."""

    attempt: int
    epoch: int
    ranks: tuple[int, ...]
    hosts: tuple[int, ...]  # host ids of those that stand


def repairs(cell_id: int) -> dict[int, Repair]:
    """Running jobs of the cell whose lost ranks wait to be placed again."""
    jobs = {pk: (attempt, epoch, tuple(ranks)) for pk, attempt, epoch, ranks in replicas.mending(cell_id)}
    if not jobs:
        return {}
    hosts: dict[int, list[int]] = defaultdict(list)
    standing = Placement.objects.filter(job_id__in=jobs, release_requested_at=None).exclude(state__in=Placement.FINAL)
    for job_id, host_id in standing.order_by("id").values_list("job_id", "host_id"):
        hosts[job_id].append(host_id)
    return {pk: Repair(*jobs[pk], tuple(hosts[pk])) for pk in jobs if hosts[pk]}


class Rows:
    """Rows of the fleet by host id: a machine has one row, and one more for each reservation on it."""

    def __init__(self, host_of: Sequence[int], pool: Any) -> None:
        self.hosts = np.asarray(host_of, np.int64)
        self.pool = pool

    def of(self, host_ids: Collection[int]) -> tuple[int, ...]:
        """All rows of these machines."""
        return tuple(np.flatnonzero(np.isin(self.hosts, np.fromiter(host_ids, np.int64, len(host_ids)))).tolist())

    def members(self, host_ids: Iterable[int], pool: int) -> tuple[int, ...]:
        """One row for each host id, in the pool where there is one; hosts that left the cell are left out."""
        found = []
        for pk in host_ids:
            rows = np.flatnonzero(self.hosts == pk)
            if len(rows):
                own = rows[self.pool[rows] == pool]
                found.append(int(own[0] if len(own) else rows[0]))
        return tuple(found)


def bind(
    requests: Sequence[Request],
    fleet: Fleet,
    host_of: Sequence[int],
    *,
    ruled: Sequence[int],
    taints: Mapping[str, int],
    mended: Mapping[int, Repair],
    now: datetime,
    policy: Policy,
) -> None:
    """Fill in what the requests' jobs ask for beyond their shape; the requests are changed in place.

    `ruled`: ids of the jobs that have rules. `taints`: taint -> its bit in `fleet.taints`; the highest bit stands for taints
    without one, which nobody tolerates.
    """
    rows = Rows(host_of, fleet.pool)
    leaves, claims = deadlines(fleet)
    now_s = int(now.timestamp())
    if leaves or claims:
        for r in requests:
            r.until, r.stays = bounds(r, now_s, leaves, claims, policy)
    by_job = {r.job: r for r in requests} if mended or ruled else {}
    for pk, repair in mended.items():
        if r := by_job.get(pk):  # type: ignore[assignment]
            r.replicas, r.members = len(repair.ranks), rows.members(repair.hosts, r.pool)
    if ruled:
        _rule(_read(ruled), by_job, rows, taints, now_s)


def _read(ruled: Sequence[int]) -> list["_Ruled"]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, organization_id, contract_id, topology, topology_required, nvlink, spread_level, max_per_domain, site_id,"
            " price_limit, labels, affinity, tolerations FROM marketplace_job WHERE id = ANY(%s) ORDER BY id",
            [list(ruled)],
        )
        return [_Ruled(*row) for row in cursor.fetchall()]


def _rule(
    ruled: Sequence["_Ruled"], by_job: Mapping[int, Request], rows: Rows, taints: Mapping[str, int], now_s: int
) -> None:
    found = prices([rule.contract for rule in ruled if rule.price_limit is not None], now_s)
    for rule in ruled:
        r = by_job[rule.job]
        r.topology = topology_of(
            rule.topology, rule.required, nvlink=rule.nvlink, spread=rule.spread, most=rule.most_per_domain
        )
        r.site = -1 if rule.site is None else rule.site
        r.tolerates = sum({1 << taints[name] for name in rule.tolerations if taints.get(name, 62) < 62})
        if rule.price_limit is not None:
            r.price_ok = found.get(rule.contract, 0) <= rule.price_limit
    _tie([rule for rule in ruled if rule.labels or rule.affinity], by_job, rows)


@dataclass
class _Ruled:
    job: int
    org: int
    contract: int
    topology: str
    required: bool
    nvlink: str
    spread: str
    most_per_domain: int | None
    site: int | None
    price_limit: int | None
    labels: list[str]
    affinity: list[dict[str, Any]]
    tolerations: list[str]

    def __post_init__(self) -> None:
        if isinstance(self.affinity, str):  # a raw cursor hands jsonb over as text
            self.affinity = json.loads(self.affinity)


def prices(contracts: Collection[int], now_s: int) -> dict[int, int]:
    """What a GPU-hour of each contract costs now, millionths: its newest price version in force, else the contract's own; under
    spot, its listing's price.
    """
    if not contracts:
        return {}
    found = dict(Contract.objects.filter(pk__in=contracts).values_list("id", "price"))
    versions = PriceVersion.objects.filter(
        contract_id__in=contracts, kind=PriceVersion.Kind.RATE, valid_from_s__lte=now_s
    )
    found.update(versions.order_by("valid_from_s").values_list("contract_id", "millionths"))
    found.update(spot_prices.of_contracts(contracts, datetime.fromtimestamp(now_s, UTC)))
    return found


def _tie(ruled: Sequence[_Ruled], by_job: Mapping[int, Request], rows: Rows) -> None:
    """Affinity among jobs of one organization, both ways: what must be apart from a job is avoided by that job, too.

    Groups: all jobs that carry a rule's labels; and, for each rule of apartness, all jobs that have that rule.
    """
    standing = _standing({rule.org for rule in ruled}) if ruled else []
    here = [(s.org, s.labels, s.affinity) for s in standing] + [(r.org, r.labels, r.affinity) for r in ruled]
    selectors = {(org, tuple(a["labels"])) for org, _, affinity in here for a in affinity}
    repelling = {
        (org, tuple(a["labels"]), a["level"]) for org, _, affinity in here for a in affinity if a["rule"] == "apart"
    }
    groups: dict[Any, int] = {key: n for n, key in enumerate([*sorted(selectors), *sorted(repelling)])}
    hosts: dict[int, set[int]] = defaultdict(set)
    for s in standing:
        for group in _groups_of(s.org, s.labels, s.affinity, groups):
            hosts[group] |= s.hosts
    stands = {group: rows.of(ids) for group, ids in hosts.items()}
    for rule in ruled:
        r = by_job[rule.job]
        near: list[Tie] = []
        apart: list[Tie] = []
        for a in rule.affinity:
            group = groups[rule.org, tuple(a["labels"])]
            (near if a["rule"] == "near" else apart).append(Tie(_LEVEL[a["level"]], group, stands.get(group, ())))
        mine = set(rule.labels)
        for org, wanted, level in repelling:
            if org == rule.org and mine.issuperset(wanted):
                group = groups[org, wanted, level]
                apart.append(Tie(_LEVEL[level], group, stands.get(group, ())))
        r.near, r.apart = tuple(near), tuple(sorted(set(apart)))
        r.joins = tuple(sorted(_groups_of(rule.org, rule.labels, rule.affinity, groups)))


def _groups_of(
    org: int, labels: Iterable[str], affinity: Iterable[dict[str, Any]], groups: Mapping[Any, int]
) -> set[int]:
    mine = set(labels)
    found = {n for key, n in groups.items() if len(key) == 2 and key[0] == org and mine.issuperset(key[1])}
    return found | {groups[org, tuple(a["labels"]), a["level"]] for a in affinity if a["rule"] == "apart"}


@dataclass
class _Standing:
    org: int
    labels: list[str]
    affinity: list[dict[str, Any]]
    hosts: set[int]


def _standing(organizations: Collection[int]) -> list[_Standing]:
    """Jobs of these organizations that stand somewhere and have labels or affinity."""
    live = (
        Placement.objects.filter(organization_id__in=organizations, job__ruled=True)
        .exclude(state__in=Placement.FINAL)
        .order_by("id")
    )
    hosts: dict[int, set[int]] = defaultdict(set)
    for job_id, host_id in live.values_list("job_id", "host_id"):
        hosts[job_id].add(host_id)
    jobs = Job.objects.filter(pk__in=hosts).order_by("id").values_list("id", "organization_id", "labels", "affinity")
    return [_Standing(org, labels, affinity, hosts[pk]) for pk, org, labels, affinity in jobs if labels or affinity]
