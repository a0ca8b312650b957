"""The power ledger's part of the auditor: what a host may draw, and what stands at every node (design/power.md, once more)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Rows = Callable[[str], list[Row]]
# Per mille of a node's cap that are kept free, by its metering.
SHARES = {"meter": 20, "firmware": 80, "nameplate": 150}


def host_w(h: Row, granted: list[Row]) -> int:
    """W that a host may draw with these placements on it (design/power.md: reserved(host))."""
    if not h["cap_control"]:
        return int(h["base_w"] + h["gpu_count"] * h["gpu_max_w"])
    if not granted:
        return int(h["standby_w"] if h["power_state"] == "off" else h["parked_w"])
    if h["call_gpu_w"] is not None:  # held lower for a call: what it was told; whether it obeys says the site itself
        return int(h["base_w"] + sum(h["desired_limits_w"]))
    active = len({i for p in granted for i in p["gpu_indices"]})
    return int(h["base_w"] + active * h["gpu_max_w"] + (h["gpu_count"] - active) * h["gpu_min_w"])


class Nodes:
    """Remembers what stood at the last look."""

    def __init__(self) -> None:
        self.limits: dict[int, tuple[int | None, int]] = {}  # a node's limit and margin, W
        self.granted_mw: dict[int, int] = {}

    def look(self, hosts: dict[int, Row], rows: Rows) -> list[str]:
        """The invariant of design/power.md at every node: what devices below may draw, overhead, fixed watts and margin, under the cap.

        A miner's silence books its nameplate, whatever is free: that part is left out of the promise, not out of the books; and so is
        what a meter sees and nobody admits to, which widens the margin beyond its share of the cap. A limit may
        be crossed while the site ramps down to it, but nothing is granted over it, nor over a margin that was as wide at the last audit.
        """
        found = []
        nodes = {n["id"]: n for n in rows("SELECT * FROM marketplace_powernode")}
        booked: dict[int, int] = defaultdict(int)
        proved: dict[int, int] = defaultdict(int)
        granted: dict[int, int] = defaultdict(int)

        def climb(pk: int | None, column: str, watts: int, sure: int, *, host: bool) -> None:
            while pk is not None:
                k = nodes[pk][column]
                booked[pk] += watts * k
                proved[pk] += sure * k
                granted[pk] += watts * k if host else 0
                pk = nodes[pk]["parent_id"]

        for h in hosts.values():
            climb(h["power_node_id"], "overhead_gpu_permille", h["reserved_w"], h["reserved_w"], host=True)
        for m in rows("SELECT * FROM marketplace_miner"):
            sure = max(m["commanded_w"], m["confirmed_w"])
            if m["reserved_w"] < sure:
                found.append(
                    f"miner {m['id']} has {m['reserved_w']} W booked, was told {m['commanded_w']}, last proved {m['confirmed_w']}"
                )
            climb(
                m["power_node_id"], "overhead_miner_permille", m["reserved_w"], min(sure, m["reserved_w"]), host=False
            )
        for pk, n in nodes.items():
            share = min(n["margin_w"], -(-n["cap_w"] * SHARES[n["metering"]] // 1000))
            cap = 1000 * (n["cap_w"] - n["fixed_w"] - share)
            if n["reserved_mw"] != booked[pk]:
                found.append(f"node {n['name']} says {n['reserved_mw']} mW booked, its devices have {booked[pk]}")
            if proved[pk] > cap:
                found.append(f"node {n['name']} has {proved[pk]} mW sold of {cap}")
            most = n["cap_w"] if n["limit_w"] is None else min(n["cap_w"], n["limit_w"])
            limit = 1000 * (most - n["fixed_w"] - n["margin_w"])
            same = self.limits.get(pk) == (n["limit_w"], n["margin_w"])
            if same and granted[pk] > self.granted_mw.get(pk, 0) and booked[pk] > limit:
                found.append(f"node {n['name']} granted hosts watts while {booked[pk]} mW are booked of {limit}")
            self.limits[pk], self.granted_mw[pk] = (n["limit_w"], n["margin_w"]), granted[pk]
        return found
