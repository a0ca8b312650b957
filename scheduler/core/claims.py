"""Hosts, the cells they stand in, and every claim on their GPUs over time. `capacity` answers questions about them."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

LEVELS = ("host", "leaf", "spine", "site")
FOREVER = 1 << 62  # the end of a claim whose end nobody knows (a host held by a running on-demand job, an outage)

Ints = npt.NDArray[np.int64]


class CapacityError(ValueError):
    """A question that has no meaning: an empty window, an unknown level or host, a count that is no multiple of the
    chunk.
    """


def check_window(t1: int, t2: int) -> None:
    if t1 >= t2:
        raise CapacityError(f"empty window [{t1}, {t2})")


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise CapacityError(f"level {level!r} is none of {', '.join(LEVELS)}")


def claim_window(start: int, end: int, lead_s: int, now: int) -> tuple[int, int]:
    """When the capacity of a contract over [start, end) must be taken: `lead_s` (notice + checkpoint grace + shed lead)
    early, not in the past.
    """
    check_window(start, end)
    return min(start, max(now, start - lead_s)), end


@dataclass(frozen=True)
class Shape:
    """What a block is made of: GPUs come in chunks of `chunk` on one host (8 = whole 8-GPU hosts, 1 = any)."""

    chunk: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise CapacityError(f"chunk {self.chunk}: at least one GPU")


@dataclass(frozen=True)
class Hosts:
    """Columns of the hosts offered, one entry per host, and the cell each belongs to at every level.

    `cell[level]` numbers the cells of a level; cells nest by construction (a leaf's name counts inside its spine, a
    spine's inside its site). A host with no leaf (None or "") is a leaf of its own, likewise for the spine: adjacency
    nobody declared is not promised.
    """

    ids: tuple[Hashable, ...]
    gpus: Ints
    cell: dict[str, Ints]
    sites: tuple[Hashable, ...]
    position: dict[Hashable, int] = field(repr=False)

    @staticmethod
    def of(rows: Iterable[Sequence[Hashable]]) -> "Hosts":
        """Rows of (host id, gpus, leaf, spine) or (host id, gpus, leaf, spine, site); a host that is down counts 0
        GPUs.
        """
        ids: list[Hashable] = []
        gpus: list[int] = []
        codes: dict[str, list[int]] = {level: [] for level in LEVELS}
        known: dict[str, dict[Hashable, int]] = {level: {} for level in LEVELS}
        for row in rows:
            host, count, leaf, spine = row[:4]
            if not isinstance(count, int | np.integer) or count < 0:
                raise CapacityError(f"host {host!r}: {count!r} GPUs")
            site: Hashable = row[4] if len(row) > 4 else None
            spine_key: Hashable = (site, spine) if spine not in {None, ""} else (site, "host", host)
            leaf_key: Hashable = (spine_key, leaf) if leaf not in {None, ""} else (spine_key, "host", host)
            ids.append(host)
            gpus.append(int(count))
            for level, key in zip(LEVELS, (host, leaf_key, spine_key, site), strict=True):
                codes[level].append(known[level].setdefault(key, len(known[level])))
        if len(known["host"]) != len(ids):
            raise CapacityError("a host id appears twice")
        return Hosts(
            ids=tuple(ids),
            gpus=np.array(gpus, np.int64),
            cell={level: np.array(codes[level], np.int64) for level in LEVELS},
            sites=tuple(known["site"]),
            position=dict(known["host"]),
        )


@dataclass(frozen=True)
class Claim:
    """Capacity promised: `hold` = ((host id, GPUs), ...) during [start, end), inside one cell of `level`, in chunks of
    `chunk`.

    Maintenance, a listing's closed hours and a live quote's hold are claims too; `key` names the row it came from.
    """

    key: Hashable
    start: int
    end: int
    hold: tuple[tuple[Hashable, int], ...]
    level: str = "site"
    chunk: int = 1

    @property
    def gpus(self) -> int:
        return sum(count for _, count in self.hold)


@dataclass(frozen=True)
class Pool:
    """Hosts and every claim on them; immutable. Holds on hosts that are not in `hosts` are left out of the columns."""

    hosts: Hosts
    claims: tuple[Claim, ...]
    at: Ints = field(repr=False)
    starts: Ints = field(repr=False)
    ends: Ints = field(repr=False)
    held: Ints = field(repr=False)

    @staticmethod
    def build(hosts: Hosts, claims: Iterable[Claim] = ()) -> "Pool":
        kept = tuple(claims)
        columns: list[tuple[int, int, int, int]] = []
        for claim in kept:
            if claim.start >= claim.end:
                raise CapacityError(f"claim {claim.key!r}: empty window [{claim.start}, {claim.end})")
            for host, count in claim.hold:
                at = hosts.position.get(host)
                if at is not None and count > 0:
                    columns.append((at, claim.start, claim.end, count))
        table = np.array(columns, np.int64).reshape(-1, 4)
        return Pool(hosts, kept, *(np.ascontiguousarray(table[:, i]) for i in range(4)))

    def plus(self, *claims: Claim) -> "Pool":
        return Pool.build(self.hosts, (*self.claims, *claims))

    def without(self, keys: Collection[Hashable]) -> "Pool":
        return Pool.build(self.hosts, (claim for claim in self.claims if claim.key not in keys))

    def of_site(self, site: Hashable) -> "Pool":
        """The same with the hosts of all other sites empty: no block stands there."""
        here = self.hosts.cell["site"] == self.hosts.sites.index(site) if site in self.hosts.sites else False
        return replace(self, hosts=replace(self.hosts, gpus=np.where(here, self.hosts.gpus, 0)))

    def peak(self, t1: int, t2: int) -> Ints:
        """Most GPUs held at one instant of [t1, t2), per host."""
        check_window(t1, t2)
        peak = np.zeros(len(self.hosts.ids), np.int64)
        near = np.flatnonzero((self.starts < t2) & (self.ends > t1))
        if near.size == 0:
            return peak
        host, held = self.at[near], self.held[near]
        hosts = np.concatenate((host, host))
        times = np.concatenate((np.maximum(self.starts[near], t1), self.ends[near]))
        change = np.concatenate((held, -held))
        # Per host in time order; at one instant ends come before starts, for windows are half-open.
        order = np.lexsort((change, times, hosts))
        hosts, level = hosts[order], np.cumsum(change[order])
        first = np.flatnonzero(np.r_[True, hosts[1:] != hosts[:-1]])
        # Every host's changes sum to zero, so the running sum needs no restart at a host's first event.
        peak[hosts[first]] = np.maximum.reduceat(level, first)
        return peak

    def free(self, t1: int, t2: int) -> Ints:
        """GPUs of each host that nobody holds at any instant of [t1, t2); never negative, also where the host
        shrank.
        """
        free: Ints = np.maximum(self.hosts.gpus - self.peak(t1, t2), 0)
        return free

    def free_over(self, windows: Ints) -> Ints:
        """int64[windows, hosts]: `free` in each of `windows` (int64[windows, 2]), from one sweep over the claims."""
        peaks = peaks_over(len(self.hosts.ids), self.at, self.starts, self.ends, self.held, windows)
        free: Ints = np.maximum(self.hosts.gpus - peaks, 0)
        return free


def peaks_over(hosts: int, at: Ints, starts: Ints, ends: Ints, held: Ints, windows: Ints) -> Ints:
    """int64[windows, hosts]: most GPUs held at one instant of each of `windows` (int64[windows, 2], half-open, in any order).

    Claims are columns: `held` GPUs of the host at place `at` during [starts, ends). The windows' edges cut time into
    segments; one pass over the claims' begins and ends finds the most of every segment, and a window takes the most of its own.
    """
    for t1, t2 in windows[windows[:, 0] >= windows[:, 1]].tolist():
        check_window(t1, t2)
    if not len(windows):
        return np.zeros((0, hosts), np.int64)
    edges = np.unique(windows)
    near = np.flatnonzero((starts < edges[-1]) & (ends > edges[0]))
    host = np.concatenate((at[near], at[near]))
    time = np.concatenate((np.maximum(starts[near], edges[0]), ends[near]))
    change = np.concatenate((held[near], -held[near]))
    order = np.lexsort((time, host))
    host, time, change = host[order], time[order], change[order]
    level = np.cumsum(change)  # every host's changes sum to zero, so the running sum needs no restart
    # Of all changes at one instant of a host only what they come to counts: what ends and what begins there never met.
    last = np.flatnonzero(np.r_[(host[1:] != host[:-1]) | (time[1:] != time[:-1]), np.ones(len(host[:1]), bool)])
    inside = last[time[last] < edges[-1]]
    segment = np.searchsorted(edges, time[inside], "right") - 1
    shape = len(edges) - 1, hosts
    # What stands when a segment begins: all that came before, and what changes on its very edge.
    moved = np.diff(level[last], prepend=0)
    fresh = np.r_[True, host[last][1:] != host[last][:-1]][: len(last)]
    moved[fresh] = level[last][fresh]
    moved = moved[time[last] < edges[-1]]
    on_edge = time[inside] == edges[segment]
    at_edge = _summed(segment[on_edge], host[inside][on_edge], moved[on_edge], shape)
    after = np.cumsum(_summed(segment, host[inside], moved, shape), axis=0)
    most = at_edge
    most[1:] += after[:-1]
    np.maximum.at(most, (segment, host[inside]), level[inside])
    spans = np.searchsorted(edges, windows).reshape(-1)
    closed = np.concatenate((most, np.zeros((1, hosts), np.int64)))  # reduceat wants a row behind the last
    peaks: Ints = np.maximum.reduceat(closed, spans, axis=0)[::2]
    return peaks


def _summed(row: Ints, column: Ints, values: Ints, shape: tuple[int, int]) -> Ints:
    """int64[shape]: the sum of `values` that fall on each place."""
    flat = np.bincount(row * shape[1] + column, weights=values, minlength=shape[0] * shape[1])
    return flat.astype(np.int64).reshape(shape)
