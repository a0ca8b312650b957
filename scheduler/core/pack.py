"""The planner's working copy of a fleet, and the packer that places replicas on it through the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core import kernels
from scheduler.core.fit_kernels import HOST_WIDTH, REQUEST_WIDTH, request_vector
from scheduler.core.kernels import BLOCK, META_WIDTH, Cache
from scheduler.core.score import Tables
from scheduler.core.state import State, give, refresh_all, refresh_host, take
from scheduler.core.types import I32, I64, Fleet, Request

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
)


def make_state(fleet: Fleet, order: I64 | None = None) -> State:
    """A mutable copy of the fleet, hosts permuted by `order` (row i is host order[i])."""
    rows = np.zeros((len(fleet), HOST_WIDTH), np.int64)
    for column, name in _COPY:
        rows[:, column] = getattr(fleet, name)
    rows[:, fit.TOTAL] = fleet.gpu_free.sum(axis=1)
    gfree, vfree, nvl = fleet.gpu_free, fleet.vram_free, fleet.nvlink
    if order is not None:
        rows, gfree, vfree, nvl = rows[order], gfree[order], vfree[order], nvl[order]
    return State(
        rows=np.ascontiguousarray(rows),
        gfree=np.array(gfree, np.int32, order="C"),
        vfree=np.array(vfree, np.int32, order="C"),
        nvl=np.array(nvl, np.int16, order="C"),
        parent=np.ascontiguousarray(fleet.node_parent),
        k=np.ascontiguousarray(fleet.node_k_gpu),
        budget=fleet.node_free_mw + fleet.node_reclaimable_mw,
        frag=np.zeros(len(fleet), np.int64),
        balance=np.zeros(len(fleet), np.float64),
    )


def copy_state(s: State) -> State:
    """A second working copy."""
    return State(*(column.copy() for column in s))  # type: ignore[arg-type]


def equal_states(s: State) -> tuple[I32, int]:
    """Group number of each host (equal in all that the score and the shape stages read), and the number of groups."""
    columns = [fit.CPU, fit.RAM, fit.NVME, fit.MODEL, fit.NGPU, fit.ACTIVE, fit.CPU_ONLY, fit.HELD]
    key = np.concatenate([s.rows[:, columns], s.gfree.astype(np.int64), s.vfree, s.nvl], axis=1).astype(np.uint64)
    # A 64-bit polynomial hash, then exact: groups whose members differ from their first are dissolved.
    prime, word = np.uint64(0x9E3779B97F4A7C15), np.zeros(len(key), np.uint64)
    for j in range(key.shape[1]):
        word = (word ^ key[:, j]) * prime
        word ^= word >> np.uint64(29)
    _, first, group = np.unique(word, return_index=True, return_inverse=True)
    out = group.reshape(-1).astype(np.int32)
    out[np.any(key != key[first[out]], axis=1)] = -1
    return out, len(first)


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
            log=np.empty(max(64, steps), np.int32),
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
        refresh_host(row, self.state, self.tables)
        kernels.note_change(row, self.cache)

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
