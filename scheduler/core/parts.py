"""What somebody holds, cut and put together again: the pure algebra of a reservation of which a part is sold. Integers only.

A holding is a set of strips: GPUs (device numbers) of one host over one half-open window of whole seconds. `cut` takes GPUs out of a
window of it, `join` puts strips together again. Neither makes nor loses a GPU-second: what is cut and what is left are the whole, and
a joined holding is the sum of its parts.

A device that is cut out of the middle of a strip leaves two behind, before and after. When the middle comes back, it need not
have the same number as before (claims that have not begun are renumbered where that makes room), so `join` welds by count: the strip
that begins where another ends goes on with the other's devices, and whoever is to have these later is given the ones left over
(`services.holds`). Work that runs on a device therefore never has to move because a sale fell through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Gpus = frozenset[int]


class PartsError(ValueError):
    """A holding was asked for what it does not have."""


class Strip(NamedTuple):
    """`gpus` of `host` during [start, end), seconds."""

    start: int
    end: int
    host: int
    gpus: Gpus


def size(strips: Iterable[Strip]) -> int:
    """GPU-seconds."""
    return sum((s.end - s.start) * len(s.gpus) for s in strips)


def counts(strips: Iterable[Strip], host: int, at: int) -> int:
    """GPUs held on a host at one second."""
    return sum(len(s.gpus) for s in strips if s.host == host and s.start <= at < s.end)


def throughout(strips: Iterable[Strip], start: int, end: int) -> dict[int, Gpus]:
    """Host -> devices that one strip holds for all of [start, end): what `cut` can take there."""
    found: dict[int, Gpus] = defaultdict(frozenset)
    for s in strips:
        if s.start <= start and end <= s.end:
            found[s.host] |= s.gpus
    return {host: gpus for host, gpus in found.items() if gpus}


def cut(
    strips: Iterable[Strip], taken: Mapping[int, Iterable[int]], start: int, end: int
) -> tuple[list[Strip], list[Strip]]:
    """(what is left, what is cut out): `taken`, host -> devices, in [start, end). Raises PartsError for what is not held throughout."""
    if start >= end:
        raise PartsError(f"a window from {start} to {end}")
    wanted = {host: frozenset(gpus) for host, gpus in taken.items()}
    left: list[Strip] = []
    out: list[Strip] = []
    for s in strips:
        mine = s.gpus & wanted.get(s.host, frozenset()) if s.start <= start and end <= s.end else frozenset()
        if not mine:
            left.append(s)
            continue
        wanted[s.host] -= mine
        out.append(Strip(start, end, s.host, mine))
        left += [s._replace(gpus=s.gpus - mine), s._replace(end=start, gpus=mine), s._replace(start=end, gpus=mine)]
    missing = {host: sorted(gpus) for host, gpus in wanted.items() if gpus}
    if missing:
        raise PartsError(f"not held throughout: {missing}")
    return _real(left), out


def join(strips: Iterable[Strip]) -> list[Strip]:
    """The same holding in as few strips as there can be: where one begins as another ends on its host, the earlier's devices go on.

    Counts per host and second are what they were; devices are those of the strip that began first.
    """
    found: list[Strip] = []
    for host, mine in _by_host(strips).items():
        open_: list[Strip] = []
        for s in sorted(mine, key=lambda s: (s.start, s.end, sorted(s.gpus))):
            rest = s
            enders = [o for o in open_ if o.end == s.start]
            for same in (True, False):  # a device's own continuation first
                for o in [o for o in enders if o in open_]:
                    pool = o.gpus & rest.gpus if same else o.gpus
                    on = frozenset(sorted(pool)[: len(rest.gpus)])
                    if not on:
                        continue
                    open_.remove(o)
                    open_ += _real([o._replace(gpus=o.gpus - on), Strip(o.start, s.end, host, on)])
                    gone = on if same else frozenset(sorted(rest.gpus)[: len(on)])
                    rest = rest._replace(gpus=rest.gpus - gone)
                    enders = [e for e in open_ if e.end == s.start]
            open_ += _real([rest])
        found += _level(open_)
    return sorted(found, key=lambda s: (s.start, s.end, s.host, sorted(s.gpus)))


def _level(strips: Iterable[Strip]) -> list[Strip]:
    """Strips of one host and window as one."""
    merged: dict[tuple[int, int, int], Gpus] = {}
    for s in strips:
        key = (s.start, s.end, s.host)
        merged[key] = merged.get(key, frozenset()) | s.gpus
    return [Strip(start, end, host, gpus) for (start, end, host), gpus in merged.items()]


def _by_host(strips: Iterable[Strip]) -> dict[int, list[Strip]]:
    found: dict[int, list[Strip]] = defaultdict(list)
    for s in _real(strips):
        found[s.host].append(s)
    return found


def _real(strips: Iterable[Strip]) -> list[Strip]:
    return [s for s in strips if s.gpus and s.start < s.end]
