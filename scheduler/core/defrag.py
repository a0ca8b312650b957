"""Defragmentation: a bounded number of moves that make room for jobs that wait, kept only where the gain pays for the work lost.

A repair search on a copy of the state. For a waiting request, every host is broken up on trial: the placements there whose
leaving would let the request fit, fewest moves first, then least work lost, with a reprieve for those that were not needed
after all. The cheapest hosts are then tried in turn: each of the displaced goes, largest first, to the host that the packer's
own score prefers, where it must fit *while it still holds its old place*. So nothing waits for anything: every move lands at
once, in any order, and a move that fails leaves a placement where it was. A host for which somebody finds no place is left alone.

What moves: placements marked movable (checkpointable, whole jobs of one replica). What it costs: `lost`, the milli-GPU
seconds of work that its owner loses. What it gains: `worth`, the milli-GPU seconds that the waiting job gets sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core.fit_kernels import (
    CPU,
    FLAGS,
    NGPU,
    NODE,
    NVME,
    Q_CPU,
    Q_GPUS,
    Q_MILLI,
    Q_NVME,
    Q_RAM,
    RAM,
    choose_kernel,
    delta_kernel,
    fit_kernel,
    static_kernel,
    watts_bind,
)
from scheduler.core.jit import kernel
from scheduler.core.pack import copy_state
from scheduler.core.score import Tables
from scheduler.core.state import NO, State, give, refresh_host, score_host, take
from scheduler.core.types import I64, HostFlag

U8 = npt.NDArray[np.uint8]
TRIES: Final = 8  # hosts tried for one waiting request before it is given up for this time
MOST: Final = 32  # placements that may be asked to leave one host
NEVER: Final = np.int64(1 << 62)  # key of a host that cannot be cleared
PER_MOVE_BITS: Final = 40
PER_MOVE: Final = np.int64(1 << PER_MOVE_BITS)  # in a key: one move more outweighs any work lost


class Work(NamedTuple):
    """Placements, by index. The search reads them and changes none."""

    row: I64  # [V] of the state
    vector: I64  # [V, REQUEST_WIDTH]: what a new host must offer
    mask: I64  # [V] GPUs held
    movable: U8  # [V] 1: may be moved
    lost: I64  # [V] milli-GPU seconds that moving it costs


class Wanted(NamedTuple):
    """Who waits: the request vector of each of his replicas, and what starting them all now is worth, milli-GPU seconds."""

    vector: I64
    worth: int
    replicas: int = 1


class Move(NamedTuple):
    """Placement `index` goes from `row` to `to`, onto the GPUs of `mask`, so that `wanted` (an index) fits on `row`."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name; nobody calls it on a move
    row: int
    to: int
    mask: int
    wanted: int


class Room(NamedTuple):
    """Where a waiting replica fits, at once or when the moves off that row are done."""

    wanted: int
    row: int
    mask: int


class Repair(NamedTuple):
    """What to do: `gain` and `lost` in milli-GPU seconds; gain > lost wherever there is a move."""

    moves: list[Move]
    rooms: list[Room]
    gain: int
    lost: int


@kernel
def _fits(h: int, q: I64, s: State) -> bool:
    return fit_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q, s.parent, s.k, s.budget)[0] == 0


