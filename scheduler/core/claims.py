"""Hosts, the cells they stand in, and every claim on their GPUs over time. `capacity` answers questions about them."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

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
