"""The one fit rule: does this shape go on this host now, on which GPUs, and what does it add in watts.

Two forms of the same rule, compared by a property test: `fit_kernels.fit_kernel` (numba, rows of the planner's state) and
`fits_one` (plain ints: the twin that tests and benchmarks hold beside it). Stages are tested in the order of FIT_STAGES;
the first that fails is the answer. The GPU choice is deterministic:
    shares: an active device before an idle one (it costs no activation watts), then the least free, then the lowest index;
    whole devices: the smallest NVLink domain with enough idle devices (if asked for), then the lowest indices.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from scheduler.core.types import (
    BLOCKING,
    FOREVER,
    MAX_GPUS,
    NO_NODE,
    WHOLE,
    Fleet,
    HostFlag,
    Kind,
    Policy,
    Reason,
    Request,
)

_SCHEDULABLE: Final = int(HostFlag.SCHEDULABLE)
_OFF: Final = int(HostFlag.OFF)
_BLOCKING: Final = BLOCKING


class HostRow(NamedTuple):
    """A host as plain ints (columns of `Fleet`); `gpu_free`, `vram_free`, `nvlink` have at least `gpu_count`
    entries.
    """

    cpu_free: int
    ram_free: int
    nvme_free: int
    gpu_model: int
    gpu_count: int
    gpu_free: Sequence[int]
    vram_free: Sequence[int]
    nvlink: Sequence[int]
    gpu_active: int
    cpu_only: int
    pool: int
    site: int
    owner: int
    flags: int
    standby_w: int
    parked_w: int
    base_w: int
    gpu_min_w: int
    gpu_max_w: int
    cap_control: bool
    taints: int = 0
    leaves: int = 0
    vram_total: int = 0
    claimed_at: int = 0
    claimed_gpus: int = 0
    owed_cpu: int = 0
    owed_ram: int = 0
    owed_nvme: int = 0


class Fit(NamedTuple):
    """Answer of the fit rule. `gpus` and `watts_delta` (W) hold when `reason` is OK; `node` is what binds for
    NO_WATTS.
    """

    reason: Reason
    gpus: tuple[int, ...] = ()
    watts_delta: int = 0
    node: int = NO_NODE


class Budget(NamedTuple):
    """An ancestor power node of the host: overhead per mille, and the mW still admissible (free + reclaimable)."""

    node: int
    k_permille: int
    budget_mw: int


def host_row(fleet: Fleet, host: int) -> HostRow:
    """The row of `host` out of the columns."""

    def at(name: str) -> int:
        return int(getattr(fleet, name)[host])

    return HostRow(
        cpu_free=at("cpu_free"),
        ram_free=at("ram_free"),
        nvme_free=at("nvme_free"),
        gpu_model=at("gpu_model"),
        gpu_count=at("gpu_count"),
        gpu_free=fleet.gpu_free[host].tolist(),
        vram_free=fleet.vram_free[host].tolist(),
        nvlink=fleet.nvlink[host].tolist(),
        gpu_active=at("gpu_active"),
        cpu_only=at("cpu_only"),
        pool=at("pool"),
        site=at("site"),
        owner=at("owner"),
        flags=at("flags"),
        standby_w=at("standby_w"),
        parked_w=at("parked_w"),
        base_w=at("base_w"),
        gpu_min_w=at("gpu_min_w"),
        gpu_max_w=at("gpu_max_w"),
        cap_control=bool(fleet.cap_control[host]),
        taints=at("taints"),
        leaves=at("leaves"),
        vram_total=at("vram_total"),
        claimed_at=at("claimed_at"),
        claimed_gpus=at("claimed_gpus"),
        owed_cpu=at("owed_cpu"),
        owed_ram=at("owed_ram"),
        owed_nvme=at("owed_nvme"),
    )


def rounded_end(now_s: int, duration_s: int, deadlines: Sequence[int], lag_s: int = 0) -> int:
    """`Request.until`: the first of the ascending `deadlines` of hosts that leave at or after which the job has ended, FOREVER
    for a job that names no length or outlasts them all, 0 where no host leaves. `lag_s`: `Policy.lag_s`, by which it may end
    later than its length from now.

    Rounded up, so that jobs of different lengths share a class wherever the difference decides nothing.
    """
    if not deadlines:
        return 0
    at = bisect_left(deadlines, now_s + lag_s + duration_s) if duration_s else len(deadlines)
    return deadlines[at] if at < len(deadlines) else FOREVER


def bounds(
    request: Request, now_s: int, leaves: Sequence[int], claims: Sequence[int], policy: Policy
) -> tuple[int, int]:
    """(`until`, `stays`) of a request that begins now, by the ascending hours of hosts that leave and of reservations that begin.

    Spot gives way when a reservation begins, so it stands on anybody's GPUs until then: it is only kept from those whose hour
    has come. Any other job without a length is taken to stand for `Policy.unknown_s`.
    """
    until = rounded_end(now_s, request.duration_s, leaves, policy.lag_s)
    if not claims:
        return until, 0
    if request.kind == Kind.SPOT:
        return until, now_s + 1
    return until, rounded_end(now_s, request.duration_s or policy.unknown_s, claims, policy.lag_s)


def deadlines(fleet: Fleet) -> tuple[list[int], list[int]]:
    """The ascending hours at which hosts leave, and at which reservations begin."""
    leaves, claims = (np.unique(column[column > 0]).tolist() for column in (fleet.leaves, fleet.claimed_at))
    return leaves, claims


def host_watts(host: HostRow, gpu_active: int, cpu_only: int) -> int:
    """Reserved W of the host with these GPUs active (bit mask) and so many CPU-only placements (rule in `types`)."""
    if not host.cap_control:
        return host.base_w + host.gpu_count * host.gpu_max_w
    active = gpu_active.bit_count()
    if active == 0 and cpu_only == 0:
        return host.standby_w if host.flags & _OFF else host.parked_w
    return host.base_w + active * host.gpu_max_w + (host.gpu_count - active) * host.gpu_min_w


def vram_of(vram: int, gpu_milli: int, total: int) -> int:
    """MiB that a request for `vram` of `gpu_milli` holds of a GPU that has `total`: a share that names none, the same share."""
    return vram if vram or gpu_milli >= WHOLE else total * gpu_milli // WHOLE


def request_error(request: Request) -> str:
    """What is wrong with the request itself, or ''."""
    if request.replicas < 1:
        return "replicas must be at least 1"
    if not 0 <= request.gpus <= MAX_GPUS:
        return f"gpus must be 0..{MAX_GPUS} a replica"
    if min(request.cpu, request.ram, request.nvme, request.vram) < 0:
        return "amounts must not be negative"
    if request.gpus and not 1 <= request.gpu_milli <= WHOLE:
        return f"gpu_milli must be 1..{WHOLE}"
    if request.gpu_milli != WHOLE and request.gpus > 1:
        return "a share is of one GPU: gpus must be 1"
    if not 0 <= request.models < 1 << 63:
        return "models: GPU model ids are 0..62"
    return ""


def choose_gpus(host: HostRow, request: Request) -> tuple[Reason, tuple[int, ...]]:
    """Which GPUs of the host the request gets, or the reason why none (NO_GPU, NO_GPU_SHARE, NO_VRAM, TOPOLOGY, RESERVED_SOON)."""
    reason, gpus = _choose(host, request, 0)
    if reason or not stands_too_long(host, request):
        return reason, gpus
    if owed_short(host, request):
        return Reason.RESERVED_SOON, ()
    reason, gpus = _choose(host, request, host.claimed_gpus)
    return (Reason.RESERVED_SOON, ()) if reason else (Reason.OK, gpus)


def stands_too_long(host: HostRow, request: Request) -> bool:
    """Whether it may still stand when some of the host's GPUs are claimed."""
    return 0 < host.claimed_at < request.stays


