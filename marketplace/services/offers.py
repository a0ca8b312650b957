"""The market in columns: published listings, their hosts, and what claims these, as one reading saw them (services.catalogue reads).

Never written in place: a changed reading is another `Offers`, which shares every column that stayed the same and what was worked out
from it. None as a number is -1, as a name `NONE`.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from marketplace.models import Kind
from marketplace.models.listings import PRICE_COLUMNS
from marketplace.services.availability import CHECKPOINT_GRACE_S, HOLDING, SHED_LEAD_S, seconds
from marketplace.services.price_tiers import Asked
from marketplace.tenancy import Actor
from scheduler.core import stock
from scheduler.core.capacity import FOREVER
from scheduler.core.claims import Ints
from scheduler.core.stock import Shelf, Timeline

Mask = npt.NDArray[np.bool_]
NONE: Final = -1
# What is asked of each host of a listing, and holds where its poorest host has it.
OF_HOSTS: Final = (
    "gpu_count",
    "nvlink_gpus",
    "vcpu_milli",
    "ram_mib",
    "nvme_gib",
    "cap_control",
    "verified",
    "benchmark_score",
)
_STATEFUL: Final = ("id", "listing_id", "spine", "leaf", "part")  # columns of hosts that decide the shelf


class Names:
    """Numbers for texts, from 1; the same for a text as long as the process lives. The empty text is 0, None is NONE."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {"": 0}
        self._texts: list[str] = [""]
        self._lock = threading.Lock()

    def codes(self, texts: Iterable[str | None]) -> Ints:
        """int64[texts]."""
        with self._lock:
            found = [NONE if text is None else self._code(text) for text in texts]
        return np.array(found, np.int64)

    def _code(self, text: str) -> int:
        number = self._known.get(text)
        if number is None:
            number = self._known[text] = len(self._texts)
            self._texts.append(text)
        return number

    def known(self, texts: Iterable[str]) -> list[int]:
        """Numbers of those that stand in a row somewhere."""
        return [self._known[text] for text in texts if text in self._known]

    def text(self, code: int) -> str:
        return self._texts[code]


@dataclass(frozen=True)
class Rows:
    """Columns int64[N], in the order of the first; several rows may have one key."""

    columns: dict[str, Ints]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> Ints:
        return self.columns[name]

    @property
    def keys(self) -> Ints:
        return next(iter(self.columns.values()))

    def replaced(self, keys: Ints, rows: "Rows") -> "Rows":
        """Without all that stood under `keys`, with `rows` (of some of these keys) instead."""
        if not len(keys):
            return self
        keep = ~np.isin(self.keys, keys)
        if keep.all() and not len(rows):
            return self
        order = np.argsort(np.concatenate([self.keys[keep], rows.keys]), kind="stable")
        return Rows({name: np.concatenate([c[keep], rows[name]])[order] for name, c in self.columns.items()})

    def position(self, keys: Ints) -> Ints:
        """Where each key stands first, -1 where it does not."""
        at = np.searchsorted(self.keys, keys)
        at[at == len(self)] = 0
        return np.where(self.keys[at] == keys, at, -1) if len(self) else np.full(len(keys), -1)