@kernel
def _may_leave(v: int, q: I64, w: Work) -> bool:
    """Movable, and so much smaller than the request that a place for it is easier to find: one GPU or a quarter of the request's."""
    size = w.vector[v, Q_GPUS] * w.vector[v, Q_MILLI]
    wanted = q[Q_GPUS] * q[Q_MILLI]
    return w.movable[v] == 1 and size < max(wanted, 1) and size <= max(1000, wanted // 4)  # type: ignore[no-any-return]


@kernel
def _gpu_victims(h: int, q: I64, s: State, w: Work, members: I64, low: int, high: int, out: U8) -> bool:
    """Marks, for one more GPU of the request, those who must leave the GPU that is cheapest to clear. False: there is none."""
    milli = q[Q_MILLI]
    best, best_key = -1, NEVER
    for g in range(s.rows[h, NGPU]):
        free, key = np.int64(s.gfree[h, g]), np.int64(0)
        if free >= milli:
            continue  # counted by the fit rule already
        for at in range(low, high):
            v = members[at]
            if free < milli and not out[at - low] and _may_leave(v, q, w) and (w.mask[v] >> g) & 1:
                free += w.vector[v, Q_MILLI]
                key += PER_MOVE + w.lost[v]
        if free >= milli and key < best_key:
            best, best_key = g, key
    if best < 0:
        return False
    free = np.int64(s.gfree[h, best])
    for at in range(low, high):
        v = members[at]
        if free < milli and not out[at - low] and _may_leave(v, q, w) and (w.mask[v] >> best) & 1:
            free += w.vector[v, Q_MILLI]
            out[at - low] = 1
            give(h, w.vector[v], w.mask[v], s)
    return True


@kernel
def _other_victim(h: int, q: I64, s: State, w: Work, members: I64, low: int, high: int, out: U8) -> bool:
    """Marks the one whose leaving closes most of the gap in CPU, memory or NVMe per move. False: there is no gap, or nobody."""
    best, most = -1, 0.0
    for at in range(low, high):
        v = members[at]
        if out[at - low] or not _may_leave(v, q, w):
            continue
        closed = 0.0
        gap = q[Q_CPU] - s.rows[h, CPU]
        if gap > 0:
            closed += min(1.0, w.vector[v, Q_CPU] / gap)
        gap = q[Q_RAM] - s.rows[h, RAM]
        if gap > 0:
            closed += min(1.0, w.vector[v, Q_RAM] / gap)
        gap = q[Q_NVME] - s.rows[h, NVME]
        if gap > 0:
            closed += min(1.0, w.vector[v, Q_NVME] / gap)
        if closed > most:
            best, most = at, closed
    if best < 0:
        return False
    v = members[best]
    out[best - low] = 1
    give(h, w.vector[v], w.mask[v], s)
    return True


@kernel
def clear(h: int, q: I64, s: State, w: Work, members: I64, low: int, high: int, limit: int, out: U8) -> int:
    """Who must leave host h so that q fits: out[i] = 1 for members[low + i]. Returns the key of the set, or `NEVER`.

    The state is left as it was. At most `limit` leave, and only the movable.
    """
    out[:] = 0
    high = min(high, low + len(out))
    if static_kernel(s.rows[h], q) or s.rows[h, NGPU] < q[Q_GPUS]:
        return int(NEVER)
    fits = _fits(h, q, s)
    going = True
    while going and not fits:
        # GPUs first: who holds them holds most of the CPU too.
        reason, _ = choose_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q)
        going = reason != 0 and _gpu_victims(h, q, s, w, members, low, high, out)
        going = going or _other_victim(h, q, s, w, members, low, high, out)
        fits = _fits(h, q, s)
    key, count = np.int64(0), 0
    for at in range(high - 1, low - 1, -1):  # the reprieve
        if fits and out[at - low]:
            v = members[at]
            take(h, w.vector[v], w.mask[v], s)
            if _fits(h, q, s):
                out[at - low] = 0
            else:
                give(h, w.vector[v], w.mask[v], s)
    for at in range(low, high):
        if out[at - low]:
            v = members[at]
            take(h, w.vector[v], w.mask[v], s)
            key += PER_MOVE + w.lost[v]
            count += 1
    if not fits or count > limit:
        return int(NEVER)
    return int(key)


@kernel
def clear_all(q: I64, s: State, w: Work, members: I64, start: I64, limit: int, scratch: U8, keys: I64) -> None:
    """The key of `clear` for every host. Hosts that could not even then have the GPUs are not looked at."""
    for h in range(len(s.rows)):
        keys[h] = clear(h, q, s, w, members, start[h], start[h + 1], limit, scratch)