def owed_short(host: HostRow, request: Request) -> bool:
    """Whether CPU, RAM or NVMe beside the claimed GPUs, and what goes with them, are not enough."""
    return (
        host.cpu_free - max(0, host.owed_cpu) < request.cpu
        or host.ram_free - max(0, host.owed_ram) < request.ram
        or host.nvme_free - max(0, host.owed_nvme) < request.nvme
    )


def _choose(host: HostRow, request: Request, but: int) -> tuple[Reason, tuple[int, ...]]:
    """Without the GPUs of the mask `but`."""
    count, vram = host.gpu_count, vram_of(request.vram, request.gpu_milli, host.vram_total)
    if request.gpus == 0:
        return Reason.OK, ()
    if request.gpu_milli < WHOLE:
        roomy = [i for i in range(count) if host.gpu_free[i] >= request.gpu_milli and not but >> i & 1]
        if not roomy:
            total = sum(host.gpu_free[:count])
            return (Reason.NO_GPU_SHARE if total >= request.gpu_milli else Reason.NO_GPU), ()
        roomy = [i for i in roomy if host.vram_free[i] >= vram]
        if not roomy:
            return Reason.NO_VRAM, ()
        best = min(roomy, key=lambda i: (not host.gpu_active >> i & 1, host.gpu_free[i], i))
        return Reason.OK, (best,)
    idle = [i for i in range(count) if host.gpu_free[i] >= WHOLE and not (host.gpu_active | but) >> i & 1]
    if len(idle) < request.gpus:
        return Reason.NO_GPU, ()
    idle = [i for i in idle if host.vram_free[i] >= vram]
    if len(idle) < request.gpus:
        return Reason.NO_VRAM, ()
    wish = request.topology.nvlink
    if wish and request.gpus > 1:
        domains: dict[int, list[int]] = {}
        for i in idle:
            if host.nvlink[i] >= 0:
                domains.setdefault(host.nvlink[i], []).append(i)
        enough = [d for d in domains.values() if len(d) >= request.gpus]
        if enough:
            return Reason.OK, tuple(min(enough, key=len)[: request.gpus])
        if wish == 2:
            return Reason.TOPOLOGY, ()
    return Reason.OK, tuple(idle[: request.gpus])


