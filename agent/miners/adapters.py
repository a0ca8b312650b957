"""Which driver speaks to a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.miners import MinerDriver
from agent.miners.luxos import LuxosMiner

LUXOS, ASIC_RS = "luxos", "asic-rs"
ADAPTERS = (LUXOS, ASIC_RS)


def driver_of(row: Mapping[str, Any], *, default: str = LUXOS, timeout_s: float = 4.0) -> MinerDriver:
    """The driver that a machine's row names, or the default. Raises ValueError for one that nobody knows, and MissingError
    (docs/agent.md) where the machine needs a package that is not installed.
    """
    host, _, port = str(row["address"]).rpartition(":")
    host = host.strip("[]")
    name = str(row.get("driver") or default)
    if name == LUXOS:
        return LuxosMiner(host, int(port), row["modes"], timeout_s=timeout_s)
    if name == ASIC_RS:
        from agent.miners.asic_rs import AsicRsMiner

        return AsicRsMiner(host, row["modes"], timeout_s=timeout_s)
    raise ValueError(f"miner {row.get('name', host)}: driver {name!r} is not known; known: {', '.join(ADAPTERS)}")
