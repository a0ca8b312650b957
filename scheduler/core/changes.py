"""What would make a waiting job fit: every change named here has been tried with the real planner, and the job was placed.

Two steps. A screen asks the planner for the changed job alone on what is free; among values of one kind (fewer GPUs, less
memory, a later time) it bisects for the smallest change. Then the planner plans the whole queue with the changed job in the
old one's place, evicting nobody for it: only what is placed there is said. So no suggestion takes capacity that is held for
a job before it, passes a quota, or needs watts that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from scheduler.core.case import Case, Window
from scheduler.core.fit import deadlines
from scheduler.core.types import MAX_GPUS, WHOLE, Kind, Level, Request

ONE_SHAPE: Final = ((1000, 1024, 1, 1000, 0, 1),)
MAX_REPLICAS: Final = 4096
MORE_TRIES: Final = 3  # smaller values tried with the whole queue when the first of the screen is refused there
MAX_OTHERS: Final = 5  # other models, sites and listings named
MAX_LIMITS: Final = 16  # time limits tried
MAX_ENDS: Final = 12  # single jobs whose end is tried
KNOWN_TAINTS: Final = (
    1 << 62
) - 1  # all that can be tolerated; the bit above stands for those without a bit of their own
_ROUND: Final = {"cpu": 500, "ram": 1024, "nvme": 10, "vram": 1024, "gpu_milli": 10}  # what is said is a round number


class Change(NamedTuple):
    """`request`: the job as it would have to be. `start`: when it then starts, seconds; 0 = now. `hosts`: the rows where
    it goes, `gpus`: a bit mask of those that it gets on each. `jobs`: whose end it waits for, `rows`: reserved rows whose
    window must be over.

    Kinds: gpus, split (as many GPUs in smaller replicas), replicas, share, cpu, ram, nvme, vram (less of it); model, site,
    listing (elsewhere); topology, nvlink, spread, near, apart, affinity (looser; the last is both of those before it); taints
    (tolerated); duration (a time limit); price; quota; contract (on demand instead of spot); ends, window, job (later).
    """

    kind: str
    request: Request
    start: int = 0
    hosts: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()

    def at(self, found: dict[int, int]) -> Change:
        """It, with where it goes."""
        return self._replace(hosts=tuple(found), gpus=tuple(found.values()))


def changes(
    case: Case,
    job: int,
    *,
    pools: Sequence[int] = (),
    windows: Sequence[Window] = (),
    may_name: Callable[[int], bool] = lambda _: True,
) -> list[Change]:
    """The changes with which `job`, which waits in `case`, would be placed; the least of each kind. Of the kind `now`
    alone when it fits as it is.

    `pools`: other listings that its owner may book. `windows`: reservations that end. `may_name`: whether a running job
    of this organization may be named as the one whose end would help. KeyError for a job that is not in the queue.
    """
    request = next((r for r in case.requests if r.job == job), None)
    if request is None:
        raise KeyError(job)
    search = _Search(case, request)
    if not len(case.fleet):
        return []
    if found_at := search.in_queue(request):
        return [Change("now", request).at(found_at)]
    found = [search.later(windows), search.one_end(may_name)]
    if not request.members:  # the rest of the gang runs: what it lost can be neither smaller nor elsewhere
        found = [*search.smaller(), *search.elsewhere(pools), *search.looser(), *found]
    return [change for change in found if change is not None]


def reserved(case: Case, job: int, windows: Sequence[Window]) -> bool:
    """Whether `job` would fit now if these reservations were over: then they are what it waits for, whatever its hosts lack."""
    if not windows:
        return False
    search = _Search(case.without(lambda _: False, windows), next(r for r in case.requests if r.job == job))
    return search.alone(search.as_it_is)


class _Search:
    def __init__(self, case: Case, request: Request) -> None:
        self.case, self.as_it_is = case, request
        self.me = replace(request, promised_start=0, promised_hosts=())  # a promise was made to another shape
        self.quiet = replace(case.policy, explain=False)
        self.quick = replace(
            self.quiet, packer="best_fit", shapes=ONE_SHAPE
        )  # one job alone: the score decides nothing

    def among(self, case: Case) -> Request:
        """The job as another case has it: with what is free under its ceilings there."""
        return next(r for r in case.requests if r.job == self.as_it_is.job)

    # --- the two tests
    def alone(self, request: Request, case: Case | None = None) -> bool:
        """Whether the planner places it on what is free, with nobody else in the queue."""
        at = case or self.case
        made = replace(at, requests=[request], running=[], policy=self.quick).plan()
        return bool(made.placements)

    def in_queue(self, request: Request, case: Case | None = None, *, evict: bool = False) -> dict[int, int]:
        """The rows on which the planner places it among all who wait, with its GPUs there as a bit mask; {} when it does not."""
        at = case or self.case
        mine = replace(request, may_preempt=evict)
        queue = [mine if r.job == mine.job else r for r in at.requests]
        made = replace(at, requests=queue, policy=self.quiet).plan()
        found: dict[int, int] = {}
        for p in made.placements:
            if p.job == mine.job:
                found[p.host] = found.get(p.host, 0) | sum(1 << gpu for gpu in p.gpus)
        return found

    def least(self, kind: str, options: Sequence[Request]) -> Change | None:
        """The first of `options`, from the least change to the most, that is placed."""
        if not options or not self.alone(options[-1]):
            return None
        low, high = 0, len(options) - 1
        while low < high:
            middle = (low + high) // 2
            if self.alone(options[middle]):
                high = middle
            else:
                low = middle + 1
        for option in options[low : low + MORE_TRIES]:
            if hosts := self.in_queue(option):
                return Change(kind, option).at(hosts)
        return None

    def any_of(self, kind: str, options: Iterable[Request]) -> list[Change]:
        """All of `options` that are placed, the first few."""
        found: list[Change] = []
        for option in options:
            if self.alone(option) and (hosts := self.in_queue(option)):
                found.append(Change(kind, option).at(hosts))
                if len(found) == MAX_OTHERS:
                    break
        return found

    # --- less of it
    def smaller(self) -> Iterable[Change | None]:
        me = self.me
        if me.gpus > 1:
            yield self.least("gpus", [replace(me, gpus=g) for g in range(me.gpus - 1, 0, -1)])
            yield self.least("split", self._splits())
        if me.replicas > 1:
            yield self.least("replicas", [replace(me, replicas=n) for n in range(me.replicas - 1, 0, -1)])
        if me.gpus == 1:
            yield self.least("share", self._values("gpu_milli", self.case.fleet.gpu_free))
        for name, column in (("cpu", "cpu_free"), ("ram", "ram_free"), ("nvme", "nvme_free"), ("vram", "vram_free")):
            if getattr(me, name) > 0 and (name != "vram" or me.gpus):
                yield self.least(name, self._values(name, getattr(self.case.fleet, column)))

    def _splits(self) -> list[Request]:
        """As many GPUs in more and smaller replicas, the rest of the shape in proportion, rounded up."""
        me, total = self.me, self.me.replicas * self.me.gpus
        sizes = [g for g in range(min(me.gpus - 1, MAX_GPUS), 0, -1) if total % g == 0 and total // g <= MAX_REPLICAS]
        return [
            replace(
                me, gpus=g, replicas=total // g, cpu=-(-me.cpu * g // me.gpus), ram=-(-me.ram * g // me.gpus),
                nvme=-(-me.nvme * g // me.gpus),
            )
            for g in sizes
        ]  # fmt: skip

    def _values(self, name: str, free: np.ndarray) -> list[Request]:
        """Smaller amounts, largest first: what some host has free, rounded down to a number that one would write."""
        most, step = getattr(self.me, name), _ROUND[name]
        some = np.unique(free)
        some = some[(some > 0) & (some < most)]
        rounded = np.unique(np.where(some >= step, some // step * step, some))
        fields: list[dict[str, Any]] = [{name: int(value)} for value in rounded[::-1]]
        return [replace(self.me, **less) for less in fields]

    # --- elsewhere
    def elsewhere(self, pools: Sequence[int]) -> list[Change]:
        me, fleet = self.me, self.case.fleet
        found: list[Change] = []
        if me.models:
            models = [int(m) for m in np.unique(fleet.gpu_model[fleet.gpu_count > 0]) if m >= 0]
            others = [m for m in models if not me.models >> m & 1]
            found += self.any_of("model", (replace(me, models=1 << m) for m in others))
        if me.site >= 0:
            sites = [int(s) for s in np.unique(fleet.site) if s >= 0 and s != me.site]
            found += self.any_of("site", (replace(me, site=s) for s in sites))
        free: dict[str, Any] = {"models": 0, "site": -1, "quota_id": 0, "quota_milli": -1, "price_ok": True}
        others = [p for p in dict.fromkeys(pools) if p and p != me.pool]
        return found + self.any_of("listing", (replace(me, pool=p, **free) for p in others))

    # --- looser
    def looser(self) -> Iterable[Change | None]:
        me, t = self.me, self.me.topology
        if t.required and t.pack > Level.NONE:
            wider = [replace(t, pack=level) for level in Level if level > max(t.pack, Level.HOST)]
            options = [replace(me, topology=w) for w in (*wider, replace(t, required=False))]
            yield self.least("topology", options)
        if t.nvlink == 2 and me.gpus > 1:
            yield self.least("nvlink", [replace(me, topology=replace(t, nvlink=1))])
        if t.spread > Level.NONE and t.max_per_domain:
            bounds = range(t.max_per_domain + 1, me.replicas + 1)
            yield self.least("spread", [replace(me, topology=replace(t, max_per_domain=b)) for b in bounds])
        if not me.price_ok:
            yield self.least("price", [replace(me, price_ok=True)])
        if me.quota_id or me.quota_milli >= 0:
            yield self.least("quota", [replace(me, quota_id=0, quota_milli=-1)])
        if me.limit_milli >= 0:
            yield self.least("limit", [replace(me, limit_milli=-1)])
        if me.rate_left >= 0:
            yield self.least("rate", [replace(me, rate_left=-1)])
        if not me.budget_ok:
            yield self.least("budget", [replace(me, budget_ok=True)])
        if me.kind == Kind.SPOT:
            firm = replace(me, kind=Kind.ON_DEMAND)
            if hosts := self.in_queue(firm, evict=True):
                yield Change("contract", firm).at(hosts)
        yield from self._untied()
        if self.case.fleet.taints.any():
            yield self.least("taints", [replace(me, tolerates=KNOWN_TAINTS)])
        yield self._limited()

    def _untied(self) -> Iterable[Change | None]:
        """Without the rules of one side, or without all. Who keeps apart from it does so for its labels, so these go, too."""
        me = self.me
        near = self.least("near", [replace(me, near=())]) if me.near else None
        apart = self.least("apart", [replace(me, apart=(), joins=())]) if me.apart else None
        yield from (near, apart)
        if me.near and me.apart and near is None and apart is None:
            yield self.least("affinity", [replace(me, near=(), apart=(), joins=())])

    def _limited(self) -> Change | None:
        """With a time limit, so that it ends before a held host is needed or a host leaves: the longest that does."""
        case, me = self.case, self.me
        # It may begin, and end, so much later (`backfill.Horizon.until`).
        begins = case.now_s + case.policy.lag_s
        times = {r.promised_start for r in case.requests if r.job != me.job}
        times |= {hour for hours in deadlines(case.fleet) for hour in hours}
        for time in sorted((t for t in times if t > begins), reverse=True)[:MAX_LIMITS]:
            limited = case.lasting(me, time - begins)
            if (not me.duration_s or limited.duration_s < me.duration_s) and (hosts := self.in_queue(limited)):
                return Change("duration", limited).at(hosts)
        return None

    # --- later
    def later(self, windows: Sequence[Window]) -> Change | None:
        """The first known end, of running work or of a window, after which it is placed as it is."""
        case = self.case
        times = sorted({r.ends_at for r in case.running if r.ends_at > case.now_s} | {w.ends_at for w in windows})
        low, high = 0, len(times) - 1

        def then(time: int) -> tuple[Request, Case]:
            later = case.at(time, windows)
            return self.among(later), later

        if not times or not self.alone(*then(times[-1])):
            return None
        while low < high:
            middle = (low + high) // 2
            if self.alone(*then(times[middle])):
                high = middle
            else:
                low = middle + 1
        for time in dict.fromkeys((*times[low : low + MORE_TRIES], times[-1])):
            if hosts := self.in_queue(*then(time)):
                jobs = tuple(dict.fromkeys(r.job for r in case.running if r.ends_at == time))
                rows = tuple(w.row for w in windows if w.ends_at == time)
                kind = "window" if rows and not jobs else "ends"
                return Change(kind, self.as_it_is, time, jobs=jobs, rows=rows).at(hosts)
        return None

    def one_end(self, may_name: Callable[[int], bool]) -> Change | None:
        """The smallest running job without which it is placed."""
        me = self.as_it_is
        size: dict[int, int] = {}
        for r in self.case.running:
            if may_name(r.job):
                size[r.job] = size.get(r.job, 0) + max(1, len(r.gpus) * r.gpu_milli)
        need = me.replicas * me.gpus * min(me.gpu_milli, WHOLE)
        free = int(self.case.fleet.gpu_free.sum())
        able = sorted((s, job) for job, s in size.items() if s + free >= need)[:MAX_ENDS]
        for _, job in able:
            ended = self.case.without(_of(job))
            mine = self.among(ended)
            if self.alone(mine, ended) and (hosts := self.in_queue(mine, ended)):
                return Change("job", me, jobs=(job,)).at(hosts)
        return None


def _of(job: int) -> Callable[..., bool]:
    return lambda r: r.job == job
