"""Conservative backfill: a job that waits is promised a start time with hosts held for it, and nothing may move that time later.

A `Hold` is a placement in the future: hosts, GPUs, watts, over [start, end). Its start is the first known end of running work (or
of another hold) found at which the whole job fits, beside every other hold that it would overlap. From then on

- what ends before the first held start goes anywhere: it is gone by then;
- what runs longer goes to hosts that are not held, or on a held host into what is left for all of its run: the least, over the
  starts of the holds that it overlaps, of what is free now, plus what ends by then, less what is held then;
- at every node the watts that holds will need, beyond what ends give back by then, are kept out of the budget.

Why a promise is kept: running work ends no later than its bound (limits are enforced), every placement and every later hold
respects the hold, and the next cycle gets it back (`Request.promised_start`, `promised_hosts`) and books it again, earliest first,
before it looks at anything else. By induction the held hosts are free when the time comes. A hold takes GPUs that are busy now
rather than idle ones, so that work without a limit may use the idle ones meanwhile; which GPUs of a host it is changes nothing,
because intervals that begin in order can always be given devices in that order (interval graphs are perfect). What breaks a
promise is a host that fails or watts that go: then the job gets a new, later one, and the plan counts it (`promises_broken`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from scheduler.core import fit_kernels as fit
from scheduler.core import gang
from scheduler.core.fit_kernels import REQUEST_WIDTH, claimed_kernel, fit_kernel, vram_kernel
from scheduler.core.jit import kernel
from scheduler.core.pack import copy_state
from scheduler.core.preempt import Held
from scheduler.core.state import State, give, take
from scheduler.core.types import FOREVER, I64, MAX_GPUS, WHOLE, Running, Topology


class Hold(NamedTuple):
    """A promised placement: each replica's row and GPU mask over [start, end) in s, and the mW it keeps back at each node [N]."""

    start: int
    end: int
    q: I64
    rows: tuple[int, ...]
    masks: tuple[int, ...]
    keep: I64


@kernel
def end_kernel(order: I64, count: int, row: I64, vector: I64, mask: I64, s: State) -> None:
    """Gives back the placements order[:count]."""
    for i in range(count):
        v = order[i]
        give(row[v], vector[v], mask[v], s)


@kernel
def book_holds_kernel(start: int, end: int, hs: I64, he: I64, hr: I64, hv: I64, hm: I64, own: I64, s: State) -> None:
    """Takes every held replica that overlaps [start, end). Two that overlap it at different times may be more than there is:
    then nothing is left. `own`: 1 for replicas of the hold that is being moved.
    """
    for j in range(len(hs)):
        if hs[j] < end and he[j] > start and not own[j]:
            take(hr[j], hv[j], hm[j], s)
    for j in range(len(hs)):
        h = hr[j]
        s.rows[h, fit.CPU] = max(s.rows[h, fit.CPU], np.int64(0))
        s.rows[h, fit.RAM] = max(s.rows[h, fit.RAM], np.int64(0))
        s.rows[h, fit.NVME] = max(s.rows[h, fit.NVME], np.int64(0))
        for g in range(s.rows[h, fit.NGPU]):
            s.gfree[h, g] = max(s.gfree[h, g], np.int32(0))
            s.vfree[h, g] = max(s.vfree[h, g], np.int32(0))


