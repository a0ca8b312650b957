"""Which driver speaks to a machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from agent.miners import MinerDriver
from agent.miners.luxos import LuxosMiner

LUXOS, ASIC_RS = "luxos", "asic-rs"
ADAPTERS = (LUXOS, ASIC_RS)
PACKAGE = "pyasic-rs==0.8.6"  # exactly: its API changes between minor versions


def missing(driver: str) -> str:
    """What has to be installed for a driver; "" when it is there."""
    return PACKAGE if driver == ASIC_RS and importlib.util.find_spec("pyasic_rs") is None else ""


def driver_of(row: Mapping[str, Any], *, default: str = LUXOS, timeout_s: float = 4.0) -> MinerDriver:
    """The driver that a machine's row names, or the default. Raises ValueError for one that nobody knows, and ImportError where
    it is not installed (`missing`).
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
