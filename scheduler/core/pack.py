"""The planner's working copy of a fleet, and the packer that places replicas on it through the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core import kernels
from scheduler.core.fit_kernels import HOST_WIDTH, REQUEST_WIDTH, request_vector
from scheduler.core.jit import inlined, kernel
from scheduler.core.kernels import BLOCK, META_WIDTH, Cache
from scheduler.core.score import Tables
from scheduler.core.state import State, give, refresh_all, take, unscored
from scheduler.core.types import I16, I32, I64, MAX_GPUS, Fleet, Request

TABLE_CELLS: Final = 48_000_000  # int32 scores kept at most (192 MB); classes beyond that share slots
_COPY: Final = (
    (fit.CPU, "cpu_free"),
    (fit.RAM, "ram_free"),
    (fit.NVME, "nvme_free"),
    (fit.MODEL, "gpu_model"),
    (fit.NGPU, "gpu_count"),
    (fit.ACTIVE, "gpu_active"),
    (fit.CPU_ONLY, "cpu_only"),
    (fit.POOL, "pool"),
    (fit.SITE, "site"),
    (fit.OWNER, "owner"),
    (fit.NODE, "power_node"),
    (fit.FLAGS, "flags"),
    (fit.STANDBY, "standby_w"),
    (fit.PARKED, "parked_w"),
    (fit.BASE, "base_w"),
    (fit.GMIN, "gpu_min_w"),
    (fit.GMAX, "gpu_max_w"),
    (fit.CAPCTL, "cap_control"),
    (fit.LEAF, "leaf"),
    (fit.SPINE, "spine"),
    (fit.TAINTS, "taints"),
    (fit.LEAVES, "leaves"),
    (fit.VRAM, "vram_total"),
)
_CLAIMS: Final = (
    (fit.CLAIM, "claimed_at"),
    (fit.CLAIMED, "claimed_gpus"),
    (fit.OWED_CPU, "owed_cpu"),
    (fit.OWED_RAM, "owed_ram"),
    (fit.OWED_NVME, "owed_nvme"),
)
# What the score and the shape stages read of a host, besides its GPUs.
_SCORED: Final = (
    fit.CPU, fit.RAM, fit.NVME, fit.MODEL, fit.NGPU, fit.ACTIVE, fit.CPU_ONLY, fit.HELD, fit.VRAM, fit.OWNER, fit.CLAIM,
    fit.CLAIMED, fit.OWED_CPU, fit.OWED_RAM, fit.OWED_NVME,
)  # fmt: skip


def make_state(fleet: Fleet, order: I64 | None = None) -> State:
    """A mutable copy of the fleet, hosts permuted by `order` (row i is host order[i])."""
    hosts = len(fleet)
    places = np.arange(hosts) if order is None else order
    rows = np.zeros((hosts, HOST_WIDTH), np.int64)
    for column, name in (*_COPY, *_CLAIMS) if fleet.claimed_at.any() else _COPY:
        rows[:, column] = getattr(fleet, name) if order is None else getattr(fleet, name)[order]
    gfree, vfree = np.empty((hosts, MAX_GPUS), np.int32), np.empty((hosts, MAX_GPUS), np.int32)
    nvl = np.empty((hosts, MAX_GPUS), np.int16)
    _permuted(places, fleet.gpu_free, fleet.vram_free, fleet.nvlink, rows, gfree, vfree, nvl)
    return State(
        rows=rows,
        gfree=gfree,
        vfree=vfree,
        nvl=nvl,
        parent=np.ascontiguousarray(fleet.node_parent),
        k=np.ascontiguousarray(fleet.node_k_gpu),
        budget=fleet.node_free_mw + fleet.node_reclaimable_mw,
        **unscored(hosts),
    )


@kernel
def _permuted(places: I64, free: I32, vram: I32, links: I16, rows: I64, gfree: I32, vfree: I32, nvl: I16) -> None:
    """GPU columns [H, 16] by row of the state, and their sum into `rows`."""
    for i in range(len(places)):
        h, total = places[i], 0
        for g in range(free.shape[1]):
            gfree[i, g] = free[h, g]
            vfree[i, g] = vram[h, g]
            nvl[i, g] = links[h, g]
            total += free[h, g]
        rows[i, fit.TOTAL] = total


def copy_state(s: State) -> State:
    """A second working copy."""
    return State(*(column.copy() for column in s))  # type: ignore[arg-type]


def equal_states(s: State) -> tuple[I32, int]:
    """Group number of each host (equal in all that the score and the shape stages read), and the number of groups. Groups are
    numbered as they come.
    """
    hosts = len(s.rows)
    table = np.full(1 << max(4, (2 * hosts).bit_length()), -1, np.int32)
    first, group = np.empty(hosts, np.int32), np.empty(hosts, np.int32)
    return group, int(_grouped(s.rows, s.gfree, s.vfree, s.nvl, table, first, group))


def equal_states_plain(s: State) -> tuple[list[int], int]:
    """The kernel's twin: what it hashes is a tuple here."""
    known: dict[tuple[int, ...], int] = {}
    numbers = []
    for row, *gpus in zip(s.rows, s.gfree, s.vfree, s.nvl, strict=True):
        parts = [row[list(_SCORED)], *(columns[: row[fit.NGPU]] for columns in gpus)]
        numbers.append(known.setdefault(tuple(np.concatenate(parts).tolist()), len(known)))
    return numbers, len(known)


