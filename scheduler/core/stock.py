"""`capacity.largest_each` for a whole catalogue at once, over columns that are sorted when they change and not when they are asked.

`capacity` answers about one listing from its rows, a few hosts at a time; a search asks about thousands of listings a hundred times
a second. Here hosts stand grouped by listing, spine and leaf, and every claim's begin and end stand sorted by host and instant, so
that a question is a handful of passes over columns. The answers are those of `capacity` (tests compare them).
"""

from dataclasses import dataclass

import numpy as np

from scheduler.core.claims import LEVELS, Ints, check_level, check_window, peaks_over

_OWN = 1 << 40  # cells nobody named: each host's own
_LAST = (1 << 42) - 1  # an instant is sorted by its lower 42 bits (the year 141,000), beside 20 bits of host


@dataclass(frozen=True)
class Shelf:
    """H hosts in an order in which the cells of every level, and the G listings, are runs.

    order: int64[H], positions of the caller's hosts; group: int64[H], each one's listing as a position in `listings`;
    listings: int64[G], ids, ascending; starts[level]: first host of each cell; cells[level]: first cell of each listing.
    """

    order: Ints
    group: Ints
    listings: Ints
    starts: dict[str, Ints]
    cells: dict[str, Ints]

    @staticmethod
    def of(listing: Ints, spine: Ints, leaf: Ints) -> "Shelf":
        """From columns [H]: the listing's id; names of spine and leaf as positive numbers, 0 for none (a cell of its own)."""
        own = _OWN + np.arange(len(listing))
        spines, leaves = np.where(spine > 0, spine, own), np.where(leaf > 0, leaf, own)
        order = np.lexsort((leaves, spines, listing)).astype(np.int64)
        new = np.zeros(len(order), bool)
        new[:1] = True
        starts: dict[str, Ints] = {"host": np.arange(len(order))}
        for level, names in (("site", listing), ("spine", spines), ("leaf", leaves)):
            sorted_ = names[order]
            new[1:] |= sorted_[1:] != sorted_[:-1]
            starts[level] = np.flatnonzero(new)
        cells = {level: np.searchsorted(starts[level], starts["site"]) for level in LEVELS}
        sizes = np.diff(np.append(starts["site"], len(order)))
        return Shelf(
            order,
            np.repeat(np.arange(len(sizes)), sizes),
            listing[order][starts["site"]].astype(np.int64),
            starts,
            cells,
        )

    def most(self, units: Ints, level: str) -> Ints:
        """int64[..., G]: the most of `units` [..., H, in this order] that one cell of `level` has, per listing."""
        check_level(level)
        if not len(self.order):
            return np.zeros((*units.shape[:-1], 0), np.int64)
        inside = units if level == "host" else np.add.reduceat(units, self.starts[level], axis=-1)
        most: Ints = np.maximum.reduceat(inside, self.cells[level], axis=-1)
        return most

    def total(self, column: Ints) -> Ints:
        """int64[G]: the sum over each listing's hosts."""
        return np.add.reduceat(column, self.starts["site"]) if len(column) else np.zeros(0, np.int64)

    def least(self, column: Ints) -> Ints:
        """int64[G]: the smallest of each listing's hosts."""
        return np.minimum.reduceat(column, self.starts["site"]) if len(column) else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Timeline:
    """Claims as changes of what is held, [2 x claims], in order of host, instant, and ends before begins. `start`, `end`: of the claim."""

    host: Ints
    change: Ints
    start: Ints
    end: Ints

    @staticmethod
    def of(host: Ints, start: Ints, end: Ints, held: Ints) -> "Timeline":
        """From claims: `held` GPUs of the host at that place during [start, end). Claims of nothing, or of no time, are left out."""
        real = (start < end) & (held > 0)
        host, start, end, held = host[real], start[real], end[real], held[real]
        at, change = np.concatenate((start, end)), np.concatenate((held, -held))
        whose = np.concatenate((host, host))
        key = whose << 43 | np.clip(at, 0, _LAST) << 1 | (change > 0)
        order = np.argsort(key, kind="stable")
        return Timeline(
            whose[order], change[order], np.concatenate((start, start))[order], np.concatenate((end, end))[order]
        )

    def peak(self, hosts: int, t1: Ints, t2: int) -> Ints:
        """int64[hosts]: most that is held at one instant of [t1, t2); `t1` int64[hosts], each before t2.

        Begins before t1 count as at t1: they stay ahead of everything else that overlaps the window, so the order holds.
        """
        if len(t1):
            check_window(int(t1.max()), t2)
        peak = np.zeros(hosts, np.int64)
        near = np.flatnonzero((self.start < t2) & (self.end > t1[self.host])) if len(self.host) else self.host
        if near.size == 0:
            return peak
        host, level = self.host[near], np.cumsum(self.change[near])
        # Each host's changes sum to zero, so the running sum needs no restart.
        first = np.flatnonzero(np.r_[True, host[1:] != host[:-1]])
        peak[host[first]] = np.maximum.reduceat(level, first)
        return peak

    def peaks(self, hosts: int, windows: Ints) -> Ints:
        """int64[windows, hosts]: most that is held at one instant of each of `windows` (int64[windows, 2])."""
        claims = self.change > 0  # of each claim's two changes, its begin
        return peaks_over(hosts, self.host[claims], self.start[claims], self.end[claims], self.change[claims], windows)


def largest(
    shelf: Shelf, timeline: Timeline, gpus: Ints, chunk: Ints, level: str, t1: Ints, t2: int, closed: Ints | None = None
) -> Ints:
    """int64[G]: the most GPUs one block inside one cell of `level` can have during [t1, t2), a multiple of the listing's chunk.

    gpus: int64[H], working GPUs in the shelf's order; chunk, t1: int64[G], per listing (t1 differs by the lead that it keeps
    clear); closed: [G], non-zero where the listing is not on offer in some of the window.
    """
    free = np.maximum(gpus - timeline.peak(len(gpus), t1[shelf.group], t2), 0)
    most = shelf.most(free // chunk[shelf.group], level) * chunk
    return most if closed is None else np.where(closed != 0, 0, most)
