"""The site's own loop: pure decisions that only ever lower. It needs nothing outside the fence.

Every `decide` looks at fresh meters and the caps that control handed down last. Ladder under a node over its cap: sleep miners
in control's shed order, then GPU limits to their floor, then end placements, each time those whose work gives way first; the next
rung only after a meter reading taken `settle_s` after the last action. At 95 % of a cap wakes stop. A stale meter stops all raising.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SOFT = 0.95
LEASE_END_S = 60.0  # of the site's lease: so long before its end nothing is raised or started any more
TARGET_MARGIN = 0.01  # shed a little below the cap: a meter has noise


@dataclass(frozen=True)
class Node:
    name: str
    parent: str | None
    cap_w: int
    margin_w: int
    miner_permille: int
    gpu_permille: int
    limit_w: int | None = None  # a curtailment's: the site sleeps its machines for it, and leaves jobs to control
    calls: tuple[
        tuple[float, float, int], ...
    ] = ()  # announced ones, (from, until, W): they begin here without control

    @staticmethod
    def of(row: Mapping[str, Any]) -> Node:
        return Node(
            row["name"],
            row.get("parent"),
            int(row["cap_w"]),
            int(row.get("margin_w", 0)),
            int(row.get("overhead_miner_permille", 1000)),
            int(row.get("overhead_gpu_permille", 1000)),
            None if row.get("limit_w") is None else int(row["limit_w"]),
            tuple((float(start), float(end), int(watts)) for start, end, watts in row.get("calls") or ()),
        )

    def bound_w(self, now: float) -> int:
        """The lowest of its cap, the limit that stands, and the calls whose hour it is (epoch seconds)."""
        called = (watts for start, end, watts in self.calls if start <= now < end)
        return min(self.cap_w, self.cap_w if self.limit_w is None else self.limit_w, *called)


@dataclass(frozen=True)
class MinerFacts:
    name: str
    power_node: str
    watts: int  # last reading, or the top of its ladder when there is none
    sleep_w: int
    shed: bool  # asleep, or already told to sleep by this loop
    answers: bool = True  # who does not is told nothing, and frees nothing


@dataclass(frozen=True)
class HostFacts:
    name: str
    power_node: str
    capped: bool  # its limits are at the floor already, or it cannot be capped
    placements: tuple[str, ...]
    gain_w: int = 0  # what its floor would free, by its last reading; 0: nobody knows


@dataclass
class Memory:
    """When this loop last acted under a node (epoch seconds)."""

    acted_at: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    stale: tuple[str, ...] = ()  # metered nodes whose reading is too old
    no_wakes: frozenset[str] = frozenset()  # nodes above SOFT
    over: tuple[str, ...] = ()
    shed: tuple[tuple[str, str], ...] = ()  # (miner, node over its cap)
    cap_hosts: tuple[tuple[str, str], ...] = ()
    evict: tuple[tuple[str, str], ...] = ()  # (placement, node)

    def holds(self, path: Sequence[str]) -> bool:
        """Whether a device may not draw more because one of the nodes that carry it is over its cap. Where nobody knows what
        carries it (`path` is empty), any node over its cap holds it.
        """
        return bool(self.over) and (not path or not set(self.over).isdisjoint(path))

    def blocks(
        self, path: Sequence[str], now: float, *, mode: str, lease_until: float | None, hosts_down: bool = False
    ) -> str:
        """Why nothing that these nodes carry may be raised or started now; "" when it may. `now` and `lease_until` (None: before the
        first sync) in epoch seconds; `hosts_down`: the hosts' management network does not answer.
        """
        if mode != "auto":
            return "waiting_mode"
        if lease_until is None or now >= lease_until - LEASE_END_S:
            return "waiting_control"
        if self.stale:
            return "waiting_meter"
        if hosts_down:
            return "waiting_hosts"
        return "waiting_power" if self.holds(path) else ""

    def stops_wakes(self, path: Sequence[str]) -> bool:
        """Whether one of the nodes that carry a machine stands so near its cap that it is not woken."""
        return not self.no_wakes.isdisjoint(path)


class Tree:
    """Ancestors by node name. A parent that is not known ends the chain."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.nodes = {row["name"]: Node.of(row) for row in rows}
        self.chains: dict[str, tuple[str, ...]] = {}
        for name in self.nodes:
            chain: list[str] = []
            at: str | None = name
            while at is not None and at in self.nodes and at not in chain:
                chain.append(at)
                at = self.nodes[at].parent
            self.chains[name] = tuple(chain)

    def above(self, name: str) -> tuple[str, ...]:
        """The node itself and all above it, nearest first."""
        return self.chains.get(name, ())