@inlined
def _mixed(word: Any, value: Any) -> Any:
    """One step of a 64-bit polynomial hash."""
    word = (word ^ np.uint64(value)) * np.uint64(0x9E3779B97F4A7C15)
    return word ^ (word >> np.uint64(29))


@kernel
def _grouped(rows: I64, gfree: I32, vfree: I32, nvl: I16, table: I32, first: I32, group: I32) -> int:
    """An open hash table [power of two, all -1] of group numbers; `first`: the first host of each group."""
    count = 0
    last = len(table) - 1
    for h in range(len(rows)):
        word = np.uint64(0)
        for c in _SCORED:
            word = _mixed(word, rows[h, c])
        for g in range(rows[h, fit.NGPU]):
            word = _mixed(_mixed(_mixed(word, gfree[h, g]), vfree[h, g]), nvl[h, g])
        at = np.int64(word & np.uint64(last))
        while table[at] >= 0:
            other = first[table[at]]
            same = True
            for c in _SCORED:
                same = same and rows[h, c] == rows[other, c]
            if same:
                for g in range(rows[h, fit.NGPU]):
                    same = same and gfree[h, g] == gfree[other, g] and vfree[h, g] == vfree[other, g]
                    same = same and nvl[h, g] == nvl[other, g]
            if same:
                break
            at = (at + 1) & last
        if table[at] < 0:
            table[at] = count
            first[count] = h
            count += 1
        group[h] = table[at]
    return count