@kernel
def best_host(q: I64, skip: int, s: State, t: Tables) -> tuple[int, int]:
    """(host, GPU mask) with the best score where q fits now, watts included, `skip` left out; (-1, 0): nowhere. Ties to the first."""
    shared = q[Q_GPUS] == 1 and q[Q_MILLI] < 1000
    best, best_h, best_mask = NO, -1, 0
    for h in range(len(s.rows)):
        if h == skip or static_kernel(s.rows[h], q):
            continue
        value, mask = score_host(h, q, s, t)
        if value <= best:
            continue
        if not shared:
            reason, mask = choose_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], q)
            if reason:
                continue
        if watts_bind(s.rows[h, NODE], delta_kernel(s.rows[h], mask), s.parent, s.k, s.budget) < 0:
            best, best_h, best_mask = value, h, mask
    return best_h, best_mask


@kernel
def book(h: int, q: I64, mask: int, s: State, t: Tables) -> None:
    """`take`, and what the score remembers."""
    take(h, q, mask, s)
    refresh_host(h, s, t)


@kernel
def unbook(h: int, q: I64, mask: int, s: State, t: Tables) -> None:
    """`give`, and what the score remembers."""
    give(h, q, mask, s)
    refresh_host(h, s, t)


def search(
    s: State, t: Tables, work: Work, wanted: Sequence[Wanted], max_moves: int, reach: int | None = None
) -> Repair:
    """The moves to make now, at most `max_moves`. Same arguments, same answer; `s` is not changed.

    Requests are served in the order of what they are worth a move. One that needs up to `reach` moves (`max_moves` when not
    given) keeps its place in that order: nobody behind it spends what it saves up for. A gang gets room for all its replicas or
    for none. A request that fits without any move is the planner's business and gets nothing here.
    """
    out = Repair([], [], 0, 0)
    reach = max(max_moves, reach or 0)
    if max_moves < 1 or not len(work.row) or not wanted:
        return out
    s = copy_state(s)
    work = work._replace(movable=work.movable.copy())
    members = np.argsort(work.row, kind="stable").astype(np.int64)
    start = np.searchsorted(work.row[members], np.arange(len(s.rows) + 1)).astype(np.int64)
    keys = np.empty(len(s.rows), np.int64)
    found: list[tuple[float, int, list[int]]] = []
    for i, one in enumerate(wanted):
        clear_all(one.vector, s, work, members, start, reach, np.zeros(MOST, np.uint8), keys)
        order = np.argsort(keys, kind="stable")
        each = keys[order[: one.replicas]]  # a host for each replica; several on one cost no less
        fewest = int((each[each < NEVER] >> PER_MOVE_BITS).sum())
        if each[0] < NEVER and (fewest or one.replicas > 1):
            found.append((-one.worth / max(1, fewest), i, [int(h) for h in order[:TRIES] if keys[h] < NEVER]))
    moves, rooms, gain, lost = out.moves, out.rooms, 0, 0
    for _, i, hosts in sorted(found):
        if len(moves) >= max_moves:
            break
        if wanted[i].replicas > 1:
            tried = _gather(wanted[i], i, s, t, work, members, start, reach)
        else:
            tried = _first(hosts, wanted[i], i, s, t, work, members, start, reach)
        if tried is None:
            continue
        places, made, cost = tried
        if len(moves) + len(made) > max_moves:
            break
        work.movable[[move.index for move in made]] = 0  # nobody moves twice
        moves += made
        rooms += places
        gain, lost = gain + wanted[i].worth, lost + cost
    return Repair(moves, rooms, gain, lost)


def _first(
    hosts: Sequence[int],
    one: Wanted,
    number: int,
    s: State,
    t: Tables,
    work: Work,
    members: I64,
    start: I64,
    limit: int,
) -> tuple[list[Room], list[Move], int] | None:
    """The first of `hosts` that can be emptied for `one`."""
    for h in hosts:
        tried = _empty(h, one, number, s, t, work, members, start, limit)
        if tried is not None:
            return [tried[0]], *tried[1:]
    return None