@kernel
def reduce_kernel(
    rows: I64,
    until: int,
    order: I64,
    et: I64,
    er: I64,
    ev: I64,
    em: I64,
    hs: I64,
    he: I64,
    hr: I64,
    hv: I64,
    hm: I64,
    s: State,
    low: I64,
    at: I64,
) -> None:
    """Cuts the held `rows` down to what work that runs until `until` may take (rule in the module's docstring).

    Scratch: `low` and `at`, [3 + 2 * MAX_GPUS]: CPU, RAM, NVMe, milli-GPU and VRAM of each GPU.
    """
    for h in rows:
        n = s.rows[h, fit.NGPU]
        low[0], low[1], low[2] = s.rows[h, fit.CPU], s.rows[h, fit.RAM], s.rows[h, fit.NVME]
        for g in range(n):
            low[3 + g] = s.gfree[h, g]
            low[19 + g] = s.vfree[h, g]
        for j in range(len(hs)):
            if hr[j] != h or hs[j] >= until:
                continue
            at[0], at[1], at[2] = s.rows[h, fit.CPU], s.rows[h, fit.RAM], s.rows[h, fit.NVME]
            for g in range(n):
                at[3 + g] = s.gfree[h, g]
                at[19 + g] = s.vfree[h, g]
            for i in range(len(order)):
                v = order[i]
                if et[v] > hs[j]:
                    break
                if er[v] == h:
                    at[0] += ev[v, fit.Q_CPU]
                    at[1] += ev[v, fit.Q_RAM]
                    at[2] += ev[v, fit.Q_NVME]
                    for g in range(n):
                        if (em[v] >> g) & 1:
                            at[3 + g] += ev[v, fit.Q_MILLI]
                            at[19 + g] += vram_kernel(s.rows[h], ev[v])
            for k in range(len(hs)):
                if hr[k] == h and hs[k] <= hs[j] < he[k]:
                    at[0] -= hv[k, fit.Q_CPU]
                    at[1] -= hv[k, fit.Q_RAM]
                    at[2] -= hv[k, fit.Q_NVME]
                    for g in range(n):
                        if (hm[k] >> g) & 1:
                            at[3 + g] -= hv[k, fit.Q_MILLI]
                            at[19 + g] -= vram_kernel(s.rows[h], hv[k])
            for c in range(3):
                low[c] = min(low[c], at[c])
            for g in range(n):
                low[3 + g] = min(low[3 + g], at[3 + g])
                low[19 + g] = min(low[19 + g], at[19 + g])
        s.rows[h, fit.CPU] = max(np.int64(0), low[0])
        s.rows[h, fit.RAM] = max(np.int64(0), low[1])
        s.rows[h, fit.NVME] = max(np.int64(0), low[2])
        for g in range(n):
            s.gfree[h, g] = max(np.int64(0), low[3 + g])
            s.vfree[h, g] = max(np.int64(0), low[19 + g])