def decide(
    tree: Tree,
    shed_order: Sequence[str],
    meters: Mapping[str, tuple[int, float]],
    miners: Mapping[str, MinerFacts],
    hosts: Mapping[str, HostFacts],
    memory: Memory,
    now: float,
    *,
    stale_s: float,
    settle_s: float,
    gives_way: Mapping[str, tuple[int, ...]] | None = None,
) -> Decision:
    """What to lower now. `meters` is node -> (W, measured at); `memory` is updated with what this decides. `gives_way`: placement ->
    its place in control's order, lower first; one without a place goes before all others.
    """
    order = gives_way or {}
    stale = tuple(sorted(name for name, (_, at) in meters.items() if now - at > stale_s))
    no_wakes, over = set(), []
    shed: dict[str, str] = {}
    cap_hosts: list[tuple[str, str]] = []
    evict: list[tuple[str, str]] = []
    # Deepest first: what a PDU sheds also helps the site above it.
    for name in sorted(tree.nodes, key=lambda n: -len(tree.above(n))):
        node, reading = tree.nodes[name], meters.get(name)
        if reading is None or node.cap_w <= 0:
            continue
        watts, at = reading
        bound_w = node.bound_w(now)
        if watts > SOFT * bound_w:
            no_wakes.add(name)
        if watts <= bound_w:
            continue
        over.append(name)
        if at < memory.acted_at.get(name, 0.0) + settle_s:
            continue
        memory.acted_at[name] = now
        excess = watts - (1 - TARGET_MARGIN) * bound_w
        excess -= _freed(tree, node, shed, miners)
        if excess <= 0:
            continue
        chosen = _choose(tree, node, shed_order, miners, shed, excess)
        shed.update(dict.fromkeys(chosen, name))
        if chosen or watts <= node.cap_w:
            continue
        below = [h for h in hosts.values() if name in tree.above(h.power_node)]
        if any(not h.capped for h in below):
            cap_hosts.extend((h, name) for h in _cap(node, below, dict(cap_hosts), order, excess))
        else:
            running = sorted((p for h in below for p in h.placements), key=lambda p: (order.get(p, ()), p))
            evict.extend((p, name) for p in running[: -(-len(running) // 2)])  # last rung, half of them at a time
    return Decision(stale, frozenset(no_wakes), tuple(over), tuple(shed.items()), tuple(cap_hosts), tuple(evict))


def _freed(tree: Tree, node: Node, shed: Mapping[str, str], miners: Mapping[str, MinerFacts]) -> float:
    """W at `node` that the miners chosen so far will free."""
    below = [miners[m] for m in shed if node.name in tree.above(miners[m].power_node)]
    return sum(max(0, m.watts - m.sleep_w) for m in below) * node.miner_permille / 1000


def _cap(
    node: Node,
    below: Sequence[HostFacts],
    chosen: Mapping[str, str],
    order: Mapping[str, tuple[int, ...]],
    excess: float,
) -> list[str]:
    """Hosts to hold at their floor, until `excess` W are freed: idle ones first, then by the last of their work to give way."""

    def key(host: HostFacts) -> tuple[object, ...]:
        places = [order.get(p, ()) for p in host.placements]
        return bool(places), max(places, default=()), host.name

    found = []
    for host in sorted(below, key=key):
        if excess <= 0:
            break
        if host.capped:
            continue
        excess -= host.gain_w * node.gpu_permille / 1000
        if host.name not in chosen:
            found.append(host.name)
    return found


def _choose(
    tree: Tree,
    node: Node,
    shed_order: Sequence[str],
    miners: Mapping[str, MinerFacts],
    shed: Mapping[str, str],
    excess: float,
) -> list[str]:
    """Miners under the node, in control's order and then the rest by watts, until `excess` W are freed."""
    listed = set(shed_order)
    rest = sorted((m for m in miners if m not in listed), key=lambda m: -miners[m].watts)
    chosen: list[str] = []
    for name in (*shed_order, *rest):
        if excess <= 0:
            break
        facts = miners.get(name)
        if (
            facts is None
            or facts.shed
            or not facts.answers
            or name in shed
            or node.name not in tree.above(facts.power_node)
        ):
            continue
        gain = max(0, facts.watts - facts.sleep_w) * node.miner_permille / 1000
        if gain > 0:
            chosen.append(name)
            excess -= gain
    return chosen