def _gather(
    one: Wanted, number: int, s: State, t: Tables, work: Work, members: I64, start: I64, limit: int
) -> tuple[list[Room], list[Move], int] | None:
    """Room for every replica of a gang, where it fits already and then where it costs least, done on `s`; None, and `s` as it was,
    when there is none for all of them, or no move is needed.
    """
    flags, budget = s.rows[:, FLAGS].copy(), s.budget.copy()
    rooms: list[Room] = []
    made: list[Move] = []
    keys, scratch, cost = np.empty(len(s.rows), np.int64), np.zeros(MOST, np.uint8), 0
    while len(rooms) < one.replicas:
        row, mask = best_host(one.vector, -1, s, t)
        if row >= 0:
            book(row, one.vector, mask, s, t)
            rooms.append(Room(number, row, int(mask)))
            continue
        clear_all(one.vector, s, work, members, start, limit - len(made), scratch, keys)
        hosts = [int(h) for h in np.argsort(keys, kind="stable")[:TRIES] if keys[h] < NEVER]
        rest = one._replace(worth=one.worth - cost)
        found = _first(hosts, rest, number, s, t, work, members, start, limit - len(made))
        if found is None:
            break
        rooms += found[0]
        made += found[1]
        cost += found[2]
    if made and len(rooms) == one.replicas:
        return rooms, made, cost
    for room in reversed(rooms):
        unbook(room.row, one.vector, room.mask, s, t)
    for move in made:
        book(move.row, work.vector[move.index], int(work.mask[move.index]), s, t)
    for move in reversed(made):
        unbook(move.to, work.vector[move.index], move.mask, s, t)
    s.rows[:, FLAGS], s.budget[:] = flags, budget
    return None


def _empty(
    h: int, one: Wanted, number: int, s: State, t: Tables, work: Work, members: I64, start: I64, limit: int
) -> tuple[Room, list[Move], int] | None:
    """Moves that make room for `one` on h, done on `s`; None, and `s` as it was, when they are too many, too dear or have nowhere to go."""
    leave = np.zeros(MOST, np.uint8)
    if not 0 < clear(h, one.vector, s, work, members, start[h], start[h + 1], limit, leave) < NEVER:
        return None
    victims = [int(members[start[h] + i]) for i in np.flatnonzero(leave)]
    cost = int(work.lost[victims].sum())
    if cost >= one.worth:
        return None
    victims.sort(key=lambda v: (-size_of(work.vector[v]), v))
    made: list[Move] = []
    for v in victims:
        to, mask = best_host(work.vector[v], h, s, t)
        if to < 0:
            for move in reversed(made):
                unbook(move.to, work.vector[move.index], move.mask, s, t)
            return None
        book(to, work.vector[v], mask, s, t)
        made.append(Move(v, h, to, mask, number))
    budget = s.budget.copy()
    for v in victims:
        unbook(h, work.vector[v], work.mask[v], s, t)
    _, mask = choose_kernel(s.rows[h], s.gfree[h], s.vfree[h], s.nvl[h], one.vector)
    book(h, one.vector, mask, s, t)
    # What the displaced leave behind is free later, not now: nobody else may count on the host or on its watts.
    s.rows[h, FLAGS] |= int(HostFlag.DRAINING)
    np.minimum(budget, s.budget, out=s.budget)
    return Room(number, h, int(mask)), made, cost


def size_of(vector: I64) -> int:
    """milli-GPU, then CPU."""
    return int(vector[Q_GPUS] * vector[Q_MILLI]) * 1_000_000 + int(vector[Q_CPU])


def workload(
    rows: Sequence[int], vectors: I64, masks: Sequence[int], movable: Sequence[bool], lost: Sequence[int]
) -> Work:
    """The columns of `Work`."""
    return Work(
        np.array(rows, np.int64),
        np.ascontiguousarray(vectors, np.int64),
        np.array(masks, np.int64),
        np.array(movable, np.uint8),
        np.array(lost, np.int64),
    )
