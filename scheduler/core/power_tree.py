"""A site's power tree and its books: what a device may draw, what each node holds, and what it can still give.

Units and the invariant: see `power`.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

HOST, MINER = 0, 1  # the two kinds of device; their cooling differs
# How far a node's true draw may stand above its books, per mille of the cap (research/power.md section 6: "Reserve
# margin").
MARGIN_PERMILLE: Mapping[str, int] = {"meter": 20, "firmware": 80, "nameplate": 150}


class PowerError(ValueError):
    """A tree or a number that cannot be: a cycle, an unknown parent, negative watts, an unknown kind of metering."""


def host_reserved_w(
    *,
    gpus: int,
    active_gpus: int,
    standby_w: int,
    parked_w: int,
    base_w: int,
    gpu_min_w: int,
    gpu_max_w: int,
    cap_control: bool,
    powered: bool = True,
    cpu_only: bool = False,
) -> int:
    """Watts to hold for a host, by its power state and never by a measured idle draw.

    `active_gpus`: GPUs in which any placement holds a share. `cpu_only`: a placement without GPUs runs. Without cap
    control always nameplate; off: standby; parked (limits read back at their floor): parked; else everything but GPUs
    at nameplate and each GPU at its limit.
    """
    if not 0 <= active_gpus <= gpus:
        raise PowerError(f"{active_gpus} of {gpus} GPUs active")
    if not cap_control:
        return base_w + gpus * gpu_max_w
    if active_gpus == 0 and not cpu_only:
        return parked_w if powered else standby_w
    return base_w + active_gpus * gpu_max_w + (gpus - active_gpus) * gpu_min_w


def miner_reserved_w(
    commanded_w: int | None,
    confirmed_w: int | None,
    measured_w: int | None,
    measured_age_s: int | None,
    top_mode_w: int,
    *,
    fresh_s: int = 60,
) -> int:
    """Watts to hold for a miner: the most of what it was told, what was last confirmed and what it now draws.

    A wake counts from the command on, a sleep only once confirmed. Never commanded, never confirmed, or no fresh
    reading: it may be drawing full power, so at least the nameplate of its top mode.
    """
    known = [watts for watts in (commanded_w, confirmed_w, measured_w) if watts is not None]
    fresh = measured_w is not None and measured_age_s is not None and 0 <= measured_age_s <= fresh_s
    if commanded_w is None or confirmed_w is None or not fresh:
        known.append(top_mode_w)
    return max(known)


def margin_w(cap_w: int, metering: str, unconfirmed_w: int = 0) -> int:
    """Watts kept free at a node: its metering's share of the cap (rounded up), or the largest unconfirmed group if that
    is more.
    """
    if metering not in MARGIN_PERMILLE:
        raise PowerError(f"metering {metering!r} is none of {', '.join(MARGIN_PERMILLE)}")
    return max(-(-cap_w * MARGIN_PERMILLE[metering] // 1000), unconfirmed_w)


@dataclass(frozen=True)
class NodeSpec:
    """One PowerNode. `limit_w`: what a curtailment leaves of the cap (None: all of it); overheads in per mille by kind
    of device.
    """

    key: Hashable
    parent: Hashable | None
    cap_w: int
    limit_w: int | None = None
    fixed_w: int = 0
    overhead_gpu_permille: int = 1000
    overhead_miner_permille: int = 1000
    metering: str = "meter"


@dataclass(frozen=True)
class PowerTree:
    """A site's nodes as columns, parents first. `paths[n]` = n and its ancestors, upward; `k[n, kind]` = overhead in
    per mille.

    `cap_w` is what the copper carries, `allowed_w` = min(cap, limit) what may be planned.
    """

    keys: tuple[Hashable, ...]
    index: Mapping[Hashable, int]
    parent: Ints
    cap_w: Ints
    allowed_w: Ints
    fixed_w: Ints
    k: Ints
    metering: tuple[str, ...]
    paths: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(specs: Iterable[NodeSpec]) -> "PowerTree":
        """Raises PowerError on a duplicate key, an unknown parent, a cycle, negative watts or an overhead under
        1000.
        """
        given = tuple(specs)
        waiting = {spec.key: spec for spec in given}
        if len(waiting) != len(given):
            raise PowerError("a node key appears twice")
        order: list[NodeSpec] = []
        index: dict[Hashable, int] = {}
        while waiting:
            ready = [spec for spec in waiting.values() if spec.parent is None or spec.parent in index]
            if not ready:
                raise PowerError(f"nodes {sorted(map(str, waiting))}: a parent is missing or the tree is a ring")
            for spec in ready:
                if min(spec.cap_w, spec.fixed_w, spec.limit_w or 0) < 0:
                    raise PowerError(f"node {spec.key!r}: negative watts")
                if min(spec.overhead_gpu_permille, spec.overhead_miner_permille) < 1000:
                    raise PowerError(f"node {spec.key!r}: an overhead under 1000 per mille")
                margin_w(spec.cap_w, spec.metering)
                index[spec.key] = len(order)
                order.append(spec)
                del waiting[spec.key]
        parent = [-1 if spec.parent is None else index[spec.parent] for spec in order]
        paths: list[tuple[int, ...]] = []
        for n, up in enumerate(parent):
            paths.append((n,) if up < 0 else (n, *paths[up]))
        return PowerTree(
            keys=tuple(spec.key for spec in order),
            index=index,
            parent=np.array(parent, np.int64),
            cap_w=np.array([spec.cap_w for spec in order], np.int64),
            allowed_w=np.array(
                [spec.cap_w if spec.limit_w is None else min(spec.cap_w, spec.limit_w) for spec in order], np.int64
            ),
            fixed_w=np.array([spec.fixed_w for spec in order], np.int64),
            k=np.array([(s.overhead_gpu_permille, s.overhead_miner_permille) for s in order], np.int64).reshape(-1, 2),
            metering=tuple(spec.metering for spec in order),
            paths=tuple(paths),
        )

    def under(self, node: int) -> npt.NDArray[np.bool_]:
        """bool[nodes]: the node itself and everything that hangs off it."""
        below = np.zeros(len(self.keys), np.bool_)
        below[node] = True
        for n in range(node + 1, len(self.keys)):  # parents stand before their children
            below[n] = below[n] or (self.parent[n] >= 0 and below[self.parent[n]])
        return below


@dataclass(frozen=True)
class Load:
    """Reserved device watts below each node, by kind: `watts[n, kind]`, before overhead."""

    watts: Ints

    @staticmethod
    def of(tree: PowerTree, nodes: npt.ArrayLike, kinds: npt.ArrayLike, watts: npt.ArrayLike) -> "Load":
        """Devices as columns: position of the node each hangs off, HOST or MINER, reserved watts."""
        slot = 2 * np.asarray(nodes, np.int64) + np.asarray(kinds, np.int64)
        # bincount sums in doubles: exact for integers below 2^53 W.
        flat = np.bincount(slot, weights=np.asarray(watts, np.float64), minlength=2 * len(tree.keys))
        sums = flat.astype(np.int64).reshape(-1, 2)
        for n in range(len(tree.keys) - 1, -1, -1):
            if tree.parent[n] >= 0:
                sums[tree.parent[n]] += sums[n]
        return Load(sums)

    def plus(self, tree: PowerTree, node: int, kind: int, delta_w: int) -> "Load":
        watts = self.watts.copy()
        watts[list(tree.paths[node]), kind] += delta_w
        return Load(watts)


@dataclass(frozen=True)
class Refusal:
    """The first node on the way up that has not enough: what the change needs there and what is free, in mW."""

    node: Hashable
    need_mw: int
    free_mw: int


def reserved_mw(tree: PowerTree, load: Load) -> Ints:
    """What the books hold at each node, overhead included, without its fixed load and margin."""
    total: Ints = (load.watts * tree.k).sum(axis=1)
    return total


def margins_w(tree: PowerTree, groups: Iterable[Iterable[tuple[int, int, int]]] = ()) -> Ints:
    """Margin of every node. `groups`: commands not yet confirmed, each an iterable of (node, kind, watts it may be off
    by).
    """
    worst = np.zeros(len(tree.keys), np.int64)
    for group in groups:
        devices = tuple(group)
        if devices:
            nodes, kinds, watts = zip(*devices, strict=True)
            np.maximum(worst, -(-reserved_mw(tree, Load.of(tree, nodes, kinds, watts)) // 1000), out=worst)
    return np.array(
        [margin_w(int(cap), how, int(off)) for cap, how, off in zip(tree.allowed_w, tree.metering, worst, strict=True)],
        np.int64,
    )


def free_mw(tree: PowerTree, load: Load, margins: Ints, *, physical: bool = False) -> Ints:
    """Headroom of every node in mW; negative where the books are over.

    Against the planned limit, or with `physical` against the cap itself (a curtailment's limit is crossed while it
    ramps, the cap never).
    """
    bound = tree.cap_w if physical else tree.allowed_w
    free: Ints = 1000 * (bound - tree.fixed_w - margins) - reserved_mw(tree, load)
    return free


def admissible(tree: PowerTree, free: Ints, node: int, delta_w: int, kind: int) -> Refusal | None:
    """None when `delta_w` more at `node` keeps every ancestor within its cap; lowering is always admissible."""
    if delta_w <= 0:
        return None
    for n in tree.paths[node]:
        need = delta_w * int(tree.k[n, kind])
        if need > free[n]:
            return Refusal(tree.keys[n], need, int(free[n]))
    return None


def shortfall_mw(tree: PowerTree, free: Ints, node: int, delta_w: int, kind: int) -> Ints:
    """MW that must be freed at each node before `delta_w` more fits at `node`; zero off its path."""
    need = np.zeros(len(tree.keys), np.int64)
    path = list(tree.paths[node])
    need[path] = np.maximum(delta_w * tree.k[path, kind] - free[path], 0)
    return need
