"""What a free remainder is worth: the tables that the score reads, made once per mix of typical shapes.

A mix is a list of shapes with integer weights (how often each is asked for). From its most frequent 95 % (`cut`):
- F, the fragmentation of FGD (Weng et al., ATC'23): free milli-GPU of a host that a shape drawn from the mix cannot
use,
  in exact integers (times the sum of weights). Free capacity splits by (model, CPU rank, share rank), so that one host
  costs one look-up per GPU instead of a loop over shapes.
- Hole prices V[r]: the duals of the cutting-stock LP over the shares of the mix say what one share displaces; V[r] is
the
  best unbounded knapsack of them in a remainder of r milli (0..1000): what the hole is really worth.
- Spec price q[y] of GPU model y: how much of y the shapes that insist on it will want, 0..1.
- Balance: milli-GPU that the free CPU (and memory) of a host could never serve.
From the whole of it, since requests for several GPUs are few and large:
- Slots: how often a request needs z idle GPUs of one host; `state.price_slots` weighs that against what is left.
Weights are in `Weights`; how they were chosen, and what each is good for: `python -m benchmarks packing --ablation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypedDict

import numpy as np

from scheduler.core.types import F64, I16, I64, MAX_GPUS, WHOLE, Fleet, Request

MODELS: Final = 64
TABLE_SCALE: Final = 64  # scores are kept as int32 in 1/64 milli-GPU
GRID: Final = 10  # milli-GPU; holes are priced on this grid


class Shape(NamedTuple):
    """A typical request: per replica, with its weight in the mix. `ram` is the mean of those that share the rest."""

    cpu: int
    ram: float
    gpus: int
    gpu_milli: int
    models: int
    weight: int


class Weights(NamedTuple):
    """Terms of the score in milli-GPU. Each was chosen on seeds 1001..1004 and left out once; `benchmarks/packing.py` says by
    which commands.
    """

    fragmentation: float = 0.4  # per milli-GPU of F: 1.0 counts a hole twice, once here and once in V
    hole: float = 8.0  # per milli-GPU of V: a saleable hole weighs more than its milli, since V changes little a step
    cpu_balance: float = 1.0  # per milli-GPU that CPU can never serve
    memory_balance: float = 0.5  # per milli-GPU that CPU or memory can never serve
    spec: float = 1.0  # per milli-GPU of a model that others insist on
    cpu_scarce: float = 12.0  # x (CPU load - 0.9) more of cpu_balance: near the end CPU is what runs out
    open_host: float = 150.0  # milli-GPU for opening an empty host with a small shape
    slot: float = 600.0  # milli-GPU for a slot of several GPUs that a request will want before the cell is full


DEFAULT_WEIGHTS: Final = Weights()


class Tables(NamedTuple):
    """What the scoring kernels read."""

    cpus: I64  # [K] distinct CPU of the GPU shapes, ascending
    share_rank: I16  # [1001] number of distinct shares <= g
    usable_share: I64  # [MODELS, K+1, shares+1] weight of the shares that fit a GPU with that much free
    usable_whole: I64  # [MODELS, K+1, 17] weight of the whole-GPU shapes that fit that many idle GPUs
    total: int  # sum of weights of all shapes
    hole: F64  # [1001] V[r] x weight
    rho: F64  # [M] milli-GPU per milli-CPU
    sigma: F64  # [M] milli-GPU per MiB
    weight: F64  # [M] w_m, sums to <= 1
    spec: F64  # [MODELS] q_y x weight
    opening: float  # what opening an empty host costs
    slot_size: I64  # [Z] sizes z of requests for several GPUs, ascending
    slot_rate: F64  # [Z] how many z idle GPUs of one host are wanted, for each milli-GPU asked for
    slot_cpu: int  # milli-CPU that each of those GPUs needs
    slot_price: float  # of a slot that is sure to be wanted
    gpu_per_cpu: float  # milli-GPU that the whole mix asks for with each milli-CPU
    w_frag: float
    w_cpu: float
    w_mem: float
    cpu_cap: float  # largest host CPU, milli (best fit)
    gpu_cap: float  # largest host GPU milli (best fit)
    mode: int  # 0 tailrace, 1 fgd, 2 best fit


MODES: Final = {"tailrace": 0, "fgd": 1, "best_fit": 2}


def mix_of(requests: Iterable[tuple[int, int, int, int, int, int]], apart: Sequence[str] = ()) -> list[Shape]:
    """The mix of a list of (cpu, ram, gpus, gpu_milli, models, count), most frequent first.

    Shapes equal but for memory are one, with the mean memory, unless `apart` (a label of each request) tells them apart.
    Ties keep the order of first appearance.
    """
    count: Counter[tuple[int, int, int, int, str]] = Counter()
    ram: Counter[tuple[int, int, int, int, str]] = Counter()
    for i, (cpu, mib, gpus, milli, models, n) in enumerate(requests):
        key = (cpu, gpus, milli if gpus else 0, models if gpus else 0, apart[i] if apart else "")
        count[key] += n
        ram[key] += mib * n
    return [Shape(key[0], ram[key] / n, key[1], key[2], key[3], n) for key, n in count.most_common()]


def cut(mix: Sequence[Shape], coverage: float = 0.95) -> list[Shape]:
    """The typical shapes: the first of a mix, until so much of its weight is covered."""
    need, got, shapes = coverage * sum(s.weight for s in mix), 0, []
    for shape in mix:
        if got >= need:
            break
        got += shape.weight
        shapes.append(shape)
    return shapes


def shapes_of(requests: Iterable[Request]) -> list[Shape]:
    """The mix in a queue."""
    return mix_of((r.cpu, r.ram, r.gpus, r.gpu_milli, r.models, r.replicas) for r in requests)


class MixEstimate:
    """The mix, learned from what arrives: counts that halve every `half_life` replicas seen (0 = never)."""

    def __init__(self, half_life: int = 0) -> None:
        self.half_life = half_life
        self.counts: dict[tuple[int, int, int, int, int], float] = {}
        self.step = 1.0
        self.seen = 0

    def observe(self, cpu: int, ram: int, gpus: int, gpu_milli: int, models: int, replicas: int = 1) -> None:
        """Counts a request. Growing the step instead of shrinking all counts keeps this O(1)."""
        key = (cpu, ram, gpus, gpu_milli, models)
        self.counts[key] = self.counts.get(key, 0.0) + replicas * self.step
        self.seen += replicas
        if self.half_life:
            self.step *= 2.0 ** (replicas / self.half_life)
            if self.step > 1e12:
                self.counts = {k: v / self.step for k, v in self.counts.items() if v / self.step > 1e-9}
                self.step = 1.0

    def shapes(self) -> list[Shape]:
        """The mix now; weights are scaled to integers of 1/1000 replica (1/1 while nothing decays)."""
        scale = 1.0 if not self.half_life else 1000.0 / self.step
        return mix_of((*key, max(1, round(v * scale))) for key, v in self.counts.items())


def hole_prices(demand: dict[int, float]) -> dict[int, float]:
    """What a share of v milli displaces, in milli-GPU: duals x 1000 of the cutting-stock LP for demand {v: weight}.

    min sum_p y_p  s.t.  sum_p a_vp y_p >= d_v,  p the multisets of shares that fit one GPU. Solved by revised simplex
    with
    columns priced by a knapsack (Gilmore and Gomory, 1961); at most a few dozen distinct shares, so dense algebra.
    """
    values = sorted(demand)
    size = len(values)
    if not size:
        return {}
    cells = [-(-v // GRID) for v in values]
    basis = np.diag([float(WHOLE // GRID // c) for c in cells])
    cost = np.ones(size)
    inverse = np.linalg.inv(basis)
    level = inverse @ np.array([demand[v] for v in values])
    duals = cost @ inverse
    for _ in range(200 * size):
        worth, column = _best_pattern(cells, duals)
        price = 1.0
        surplus = int(np.argmin(duals))
        if worth <= 1 + 1e-9:
            if duals[surplus] >= -1e-9:
                break
            column, price = -np.eye(size)[surplus], 0.0
        direction = inverse @ column
        rows = np.flatnonzero(direction > 1e-12)
        ratio = level[rows] / direction[rows]
        leaving = int(rows[np.argmin(ratio)])
        step = level[leaving] / direction[leaving]
        level = level - step * direction
        level[leaving] = step
        basis[:, leaving] = column
        cost[leaving] = price
        inverse = np.linalg.inv(basis)
        duals = cost @ inverse
    return {v: float(max(0.0, d)) * WHOLE for v, d in zip(values, duals, strict=True)}


def _best_pattern(cells: Sequence[int], duals: F64) -> tuple[float, F64]:
    """Unbounded knapsack of the duals in one GPU: its worth and the multiset that gives it."""
    room = WHOLE // GRID
    best = [0.0] * (room + 1)
    choice = [-1] * (room + 1)
    prices = duals.tolist()
    for r in range(1, room + 1):
        best[r] = best[r - 1]
        for i, c in enumerate(cells):
            if c <= r and best[r - c] + prices[i] > best[r] + 1e-12:
                best[r], choice[r] = best[r - c] + prices[i], i
    pattern = np.zeros(len(cells))
    r = room
    while r > 0:
        if choice[r] < 0:
            r -= 1
        else:
            pattern[choice[r]] += 1
            r -= cells[choice[r]]
    return best[room], pattern


def hole_values(prices: dict[int, float]) -> F64:
    """V[r], r = 0..1000: best unbounded knapsack of the prices in r milli, monotone, on the grid (r rounded down)."""
    room = WHOLE // GRID
    best = np.zeros(room + 1)
    for r in range(1, room + 1):
        options = [best[r - 1]]
        options += [best[r - c] + p for v, p in prices.items() if (c := -(-v // GRID)) <= r]
        best[r] = max(options)
    return best[np.arange(WHOLE + 1) // GRID]


def capacity_of(fleet: Fleet) -> F64:
    """GPUs of the cell by model and GPUs a host, shape [MODELS, 17]."""
    width = MAX_GPUS + 1
    cells = np.maximum(fleet.gpu_model, 0) * width + fleet.gpu_count
    return (
        np.bincount(cells, weights=fleet.gpu_count, minlength=MODELS * width).astype(np.float64).reshape(MODELS, width)
    )


def make_tables(
    mix: Sequence[Shape],
    capacity: F64,
    cpu_total: float,
    cpu_cap: float,
    gpu_cap: float,
    packer: str = "tailrace",
    w: Weights = DEFAULT_WEIGHTS,
) -> Tables:
    """Tables of a mix. `capacity`: GPUs by model and host size [MODELS, 17]; `cpu_total`: milli-CPU of the cell; caps: the
    largest host, for best fit.
    """
    shapes = cut(mix)
    with_gpu = [s for s in shapes if s.gpus]
    total = sum(s.weight for s in shapes) or 1
    cpus = np.array(sorted({s.cpu for s in with_gpu}), np.int64)
    shares = np.array(sorted({s.gpu_milli for s in with_gpu if s.gpu_milli < WHOLE}), np.int64)
    usable_share = np.zeros((MODELS, len(cpus) + 1, len(shares) + 1), np.int64)
    usable_whole = np.zeros((MODELS, len(cpus) + 1, MAX_GPUS + 1), np.int64)
    for s in with_gpu:
        ok = np.array([not s.models or bool(s.models >> y & 1) for y in range(MODELS)])
        rank = int(np.searchsorted(cpus, s.cpu)) + 1
        if s.gpu_milli < WHOLE:
            usable_share[ok, rank:, int(np.searchsorted(shares, s.gpu_milli)) + 1 :] += s.weight
        else:
            usable_whole[ok, rank:, s.gpus :] += s.weight
    demand: Counter[int] = Counter()
    for s in with_gpu:
        if s.gpu_milli < WHOLE:
            demand[s.gpu_milli] += s.weight
    prices = hole_prices({v: n / total for v, n in demand.items()})
    milli = np.array([s.gpus * s.gpu_milli for s in with_gpu], np.float64)
    share = np.array([s.weight / total for s in with_gpu])
    asked = float(milli @ share) or 1.0
    cpu_load = sum(s.cpu * s.weight for s in shapes) / total / asked * capacity.sum() * WHOLE / max(1.0, cpu_total)
    return Tables(
        cpus=cpus,
        share_rank=np.searchsorted(shares, np.arange(WHOLE + 1), side="right").astype(np.int16),
        usable_share=usable_share,
        usable_whole=usable_whole,
        total=total,
        hole=hole_values(prices) * w.hole,
        rho=milli / np.maximum(np.array([s.cpu for s in with_gpu], np.float64), 100),
        sigma=milli / np.maximum(np.array([s.ram for s in with_gpu], np.float64), 100),
        weight=share,
        spec=_spec_prices(with_gpu, share, asked, capacity, prices) * w.spec,
        opening=w.open_host,
        **_slots(mix),
        slot_price=w.slot,
        w_frag=w.fragmentation,
        w_cpu=w.cpu_balance * (1.0 + w.cpu_scarce * max(0.0, cpu_load - 0.9)),
        w_mem=w.memory_balance,
        cpu_cap=max(cpu_cap, 1.0),
        gpu_cap=max(gpu_cap, 1.0),
        mode=MODES[packer],
    )


def _spec_prices(shapes: Sequence[Shape], share: F64, asked: float, capacity: F64, prices: dict[int, float]) -> F64:
    """q_y = min(1, demand of the shapes that insist on models, spread over the capacity they accept), shape
    [MODELS].
    """
    arrivals = capacity.sum() * WHOLE / asked  # so many requests ask for the whole capacity
    out = np.zeros(MODELS)
    for s, w in zip(shapes, share, strict=True):
        if not s.models:
            continue
        accepts = np.array([bool(s.models >> y & 1) for y in range(MODELS)])
        room = float(capacity[accepts].sum())
        if room:
            size = s.gpus if s.gpu_milli == WHOLE else prices[s.gpu_milli] / WHOLE
            out[accepts] += arrivals * w * size / room
    return np.minimum(out, 1.0)


class _Slots(TypedDict):
    slot_size: I64
    slot_rate: F64
    slot_cpu: int
    gpu_per_cpu: float


def _slots(mix: Sequence[Shape]) -> _Slots:
    """Who asks for several GPUs of a host, over the whole mix. A slot of 8 serves two requests of 4: those count in both."""
    several = [s for s in mix if 1 < s.gpus <= MAX_GPUS]  # no host has more
    count: Counter[int] = Counter()
    for s in several:
        count[s.gpus] += s.weight
    sizes = sorted(count)
    asked = sum(s.weight * s.gpus * s.gpu_milli for s in mix) or 1
    gpus = sum(s.weight * s.gpus for s in several) or 1
    return {
        "slot_size": np.array(sizes, np.int64),
        "slot_rate": np.array([sum(y // z * count[y] for y in sizes) / asked for z in sizes], np.float64),
        "slot_cpu": max(1, sum(s.weight * s.cpu for s in several) // gpus),
        "gpu_per_cpu": asked / max(1, sum(s.weight * s.cpu for s in mix)),
    }


def tables_for(fleet: Fleet, mix: Sequence[Shape], packer: str, w: Weights = DEFAULT_WEIGHTS) -> Tables:
    """Tables for a fleet and a mix."""
    cpu = float(fleet.cpu_free.max()) if len(fleet) else 1.0
    gpu = float(fleet.gpu_count.max()) * WHOLE if len(fleet) else 1.0
    return make_tables(mix, capacity_of(fleet), float(fleet.cpu_free.sum()), cpu, gpu, packer, w)