class Packer:
    """Places requests one replica after another on a copy of `fleet`, by the policy of `tables`.

    `classes`: the distinct request vectors [C, REQUEST_WIDTH]. `steps`: how many placements are expected at most
    (sizes the
    change log; more are only slower). Placements name rows of the state: `host_of(row)` gives the host's index.
    """

    def __init__(
        self, fleet: Fleet, classes: I64, tables: Tables, *, order: I64 | None = None, steps: int = 1024
    ) -> None:
        self.order = order
        self.classes = np.ascontiguousarray(classes.reshape(-1, REQUEST_WIDTH))
        self.tables = tables
        self.state = make_state(fleet, order)
        refresh_all(self.state, tables)
        hosts, count = len(fleet), max(1, len(self.classes))
        blocks = -(-hosts // BLOCK) or 1
        tops = -(-blocks // BLOCK)
        slots = max(1, min(count, TABLE_CELLS // (blocks * BLOCK)))
        group, groups = equal_states(self.state)
        self.cache = Cache(
            tab=np.empty((slots, blocks * BLOCK), np.int32),
            b1=np.empty((slots, tops * BLOCK), np.int32),
            b2=np.empty((slots, tops), np.int32),
            seen=np.zeros(slots, np.int64),
            epoch=np.full(slots, -1, np.int64),
            slot_of=np.full(count, -1, np.int64),
            class_of=np.full(slots, -1, np.int64),
            log=np.empty(max(64, steps) + hosts, np.int32),  # and one for each host: prices change seldom
            changed=np.full(hosts, -1, np.int64),
            group=group,
            memo=np.zeros(max(1, groups), np.int32),
            memo_of=np.zeros(max(1, groups), np.int64),
            meta=np.zeros(META_WIDTH, np.int64),
        )

    def host_of(self, row: int) -> int:
        """Index in the fleet of a state row."""
        return int(self.order[row]) if self.order is not None else row

    def place(self, seq: I32, start: int = 0, stop: I32 | None = None) -> Run:
        """Places one replica of each class in `seq`, in order, from `start` on."""
        run = Run(seq, stop)
        run.end = self.resume(run, start)
        return run

    def resume(self, run: Run, start: int) -> int:
        """Goes on with a run; returns the index after the last replica considered."""
        return int(
            kernels.place_run(
                start,
                run.seq,
                run.stop,
                self.classes,
                self.state,
                self.tables,
                self.cache,
                run.host,
                run.mask,
                run.delta,
            )
        )

    def undo(self, run: Run, start: int, end: int) -> None:
        """Takes back the replicas [start, end) of a run."""
        kernels.undo_run(start, end, run.seq, self.classes, self.state, self.tables, self.cache, run.host, run.mask)

    def take(self, row: int, k: int, mask: int) -> int:
        """Books one replica of class k on a row; returns W."""
        delta = int(take(row, self.classes[k], mask, self.state))
        self.touched(row)
        return delta

    def give(self, row: int, vector: I64, mask: int) -> int:
        """Gives back what a placement of this vector holds on a row; returns W."""
        delta = int(give(row, vector, mask, self.state))
        self.touched(row)
        return delta

    def touched(self, row: int) -> None:
        """Tells the table that a row changed."""
        kernels.note_change(row, self.state, self.tables, self.cache)

    def watts_returned(self) -> None:
        """Tells the table that budgets grew, or that holds changed: every class looks at every host again."""
        self.cache.meta[kernels.META_EPOCH] += 1


class Run:
    """A sequence of replicas (class numbers) and where each went: row (-1 none), GPU mask, W added."""

    def __init__(self, seq: I32, stop: I32 | None = None) -> None:
        self.seq = np.ascontiguousarray(seq, np.int32)
        self.stop = np.zeros(len(seq), np.uint8) if stop is None else np.ascontiguousarray(stop, np.uint8)
        self.host = np.full(len(seq), -1, np.int32)
        self.mask = np.zeros(len(seq), np.int32)
        self.delta = np.zeros(len(seq), np.int32)
        self.end = 0


def classes_of(requests: Sequence[Request], owners: frozenset[int] = frozenset()) -> tuple[I64, I32]:
    """Distinct request vectors [C, REQUEST_WIDTH] in order of appearance, and the class of each request [R].

    `owners`: organizations that some host is reserved for; requests of all others share their classes.
    """
    index: dict[tuple[int, ...], int] = {}
    of = np.empty(len(requests), np.int32)
    vectors: list[I64] = []
    for i, r in enumerate(requests):
        key = (
            r.pool,
            r.site,
            r.models,
            r.cpu,
            r.ram,
            r.nvme,
            r.gpus,
            r.gpu_milli,
            r.vram,
            r.org if r.org in owners else 0,
            r.topology.nvlink,
            r.tolerates,
            r.until,
            r.stays,
        )
        k = index.get(key)
        if k is None:
            k = index[key] = len(vectors)
            vector = request_vector(r)
            vector[fit.Q_ORG] = key[9]
            vectors.append(vector)
        of[i] = k
    return (np.array(vectors, np.int64) if vectors else np.zeros((0, REQUEST_WIDTH), np.int64)), of


def bits(mask: int) -> tuple[int, ...]:
    """Indices of the set bits, ascending."""
    return _BITS[mask & 255] if mask < 256 else tuple(i for i in range(16) if mask >> i & 1)


_BITS: Final = [tuple(i for i in range(8) if mask >> i & 1) for mask in range(256)]
