"""`python -m sandbox.miners`: a fleet by itself."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time

from sandbox.miners import Fleet, FleetServer
from sandbox.site.spec import miner


async def serve(count: int, port: int, seed: int, speed: float) -> None:
    fleet = Fleet([miner(i, "S21", "pdu-1", port, 10) for i in range(count)], seed=seed, speed=speed)
    server = FleetServer(fleet, port)
    await server.start()
    print(f"{count} miners on 127.10.0.1:{server.port} and following", flush=True)
    last = time.monotonic()
    while True:
        await asyncio.sleep(0.25)
        now = time.monotonic()
        fleet.step(now - last)
        last = now


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.miners", description="simulated LuxOS miners on loopback")
    parser.add_argument("--port", type=int, default=4028)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speed", type=float, default=1.0)
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(args.count, args.port, args.seed, args.speed))


if __name__ == "__main__":
    main()