@dataclass(frozen=True)
class Offers:
    """listings: by id, published ones. partners: (listing_id, organization_id) of those that are for named partners alone.
    hosts: by id, all that are listed and not retired, whatever their listing's state; behind a host the parts of it that resales have
    set aside (`part`, else 0), as hosts of their listings. holds: by host_id (and part), GPUs of live reservations.
    tasks: by host_id, GPU indices that work other than spot occupies. tiers: by listing_id, its price tiers.
    """

    listings: Rows
    partners: Rows
    hosts: Rows
    holds: Rows
    tasks: Rows
    tiers: Rows
    names: Names

    def __len__(self) -> int:
        return len(self.listings)

    def updated(self, **rows: Rows) -> "Offers":
        """With these tables in place of the older; what does not depend on them is handed on."""
        later = Offers(**{**{name: getattr(self, name) for name in _TABLES}, **rows}, names=self.names)
        if "shelf" in self.__dict__ and all(np.array_equal(self.hosts[n], later.hosts[n]) for n in _STATEFUL):
            later.__dict__["shelf"] = self.shelf
        if "_lines" in self.__dict__ and not {"hosts", "holds", "tasks"} & rows.keys():  # see _timeline
            later.__dict__["_lines"] = self.__dict__["_lines"]
        return later

    def only(self, listing_ids: Ints) -> "Offers":
        """The same reading of these listings alone."""
        hosts = _among(self.hosts, "listing_id", listing_ids)
        return Offers(
            listings=_among(self.listings, "id", listing_ids),
            partners=_among(self.partners, "listing_id", listing_ids),
            hosts=hosts,
            holds=_among(self.holds, "host_id", hosts["id"]),
            tasks=_among(self.tasks, "host_id", hosts["id"]),
            tiers=_among(self.tiers, "listing_id", listing_ids),
            names=self.names,
        )

    # --- who may see what
    def visible(self, actor: Actor) -> Mask:
        """bool[N]: what `search.on_offer` would show: of the actor's own mode, public, for its organization, or its own."""
        if actor.is_staff:
            return np.ones(len(self), bool)
        rows = self.listings
        shown: Mask = rows["partners_only"] == 0
        if actor.organization_id is not None:
            shown |= rows["organization_id"] == actor.organization_id
            named = self.partners["listing_id"][self.partners["organization_id"] == actor.organization_id]
            at = rows.position(named)
            shown[at[at >= 0]] = True
        shown &= rows["livemode"] == int(actor.livemode)
        return shown

    # --- what they have
    @cached_property
    def shelf(self) -> Shelf:
        return Shelf.of(self.hosts["listing_id"], self.hosts["spine"], self.hosts["leaf"])

    @cached_property
    def _group(self) -> Ints:
        """Each listing's place on the shelf, -1 without hosts."""
        at = np.searchsorted(self.shelf.listings, self.listings["id"])
        found = np.full(len(self), -1)
        inside = at < len(self.shelf.listings)
        found[inside] = np.where(self.shelf.listings[at[inside]] == self.listings["id"][inside], at[inside], -1)
        return found

    def _spread(self, of_groups: Ints, missing: int = 0) -> Ints:
        """From one for each group to one for each listing."""
        out = np.full(len(self), missing, np.int64)
        has = self._group >= 0
        out[has] = of_groups[self._group[has]]
        return out

    def _gathered(self, of_listings: Ints, missing: int) -> Ints:
        """From one for each listing to one for each group."""
        out = np.full(len(self.shelf.listings), missing, np.int64)
        has = self._group >= 0
        out[self._group[has]] = of_listings[has]
        return out

    @cached_property
    def totals(self) -> Ints:
        """int64[N]: GPUs listed, working or not."""
        return self._spread(self.shelf.total(self.hosts["gpu_count"][self.shelf.order]))

    @cached_property
    def host_count(self) -> Ints:
        """int64[N]: hosts listed, working or not."""
        return self._spread(self.shelf.total(np.ones(len(self.hosts), np.int64)))

    @cached_property
    def verified(self) -> Ints:
        """int64[N]: of these, verified by benchmark."""
        return self._spread(self.shelf.total(self.hosts["verified"][self.shelf.order]))

    @cached_property
    def of_hosts(self) -> dict[str, Ints]:
        """OF_HOSTS -> int64[N]: what the poorest host of each listing has."""
        return {name: self._spread(self.shelf.least(self.hosts[name][self.shelf.order]), NONE) for name in OF_HOSTS}

    def number(self, name: str) -> Ints:
        """int64[N]: a column of the listing or of its hosts; NONE where there is nothing to compare."""
        return self.of_hosts[name] if name in OF_HOSTS else self.listings[name]

    def price(self, kind: str, asked: Asked) -> Ints:
        """int64[N]: as `price_tiers.chosen` of each listing; NONE where nothing meets what is asked."""
        rows, plain = self.listings, self.listings[PRICE_COLUMNS[kind]]
        if kind not in HOLDING or not (asked.limited or len(self.tiers)):
            return plain
        upfront = _limit(asked.upfront_max_permille, rows["upfront_permille"])
        hours = _limit(asked.flexible_hours_max, rows["flexible_hours_per_month"])
        meets = (plain != NONE) & (rows["upfront_permille"] <= upfront)
        if kind == Kind.FLEXIBLE:
            meets &= rows["flexible_hours_per_month"] <= hours
        best = np.where(meets, plain, FOREVER)
        tiers = self.tiers
        place = rows.position(tiers["listing_id"])
        long = tiers["min_term_hours"] <= asked.term_hours
        near = np.flatnonzero((place >= 0) & long & (tiers["flexible"] == int(kind == Kind.FLEXIBLE)))
        at = place[near]
        suits = (tiers["upfront_permille"][near] <= upfront[at]) & (plain[at] != NONE)
        suits &= tiers["flexible_hours_per_month"][near] <= hours[at]
        np.minimum.at(best, at[suits], tiers["price"][near[suits]])
        return np.where(best == FOREVER, NONE, best)

    # --- how much of it is free
    def stock(self, *, now: datetime, level: str, kind: str, starts_at: datetime, ends_at: datetime) -> Ints:
        """int64[N]: the most GPUs that one block inside one cell of `level` can have in the window; as `availability.stock`."""
        shelf = self.shelf
        at, start, end = seconds(now), seconds(starts_at), seconds(ends_at)
        t1 = np.full(len(self), start, np.int64)
        if kind in HOLDING:  # the claim begins early, by the lead
            t1 = np.minimum(start, np.maximum(at, start - self.lead_s))
        most = stock.largest(
            shelf, self._timeline(at), self._working, self._chunk, level, self._gathered(t1, start), end,
            self._gathered(self._closed(t1, end).astype(np.int64), 0),
        )  # fmt: skip
        return self._spread(most)

    def resold(self, *, now: datetime, level: str) -> Ints:
        """int64[N]: what is left of each resale in its own window, the only one in which it can be had; 0 for other offers."""
        mine = self.listings["is_resale"]
        if not mine.any():
            return np.zeros(len(self), np.int64)
        always = np.zeros(len(self.shelf.listings), np.int64)
        timeline = self._timeline(seconds(now))
        most = stock.largest(self.shelf, timeline, self._working, self._chunk, level, always, FOREVER)
        return self._spread(most) * mine

    def stock_over(self, *, now: datetime, level: str, kind: str, windows: Ints) -> Ints:
        """int64[windows, N]: `stock` in each of `windows` (int64[windows, 2], s), by one sweep for each lead that is kept."""
        if kind in HOLDING and len(leads := np.unique(self.lead_s)) > 1:
            found = np.zeros((len(windows), len(self)), np.int64)
            for lead in leads:
                those = np.flatnonzero(self.lead_s == lead)
                part = self.only(self.listings["id"][those])
                found[:, those] = part.stock_over(now=now, level=level, kind=kind, windows=windows)
            return found
        shelf, at = self.shelf, seconds(now)
        claimed = windows.copy()
        if kind in HOLDING and len(self):
            claimed[:, 0] = np.minimum(windows[:, 0], np.maximum(at, windows[:, 0] - self.lead_s[0]))
        free = np.maximum(self._working - self._timeline(at).peaks(len(self._working), claimed), 0)
        most = shelf.most(free // self._chunk[shelf.group], level) * self._chunk
        has = self._group >= 0
        found = np.zeros((len(windows), len(self)), np.int64)
        found[:, has] = most[:, self._group[has]]
        found[self._closed(claimed[:, :1], claimed[:, 1:])] = 0
        return found

    @property
    def lead_s(self) -> Ints:
        """int64[N]: as `availability.lead_s`."""
        return -(-(self.listings["eviction_notice_s"] + CHECKPOINT_GRACE_S + SHED_LEAD_S) // 60) * 60

    def _closed(self, t1: Ints, end: Ints | int) -> Mask:
        """Not on offer in some of [t1, end)."""
        opens, closes = self.listings["available_from"], self.listings["available_until"]
        closed: Mask = (opens > t1) | ((closes != NONE) & (closes < end))
        return closed

    @cached_property
    def _chunk(self) -> Ints:
        """GPUs that a block of each group is made of."""
        smallest = self.shelf.least(self.hosts["gpu_count"][self.shelf.order])
        return np.maximum(1, np.minimum(self._gathered(self.listings["min_gpus"], 1), smallest))

    @cached_property
    def _working(self) -> Ints:
        hosts = self.hosts
        working: Ints = np.maximum(hosts["gpu_count"] - hosts["broken"], 0) * hosts["up"]
        return working[self.shelf.order]

    def _timeline(self, at: int) -> Timeline:
        """All claims as they stand at `at` (s). Good until a hold lapses, a contract ends or a reservation sets its GPUs free."""
        kept = self.__dict__.get("_lines")
        if kept is None or not kept[0] <= at < kept[1]:
            kept = self.__dict__["_lines"] = self._made_timeline(at)
        line: Timeline = kept[2]
        return line

    def _places(self, host_ids: Ints, parts: Ints) -> Ints:
        """Where each host stands among `hosts`, or the part of it that a resale has set aside; -1 where it does not."""
        hosts = self.hosts
        at = hosts.position(host_ids)
        found: Ints = np.where((at >= 0) & (hosts["part"][at] == 0) & (parts == 0), at, -1) if len(hosts) else at
        for i in np.flatnonzero(parts > 0).tolist():
            here = np.flatnonzero(hosts["part"] == parts[i])
            found[i] = here[0] if here.size else -1
        return found

    def _made_timeline(self, at: int) -> tuple[int, int, Timeline]:
        holds, tasks = self.holds, self.tasks
        live = holds["held_until"] > at
        counts = tasks["own_until"] <= at  # what runs on its own reservation's GPUs is no claim beside it
        host, index = tasks["host_id"][counts], tasks["gpu"][counts]
        # Past its contract's end a placement still drains, nobody knows how long.
        until = np.where(tasks["ends_at"][counts] > at, tasks["ends_at"][counts], FOREVER)
        if len(host):  # shares of one GPU count once, and end with the last
            first = np.flatnonzero(np.r_[True, (host[1:] != host[:-1]) | (index[1:] != index[:-1])])
            host, until = host[first], np.maximum.reduceat(until, first)
        leaving = np.flatnonzero(self.hosts["leaves"] < FOREVER)  # it can be had until then
        place = np.empty(len(self.hosts), np.int64)
        place[self.shelf.order] = np.arange(len(self.hosts))
        parts = np.concatenate([holds["part"][live], np.zeros(len(host), np.int64)])
        whose = self._places(np.concatenate([holds["host_id"][live], host]), parts)
        here = whose >= 0
        line = Timeline.of(
            np.concatenate([place[whose[here]], place[leaving]]),
            np.concatenate(
                [
                    np.concatenate([holds["claims_at"][live], np.zeros(len(host), np.int64)])[here],
                    self.hosts["leaves"][leaving],
                ]
            ),
            np.concatenate([np.concatenate([holds["ends_at"][live], until])[here], np.full(len(leaving), FOREVER)]),
            np.concatenate(
                [
                    np.concatenate([holds["gpus"][live], np.ones(len(host), np.int64)])[here],
                    self.hosts["gpu_count"][leaving],
                ]
            ),
        )
        turns = np.concatenate([holds["held_until"], tasks["own_until"], tasks["ends_at"]])
        return at, int(turns[turns > at].min(initial=FOREVER)), line


def _limit(asked: int | None, plain: Ints) -> Ints:
    return plain if asked is None else np.full(len(plain), asked, np.int64)


def _among(rows: Rows, column: str, keys: Ints) -> Rows:
    keep = np.isin(rows[column], keys)
    return Rows({name: values[keep] for name, values in rows.columns.items()})


_TABLES: Final = ("listings", "partners", "hosts", "holds", "tasks", "tiers")


def facet(codes: Ints, names: Names, mask: Mask) -> dict[str, int]:
    """{text: rows} of the column where `mask`, the most first; what has none is not counted."""
    values, counts = np.unique(codes[mask & (codes > 0)], return_counts=True)
    found: dict[str, Any] = {names.text(v): c for v, c in zip(values.tolist(), counts.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