def fits_one(
    host: HostRow,
    request: Request,
    budgets: Sequence[Budget],
    gpus: tuple[int, ...] | None = None,
    *,
    held: bool = False,
) -> Fit:
    """One replica of `request` on one host, in plain ints.

    `budgets`: the host's ancestors, lowest first, as they stand now. `gpus`: the indices a plan chose; they are checked
    instead of chosen, and answer NO_GPU, NO_GPU_SHARE, NO_VRAM, TOPOLOGY or RESERVED_SOON when they are no longer free as needed.
    """
    refusal = _refusal(host, request, held)
    if refusal:
        return Fit(refusal)
    if gpus is None:
        reason, gpus = choose_gpus(host, request)
    else:
        reason = _check_gpus(host, request, gpus)
    if reason:
        return Fit(reason)
    after = host.gpu_active
    for i in gpus:
        after |= 1 << i
    delta = host_watts(host, after, host.cpu_only + (not gpus)) - host_watts(host, host.gpu_active, host.cpu_only)
    if delta > 0:
        for node, k_permille, budget_mw in budgets:
            if delta * k_permille > budget_mw:
                return Fit(Reason.NO_WATTS, gpus, delta, node)
    return Fit(Reason.OK, gpus, delta)


def _refusal(host: HostRow, request: Request, held: bool) -> Reason:
    if request.pool and host.pool != request.pool:
        return Reason.NOT_IN_POOL
    if request.site >= 0 and host.site != request.site:
        return Reason.WRONG_SITE
    if request.models and (host.gpu_model < 0 or not request.models >> host.gpu_model & 1):
        return Reason.WRONG_MODEL
    if not host.flags & _SCHEDULABLE or host.flags & _BLOCKING:
        return Reason.HOST_UNSCHEDULABLE
    if host.owner > 0 and host.owner != request.org:
        return Reason.HOST_RESERVED_FOR_OWNER
    if host.taints & ~request.tolerates:
        return Reason.TAINTED
    if host.leaves and request.until > host.leaves:
        return Reason.LEAVES_TOO_SOON
    if held:
        return Reason.HELD_FOR_EARLIER_JOB
    if host.cpu_free < request.cpu:
        return Reason.NO_CPU
    if host.ram_free < request.ram:
        return Reason.NO_RAM
    if host.nvme_free < request.nvme:
        return Reason.NO_NVME
    return Reason.OK


def _check_gpus(host: HostRow, request: Request, gpus: tuple[int, ...]) -> Reason:
    if len(gpus) != request.gpus or len(set(gpus)) != len(gpus) or any(not 0 <= i < host.gpu_count for i in gpus):
        return Reason.NO_GPU
    share = request.gpu_milli < WHOLE
    vram = vram_of(request.vram, request.gpu_milli, host.vram_total)
    for i in gpus:
        if host.gpu_free[i] < request.gpu_milli or (not share and host.gpu_active >> i & 1):
            return Reason.NO_GPU_SHARE if share else Reason.NO_GPU
        if host.vram_free[i] < vram:
            return Reason.NO_VRAM
    if len(gpus) > 1 and request.topology.nvlink == 2:
        domains = {host.nvlink[i] for i in gpus}
        if len(domains) > 1 or min(domains) < 0:
            return Reason.TOPOLOGY
    if stands_too_long(host, request):
        claimed = any(host.claimed_gpus >> i & 1 for i in gpus)
        return Reason.RESERVED_SOON if claimed or owed_short(host, request) else Reason.OK
    return Reason.OK
