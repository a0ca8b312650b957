"""`python -m sandbox.site --spec FILE --port P --record FILE`: a simulated site, a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from sandbox.site.server import SiteServer
from sandbox.site.uplink import Uplink


async def serve(server: SiteServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    print(f"site {server.spec['name']}: {server.httpd.url}, miners on port {server.miners.port}", flush=True)
    await stop.wait()
    await server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.site", description="a simulated site with its own physics")
    parser.add_argument("--spec", type=Path, required=True, help="JSON file; see python -m sandbox.site.spec")
    parser.add_argument("--port", type=int, default=0, help="HTTP port on loopback; 0 takes a free one")
    parser.add_argument("--record", type=Path, help="the truth is written here every 10 s and at the end")
    parser.add_argument("--speed", type=float, default=1.0, help="factor for ramps, boots and cooling; not for work")
    parser.add_argument("--uplink", help="host:port of the control plane, forwarded through a line that can be cut")
    parser.add_argument("--uplink-port", type=int, default=0)
    args = parser.parse_args()
    try:
        spec = json.loads(args.spec.read_text())
    except (OSError, ValueError) as error:
        print(f"site specification {args.spec}: {error}", file=sys.stderr)
        return 2
    uplink = Uplink(args.uplink, args.uplink_port) if args.uplink else None
    try:
        asyncio.run(serve(SiteServer(spec, port=args.port, speed=args.speed, record=args.record, uplink=uplink)))
    except OSError as error:
        print(f"simulated site {spec.get('name')}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