class Horizon:
    """What is known of the future of a state: when running work ends, and which holds are promised.

    Ends at or before `now`, or unknown (0), never come. Requests are vectors without Q_HOLD. `lag`: `Policy.lag_s`.
    """

    def __init__(
        self, state: State, running: Sequence[Running], held: Held, now: int, lag: int = 0, room: int = 64
    ) -> None:
        self.state, self.now, self.lag = state, now, lag
        size = len(running) + room
        self._time = np.full(size, FOREVER, np.int64)
        self._row, self._mask = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._vector = np.zeros((size, REQUEST_WIDTH), np.int64)
        self._used = len(running)
        if running:
            ends = np.array([r.ends_at for r in running], np.int64)
            self._time[: self._used] = np.where(ends > now, ends, FOREVER)
            self._row[: self._used], self._mask[: self._used] = held.row, held.mask
            self._vector[: self._used] = held.vector
        self._sorted: I64 | None = None
        self.holds: list[Hold] = []
        self._kept = np.zeros_like(state.budget)
        self._low, self._at = np.zeros(3 + 2 * MAX_GPUS, np.int64), np.zeros(3 + 2 * MAX_GPUS, np.int64)
        self._flat()

    # --- what is known
    def add(self, row: int, q: I64, mask: int, duration: int) -> None:
        """A replica placed now that runs for `duration` s at most."""
        if self._used == len(self._time):
            for name in ("_time", "_row", "_mask", "_vector"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        i = self._used
        self._time[i], self._row[i], self._mask[i], self._vector[i] = self.until(self.now, duration), row, mask, q
        self._used += 1
        self._sorted = None

    def left(self, indices: Sequence[int]) -> None:
        """Running placements that were evicted: they give nothing back any more."""
        self._time[list(indices)] = FOREVER
        self._sorted = None

    def overlapped(self, duration: int) -> int:
        """How many holds begin before work of this length ends: with the same number it is free to go to the same places."""
        end = self.until(self.now, duration)
        return sum(h.start < end for h in self.holds)

    def until(self, start: int, duration: int) -> int:
        """When GPUs taken at `start` are back, s; a duration of 0 is unknown."""
        return start + self.lag + duration if duration else FOREVER

    # --- promises
    def earliest(
        self,
        q: I64,
        replicas: int,
        topology: Topology,
        duration: int,
        where: gang.Where | None = None,
        instead: Hold | None = None,
    ) -> Hold | None:
        """The promise that can be made to a gang; None when known ends do not make room for it. With `instead`: an earlier
        one than that, which then goes; None when there is none (one look, as a rule).

        Bisection over the ends: holds make room a little less than monotone in time, so the start is one at which the gang
        fits, and the first one when no hold interferes.
        """
        order = self._order()
        times = np.unique(self._time[order])
        ends = [h.end for h in self.holds if self.now < h.end < FOREVER]
        if ends:
            times = np.unique(np.concatenate([times, np.array(ends, np.int64)]))
        if instead is not None:
            times = times[times < instead.start]
        if not len(times):
            return None
        self._own = np.array([h is instead for h in self.holds for _ in h.rows], np.int64)
        best, low, high = None, 0, 0
        for high in self._latest(times, q, duration):
            best = self._fit(int(times[high]), q, replicas, topology, duration, where)
            if best is not None:
                break
        while best is not None and low < high:
            mid = (low + high) // 2
            found = self._fit(int(times[mid]), q, replicas, topology, duration, where)
            if found is None:
                low = mid + 1
            else:
                best, high = found, mid
        self._own = np.zeros(len(self._hs), np.int64)
        return best

    def _latest(self, times: I64, q: I64, duration: int) -> list[int]:
        """Indices of the starts to try first: the last, and the last from which it ends before each host leaves, or is reserved."""
        latest = [len(times)]
        if (q[fit.Q_UNTIL] or q[fit.Q_STAYS]) and duration:
            hours = np.unique(self.state.rows[:, [fit.LEAVES, fit.CLAIM]])[::-1] - self.lag - duration
            latest += np.searchsorted(times, hours, side="right").tolist()
        return [i - 1 for i in dict.fromkeys(latest) if i]

    def again(
        self, q: I64, rows: Sequence[int], start: int, duration: int, where: gang.Where | None = None
    ) -> Hold | None:
        """The promise of an earlier cycle on the same hosts, or None when they cannot keep it."""
        if any(row < 0 or (where is not None and not where.allowed[row]) for row in rows):
            return None
        start = max(start, self.now)
        q = self._begun(q, start, duration)
        return self._pin(self._trial(start, self.until(start, duration)), q, rows, start, duration)

    def book(self, hold: Hold) -> None:
        """From now on the hold is respected."""
        self.holds.append(hold)
        self._changed()

    def drop(self, hold: Hold) -> None:
        """Forgets a hold: its job starts, or has lost its right to."""
        self.holds = [h for h in self.holds if h is not hold]
        self._changed()

    def beside(
        self, q: I64, replicas: int, topology: Topology, duration: int, where: gang.Where | None = None
    ) -> gang.Gang | None:
        """Books a gang that outlasts held starts into what holds leave it, or None (state as it was)."""
        s = self.state
        rows = np.unique(self._hr)
        saved = s.rows[rows], s.gfree[rows], s.vfree[rows]  # copies: the index is an array
        end = self.until(self.now, duration)
        reduce_kernel(
            rows,
            end,
            self._order(),
            self._time,
            self._row,
            self._vector,
            self._mask,
            self._hs,
            self._he,
            self._hr,
            self._hv,
            self._hm,
            s,
            self._low,
            self._at,
        )
        found = gang.place_gang(s, q, replicas, topology, where)
        if found is not None:
            gang.release_kernel(q, s, found.host, found.mask, replicas)
        s.rows[rows], s.gfree[rows], s.vfree[rows] = saved
        if found is not None:
            for i, (row, mask) in enumerate(zip(found.host.tolist(), found.mask.tolist(), strict=True)):
                found.delta[i] = take(row, q, mask, s)
        return found

    @contextmanager
    def hidden(self, hold: Hold | None) -> Iterator[None]:
        """The state without the mark of one hold, for a look at what else stands in its job's way."""
        others = {row for h in self.holds if h is not hold for row in h.rows}
        own = sorted(set(hold.rows) - others) if hold else []
        self.state.rows[own, fit.HELD] = 0
        yield
        self.state.rows[own, fit.HELD] = 1

    # --- inside
    def _order(self) -> I64:
        """Indices of the known ends, soonest first."""
        if self._sorted is None:
            order = np.argsort(self._time[: self._used], kind="stable")
            self._sorted = order[: int(np.searchsorted(self._time[order], FOREVER))].astype(np.int64)
        return self._sorted

    def _trial(self, start: int, end: int) -> State:
        """The state at `start`, with all that is held at some time of [start, end) taken."""
        trial = copy_state(self.state)
        np.add(trial.budget, self._kept, out=trial.budget)
        order = self._order()
        count = int(np.searchsorted(self._time[order], start, side="right"))
        end_kernel(order, count, self._row, self._vector, self._mask, trial)
        if len(self._hs):
            book_holds_kernel(start, end, self._hs, self._he, self._hr, self._hv, self._hm, self._own, trial)
        return trial

    def _fit(
        self, start: int, q: I64, replicas: int, topology: Topology, duration: int, where: gang.Where | None
    ) -> Hold | None:
        q = self._begun(q, start, duration)
        trial = self._trial(start, self.until(start, duration))
        found = gang.place_gang(trial, q, replicas, topology, where)
        if found is None:
            return None
        gang.release_kernel(q, trial, found.host, found.mask, replicas)
        hold = self._pin(trial, q, found.host.tolist(), start, duration)
        assert hold is not None, "a gang that was just placed fits where it was"
        return hold

    def _begun(self, q: I64, start: int, duration: int) -> I64:
        """The request begun at `start`: no place for it are hosts that leave, and GPUs that are reserved, before its end."""
        q, end = q.copy(), self.until(start, duration)
        lent = q[fit.Q_STAYS] == self.now + 1  # spot gives way, and does not begin where a reservation has begun
        q[fit.Q_UNTIL] = end if q[fit.Q_UNTIL] else 0
        q[fit.Q_STAYS] = (start + 1 if lent else end) if q[fit.Q_STAYS] else 0
        return q

    def _pin(self, trial: State, q: I64, rows: Sequence[int], start: int, duration: int) -> Hold | None:
        """Books replica after replica on these rows of the trial; GPUs that are busy now go first."""
        masks = []
        swap = q[fit.Q_MILLI] == WHOLE and not q[fit.Q_NVLINK]
        for row in rows:
            reason, mask, _, _ = fit_kernel(
                *(trial.rows[row], trial.gfree[row], trial.vfree[row], trial.nvl[row], q),
                *(trial.parent, trial.k, trial.budget),
            )
            if reason:
                return None
            if swap:
                mask = self._late(trial, row, q)
            take(row, q, mask, trial)
            masks.append(int(mask))
        keep = np.maximum(0, self.state.budget + self._kept - trial.budget)
        return Hold(start, self.until(start, duration), q, tuple(map(int, rows)), tuple(masks), keep)

    def _late(self, trial: State, row: int, q: I64) -> int:
        """Its GPUs there, busy ones first. None that is reserved before its end: longer work would be left the ones it needs."""
        active, now_active = int(trial.rows[row, fit.ACTIVE]), int(self.state.rows[row, fit.ACTIVE])
        active |= int(claimed_kernel(trial.rows[row], q))
        idle = [
            g
            for g in range(int(trial.rows[row, fit.NGPU]))
            if trial.gfree[row, g] >= WHOLE and not active >> g & 1 and trial.vfree[row, g] >= q[fit.Q_VRAM]
        ]
        idle.sort(key=lambda g: (not now_active >> g & 1, g))
        return sum(1 << g for g in idle[: int(q[fit.Q_GPUS])])

    def _flat(self) -> None:
        """Holds as columns, one entry a replica."""
        entries = [
            (h.start, h.end, row, mask, i)
            for i, h in enumerate(self.holds)
            for row, mask in zip(h.rows, h.masks, strict=True)
        ]
        table = np.array(entries, np.int64).reshape(-1, 5)
        self._hs, self._he, self._hr, self._hm = (np.ascontiguousarray(table[:, c]) for c in range(4))
        self._own = np.zeros(len(entries), np.int64)
        self._hv = np.zeros((len(entries), REQUEST_WIDTH), np.int64)
        for j, entry in enumerate(entries):
            self._hv[j] = self.holds[entry[4]].q

    def _changed(self) -> None:
        s = self.state
        s.rows[self._hr, fit.HELD] = 0
        self._flat()
        s.rows[self._hr, fit.HELD] = 1
        kept = np.zeros_like(s.budget)
        for hold in self.holds:
            np.maximum(kept, hold.keep, out=kept)
        np.add(s.budget, self._kept - kept, out=s.budget)
        self._kept = kept
