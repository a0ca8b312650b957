"""What the placement core takes and gives: arrays in, plan out.

    from scheduler.core.types import Fleet, Request, Running, Policy, Reason
    from scheduler.core.plan import plan
    from scheduler.core.fit import HostRow, fits_one, choose_gpus, host_watts

    plan(fleet, requests, running, policy=Policy(), seed=0, now_s=0) -> Plan
    fits_one(host: HostRow, request: Request, budgets: [(node, k_permille, budget_mw)], gpus=None) -> Fit(reason, gpus, watts_delta, node)

Units everywhere: CPU milli-cores, RAM and VRAM MiB, NVMe GiB, GPU shares milli-GPU (1000 = a whole device), power W,
node budgets mW, time integer seconds, prices and bids integer millionths of the major unit per GPU-hour.

`Fleet` is one cell as columns (structure of arrays), H hosts x up to 16 GPUs, N power nodes. Host indices in placements
are positions in these columns. `Fleet.build(hosts, nodes)` makes one from lists of dicts (tests, benchmarks); a snapshot fills
the columns with numpy and calls `Fleet(...)`, which checks shapes and dtypes and never copies. A Fleet is read-only to the planner.

Watts of a host with `a` of `n` GPUs active (bit set in `gpu_active`: some placement holds a share of it):
    not cap_control: base_w + n*gpu_max_w, always
    a == 0 and cpu_only == 0: standby_w when HostFlag.OFF is set, else parked_w
    else: base_w + a*gpu_max_w + (n-a)*gpu_min_w
A placement is admitted when at every ancestor node of its host delta_w * node_k_gpu <= node_free_mw + node_reclaimable_mw
(W x per mille = mW, exact). `node_free_mw` is what is admissible now; `node_reclaimable_mw` what putting every sleepable miner
below the node to sleep would give back (hashing only: what evicting spot gives back is found by preemption, exactly).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from scheduler.core.reasons import FIT_STAGES, REASONS, Reason

__all__ = ["FIT_STAGES", "REASONS", "Reason"]  # handed on: with the rest of this module they are the core's words

MAX_GPUS: Final = 16
WHOLE: Final = 1000
NO_NODE: Final = -1

I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


class HostFlag(IntFlag):
    """Bits of `Fleet.flags`. A host takes work when SCHEDULABLE is set and no blocking bit is."""

    SCHEDULABLE = 1
    DRAINING = 2
    MAINTENANCE = 4
    UNREACHABLE = 8
    NO_GRANTS = 16  # its site grants no watts now: stale meter, hold or shed mode, freeze
    OFF = 32  # powered off: draws standby_w until work arrives (not blocking)


BLOCKING: Final = int(HostFlag.DRAINING | HostFlag.MAINTENANCE | HostFlag.UNREACHABLE | HostFlag.NO_GRANTS)


class Kind(IntEnum):
    """Contract kind of a job; a smaller value comes first and survives longer."""

    FIRM = 0  # contract kind `reserved`
    FLEXIBLE = 1
    ON_DEMAND = 2
    SPOT = 3


class Level(IntEnum):
    """A level of the fabric, from the smallest domain up. NVLINK is inside one host, HOST all replicas on one host."""

    NONE = 0
    NVLINK = 1
    HOST = 2
    LEAF = 3
    SPINE = 4
    SITE = 5


@dataclass(frozen=True, slots=True)
class Topology:
    """`pack`: all replicas in one domain of `level`; `required` refuses otherwise, else the smallest domain that fits
    is taken. Required without a level and without a spread: no domain wider than the smallest level at which the empty
    pool could hold the gang.

    `nvlink`: the GPUs of one replica share an NVLink domain (0 no, 1 preferred, 2 required).
    `spread`: the level over which replicas are spread (failure domains), as evenly as room allows; `max_per_domain`
    bounds replicas in each, always (0 = no bound).
    """

    pack: Level = Level.NONE
    required: bool = False
    nvlink: int = 0
    spread: Level = Level.NONE
    max_per_domain: int = 0


ANYWHERE: Final = Topology()
FOREVER: Final = 1 << 62  # seconds: the end of a job that names none


class Tie(NamedTuple):
    """Where some group of jobs stands: `rows` (hosts of the fleet) when the plan begins, and wherever the plan puts requests
    that join `group`. What is near or apart shares, or does not share, a domain of `level` with one of them.
    """

    level: Level
    group: int
    rows: tuple[int, ...] = ()


@dataclass(slots=True)
class Request:
    """One job: `replicas` times the same shape, all or nothing. The planner does not change it.

    `near`, `apart`: every replica stands in a domain with one of the group, or with none of it. `joins`: groups that the
    job itself belongs to. A group that stands nowhere yet does not bind a job of its own: its replicas stay together.
    `members`: hosts where the rest of this gang runs; the request is for the replicas that it lost, and they keep to
    its topology. `until`, `stays`: see `fit.bounds`.
    """

    job: int
    org: int = 0
    kind: Kind = Kind.ON_DEMAND
    priority: int = 0  # larger first
    replicas: int = 1
    pool: int = 0  # listing id; 0 = any
    cpu: int = 0  # milli, per replica
    ram: int = 0  # MiB
    nvme: int = 0  # GiB
    gpus: int = 0
    gpu_milli: int = WHOLE  # of each GPU; below 1000 only with gpus == 1
    vram: int = 0  # MiB held on each GPU; 0 = of a share the same share of the device's (`fit.vram_of`)
    models: int = 0  # bit i = GPU model id i (< 63) is acceptable; 0 = any
    site: int = -1  # -1 = any
    topology: Topology = ANYWHERE
    queued_at: int = 0  # seconds
    weight: int = 1000  # fair-share weight of the org, per mille
    usage: float = 0.0  # decayed dominant usage of the org, in the unit of `Policy.usage_scale`
    quota_id: int = 0  # jobs of one quota (a contract's ceiling) share it; 0 = this job's own
    quota_milli: int = -1  # milli-GPU still free under the quota, -1 = no limit
    price_ok: bool = True
    may_preempt: bool = True
    duration_s: int = 0  # upper bound on the run time, 0 = unknown
    limit_milli: int = -1  # milli-GPU that its organization may still take over all its contracts, -1 = no limit
    price: int = 0  # of work paid by use under an hourly limit: millionths of the major unit per GPU-hour
    rate_left: int = -1  # billionths of it an hour that its organization may still add to what runs, -1 = no limit
    budget_ok: bool = True  # whether its organization's budget of the month lets new work begin
    promised_start: int = 0  # seconds; a start time given earlier and to be kept, 0 = none
    promised_hosts: tuple[int, ...] = ()  # the host held for each replica, as indices of the fleet
    tolerates: int = 0  # bit i = taint i of the cell
    until: int = 0  # seconds by which it has left its hosts, rounded up; 0 = no host of the cell leaves
    stays: int = 0  # seconds until which it may stand on GPUs that are reserved later, rounded up; 0 = none is
    near: tuple[Tie, ...] = ()
    apart: tuple[Tie, ...] = ()
    joins: tuple[int, ...] = ()
    members: tuple[int, ...] = ()

    @property
    def milli(self) -> int:
        """Milli-GPU of all replicas."""
        return self.replicas * self.gpus * self.gpu_milli

    @property
    def tied(self) -> bool:
        """Whether where it may go depends on where other replicas stand."""
        return bool(self.near or self.apart or self.joins or self.members)


@dataclass(slots=True)
class Running:
    """A placement that holds capacity now and may be preempted or is expected to end."""

    placement: int
    job: int
    org: int
    kind: Kind
    host: int
    gpus: tuple[int, ...] = ()
    gpu_milli: int = WHOLE
    cpu: int = 0
    ram: int = 0
    nvme: int = 0
    vram: int = 0  # on each GPU
    bid: int = 0
    priority: int = 0
    work_lost_s: int = 0  # since the last checkpoint
    gang_size: int = 1
    gang_min: int = 0  # replicas that its gang may shrink to (0 = it goes whole)
    ends_at: int = 0  # seconds, 0 = unknown
    quota_id: int = 0  # the ceiling that it counts towards, as `Request.quota_id`
    price: int = 0  # as `Request.price`
    preemptible: bool = True


class Placement(NamedTuple):
    """A replica on a host. `watts_delta`: what the host's reservation grows by (W), given the placements and
    preemptions before it in the plan.
    """

    job: int
    replica: int
    host: int
    gpus: tuple[int, ...]
    gpu_milli: int
    watts_delta: int


class Preemption(NamedTuple):
    """`placement` must leave `host` for `for_job`."""

    placement: int
    job: int
    host: int
    for_job: int


class Decision(NamedTuple):
    """What became of a job and why.

    `stages`: hosts that survive each stage of the fit rule, in its order (only for waiting jobs). `binding`: the reason that
    stopped most of the hosts that came furthest. `node`: the power node that binds, or -1. `short`: by how much the best host
    misses (unit of the binding resource). `change`: the smallest change that would make it fit, in words.
    `earliest_start`: seconds, 0 = not known. `held`: the host (index of the fleet) held for each replica from then on; with it
    the start is a promise, and comes back in the next plan's request as `promised_start` and `promised_hosts`.
    """

    job: int
    placed: bool
    reason: Reason
    stages: tuple[tuple[Reason, int], ...] = ()
    binding: Reason = Reason.OK
    node: int = NO_NODE
    short: int = 0
    fitting_replicas: int = 0
    change: str = ""
    earliest_start: int = 0
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """How the planner decides. `shapes`: the mix to pack for, ((cpu, ram, gpus, gpu_milli, models mask, weight), ...);
    None = the mix of the requests in hand (`score.MixEstimate` learns one over time).
    """

    packer: str = "tailrace"  # or fgd, best_fit
    shapes: tuple[tuple[int, int, int, int, int, int], ...] | None = None
    preemption: bool = True
    backfill_depth: int = 4  # start times promised, and hosts held for them, at any one time
    queue: str = "age"  # order within one organization's queue (or shortest), see core.order
    patience_s: int = 86_400  # waiting so long halves a job's size in that order
    unknown_s: int = 86_400  # run time taken for a job without a limit
    lag_s: int = 0  # most that passes from a placement to its run (miners shed) and from its limit to the GPUs' return
    explain: bool = True
    explain_limit: int = 256  # distinct waiting shapes explained a plan
    usage_scale: float = 1.0


@dataclass(slots=True)
class Plan:
    placements: list[Placement] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)  # in the order in which jobs were considered
    counters: dict[str, int] = field(default_factory=dict)
    broken: list[int] = field(default_factory=list)  # jobs that wait beyond the start they were promised


_LATER: Final = ("taints", "leaves", "claimed_at", "owed_cpu", "owed_ram", "owed_nvme")  # zeros when left out
_WIDE: Final = ("host_id", "cpu_free", "ram_free", "nvme_free", "pool", "owner", *_LATER)
_NARROW: Final = (
    "gpu_model", "gpu_count", "leaf", "spine", "site", "power_node", "flags", "standby_w", "parked_w", "base_w", "gpu_min_w",
    "gpu_max_w", "gpu_active", "cpu_only", "vram_total", "claimed_gpus",
)  # fmt: skip
_HOST_COLUMNS: Final[dict[str, Any]] = {
    **dict.fromkeys(_WIDE, np.int64), **dict.fromkeys(_NARROW, np.int32), "cap_control": np.int8,
}  # fmt: skip
_GPU_COLUMNS: Final[dict[str, Any]] = {"gpu_free": np.int32, "vram_free": np.int32, "nvlink": np.int16}
_NODE_COLUMNS: Final[dict[str, Any]] = {
    "node_parent": np.int32, "node_k_gpu": np.int32, "node_free_mw": np.int64, "node_reclaimable_mw": np.int64,
}  # fmt: skip


@dataclass(slots=True)
class Fleet:
    """One cell. Host columns have shape [H], `gpu_free`, `vram_free` and `nvlink` [H, 16], node columns [N].

    Raises ValueError for a column of another shape or dtype, a GPU beyond `gpu_count` with something free, a host or node
    whose parent is out of range, or a node that stands before its parent would be reached in a cycle.
    """

    host_id: I64
    cpu_free: I64
    ram_free: I64
    nvme_free: I64
    gpu_model: I32  # 0..62, -1 without GPUs
    gpu_count: I32  # 0..16
    gpu_free: I32  # milli, 0 beyond gpu_count and on a GPU that must not be used
    vram_free: I32
    nvlink: I16  # NVLink domain inside the host, -1 none
    leaf: I32
    spine: I32
    site: I32
    pool: I64
    owner: I64  # > 0: only that organization's jobs
    power_node: I32  # lowest node, -1: no power limit known to this cell
    flags: I32
    standby_w: I32
    parked_w: I32
    base_w: I32
    gpu_min_w: I32
    gpu_max_w: I32
    cap_control: npt.NDArray[np.int8]
    gpu_active: I32  # bit i: a placement holds a share of GPU i
    cpu_only: I32  # active placements without a GPU
    node_parent: I32
    node_k_gpu: I32  # per mille
    node_free_mw: I64
    node_reclaimable_mw: I64
    taints: I64 = None  # type: ignore[assignment]  # bit i: only requests that tolerate taint i; none when left out
    leaves: I64 = None  # type: ignore[assignment]  # seconds: what may run longer does not start here; 0 = stays
    vram_total: I32 = None  # type: ignore[assignment]  # MiB of each GPU; left out: the most that is free on one
    # GPUs (bits) that are reserved from that second on (the earliest, where windows differ), and what goes with them of the
    # host, less what stands on them holds: who may stand longer (`Request.stays`) leaves them alone. 0 = none.
    claimed_at: I64 = None  # type: ignore[assignment]
    claimed_gpus: I32 = None  # type: ignore[assignment]
    owed_cpu: I64 = None  # type: ignore[assignment]
    owed_ram: I64 = None  # type: ignore[assignment]
    owed_nvme: I64 = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        hosts = len(self.host_id)
        for name in (*_LATER, "claimed_gpus"):
            if getattr(self, name) is None:
                setattr(self, name, np.zeros(hosts, _HOST_COLUMNS[name]))
        self.vram_total = self.vram_free.max(axis=1) if self.vram_total is None else self.vram_total
        nodes = len(self.node_parent)
        for columns, shape in ((_HOST_COLUMNS, (hosts,)), (_GPU_COLUMNS, (hosts, MAX_GPUS)), (_NODE_COLUMNS, (nodes,))):
            for name, dtype in columns.items():
                column = getattr(self, name)
                if column.shape != shape or column.dtype != dtype:
                    raise ValueError(f"{name}: {column.dtype}{column.shape}, expected {np.dtype(dtype)}{shape}")
        if hosts and (self.gpu_count.min() < 0 or self.gpu_count.max() > MAX_GPUS):
            raise ValueError(f"gpu_count: outside 0..{MAX_GPUS}")
        if hosts and (self.power_node.min() < -1 or self.power_node.max() >= nodes):
            raise ValueError("power_node: not a node of this fleet")
        if hosts and np.any(self.gpu_free[np.arange(MAX_GPUS)[None, :] >= self.gpu_count[:, None]]):
            raise ValueError("gpu_free: something is free on a GPU beyond gpu_count")
        if nodes and (self.node_parent.min() < -1 or self.node_parent.max() >= nodes):
            raise ValueError("node_parent: not a node of this fleet")
        depth = self.node_parent.copy()
        for _ in range(64):
            if not nodes or depth.max() < 0:
                break
            depth = np.where(depth >= 0, self.node_parent[depth], -1).astype(np.int32)
        else:
            raise ValueError("node_parent: a cycle, or deeper than 64")

    def __len__(self) -> int:
        return len(self.host_id)

    @classmethod
    def build(cls, hosts: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]] = ()) -> Fleet:
        """A fleet from dicts (tests, benchmarks).

        Host keys are column names, all optional but `host_id`; `gpus` = count gives whole free devices of `vram` MiB each.
        Node keys: parent, k_gpu, free_mw, reclaimable_mw.
        """
        size, count = len(hosts), len(nodes)
        columns: dict[str, Any] = {name: np.zeros(size, dtype) for name, dtype in _HOST_COLUMNS.items()}
        columns |= {name: np.zeros((size, MAX_GPUS), dtype) for name, dtype in _GPU_COLUMNS.items()}
        columns["power_node"][:] = NO_NODE
        columns["flags"][:] = int(HostFlag.SCHEDULABLE)
        columns["cap_control"][:] = 1
        for i, host in enumerate(hosts):
            row = dict(host)
            gpus, vram = row.pop("gpus", None), row.pop("vram", 0)
            if gpus is not None:
                row = {
                    "gpu_count": gpus,
                    "gpu_free": [WHOLE] * gpus,
                    "vram_free": [vram] * gpus,
                    "vram_total": vram,
                } | row
            for name, value in row.items():
                if name in _GPU_COLUMNS:
                    columns[name][i, : len(value)] = value
                else:
                    columns[name][i] = value
        columns["node_parent"] = np.array([n.get("parent", -1) for n in nodes], np.int32).reshape(count)
        columns["node_k_gpu"] = np.array([n.get("k_gpu", 1000) for n in nodes], np.int32).reshape(count)
        columns["node_free_mw"] = np.array([n.get("free_mw", 0) for n in nodes], np.int64).reshape(count)
        columns["node_reclaimable_mw"] = np.array([n.get("reclaimable_mw", 0) for n in nodes], np.int64).reshape(count)
        return cls(**columns)
