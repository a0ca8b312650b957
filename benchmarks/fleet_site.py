"""A simulated fleet in a process of its own, as a site would be: machines on the wire, meters at the PDUs, and the truth for the judge."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.harness import require
from sandbox.miners import Fleet, FleetServer
from sandbox.site.spec import MINER_MODELS

MODEL = "S21"
PER_PDU = 150
RAMP_S = 3.0
STEP_S = 0.1
METER_NOISE = 0.003


def machines(count: int) -> list[dict[str, Any]]:
    """Miner rows, PDU by PDU. 127.64.0.1 and following: a /10 has room for all of them."""
    return [
        {
            "name": f"m{i:05d}",
            "model": MODEL,
            "power_node": f"pdu-{i // PER_PDU:03d}",
            "driver": "luxos",
            "address": f"127.{64 + i // 62_500}.{i // 250 % 250}.{i % 250 + 1}",
            "modes": MINER_MODELS[MODEL],
        }
        for i in range(count)
    ]


class FleetSite:
    """`with FleetSite(rows) as site:` serves the rows; their addresses then name the port."""

    def __init__(self, rows: list[dict[str, Any]], seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.rows, self.seed), daemon=True)
        self.process.start()
        require(self.pipe.poll(60), "the simulated fleet did not start")
        port = self.pipe.recv()
        for row in self.rows:
            row["address"] = f"{row['address']}:{port}"
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.pipe.send(("stop", None))
        self.process.join(10)

    def _ask(self, what: str, value: Any = None) -> Any:
        self.pipe.send((what, value))
        require(self.pipe.poll(30), f"the simulated fleet does not answer: {what}")
        return self.pipe.recv()

    async def meters(self) -> tuple[float, list[int]]:
        """(epoch seconds, W of each PDU in the order of the rows)."""
        found: tuple[float, list[int]] = await asyncio.to_thread(self._ask, "meters")
        return found

    async def truth(self) -> dict[str, Any]:
        """`watts` drawn, `asleep` as the firmware has it, `commands` answered and `connections` taken."""
        found: dict[str, Any] = await asyncio.to_thread(self._ask, "truth")
        return found

    async def break_down(self, faults: dict[str, str]) -> None:
        """Machine -> fault, as sandbox.miners names them."""
        await asyncio.to_thread(self._ask, "faults", faults)


def _serve(pipe: Connection, rows: list[dict[str, Any]], seed: int) -> None:
    asyncio.run(_run(pipe, rows, seed))


async def _run(pipe: Connection, rows: list[dict[str, Any]], seed: int) -> None:
    fleet = Fleet(rows, seed=seed, down_s=RAMP_S)
    server = FleetServer(fleet, 0)
    await server.start()
    rng = np.random.default_rng(seed)
    pdu = np.arange(len(rows)) // PER_PDU
    done = asyncio.Event()

    def answer() -> None:
        what, value = pipe.recv()
        if what == "stop":
            done.set()
        elif what == "meters":
            watts = np.bincount(pdu, fleet.true_w)
            pipe.send((time.time(), np.rint(watts * (1 + rng.normal(0, METER_NOISE, len(watts)))).astype(int).tolist()))
        elif what == "faults":
            for name, fault in value.items():
                fleet.set_fault(name, fault)
            pipe.send(None)
        else:
            pipe.send(
                {
                    "watts": fleet.true_w.copy(),
                    "asleep": fleet.asleep.copy(),
                    "commands": fleet.commands,
                    "connections": server.accepted,
                }
            )

    asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
    pipe.send(server.port)
    last = time.monotonic()
    while not done.is_set():
        try:
            async with asyncio.timeout(STEP_S):
                await done.wait()
        except TimeoutError:
            pass
        now = time.monotonic()
        fleet.step(now - last)
        last = now
    await server.stop()
