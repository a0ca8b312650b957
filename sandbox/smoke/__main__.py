"""`python -m sandbox.smoke [--traces DIR] [--arrivals N]`: exits 0 when every promise held; ends by itself.

TAILRACE_TRACES names the traces; without them the built-in generator is used, and that is said.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from sandbox import processes
from sandbox.processes import Ports
from sandbox.servers import Cluster, Problem, children, ports
from sandbox.smoke import road
from sandbox.smoke.report import BrokenError, Report, say
from sandbox.smoke.work import arrivals
from sandbox.smoke.world import World

LIMIT_S = 900


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.smoke", description=__doc__)
    parser.add_argument("--traces", type=Path, default=None)
    parser.add_argument("--arrivals", type=int, default=2000)
    parser.add_argument("--miners", type=int, default=1000)
    parser.add_argument("--keep", action="store_true", help="leave the logs of a run that held, too")
    options = parser.parse_args()
    children.adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, _end)
    signal.alarm(LIMIT_S)
    house = Path(tempfile.mkdtemp(prefix="tailrace-smoke-"))
    code = 1
    try:
        code = _run(house, options)
    except (BrokenError, Problem, TimeoutError) as broken:
        print(f"BROKEN: {broken}", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        signal.alarm(0)
        if code == 0 and not options.keep:
            shutil.rmtree(house, ignore_errors=True)
        else:
            print(f"logs: {house}", flush=True)
    return code


def _end(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _traces(given: Path | None) -> Path | None:
    named = os.environ.get("TAILRACE_TRACES", "")
    folder = given or (Path(named) if named not in {"", "none"} else None)
    if folder is not None and not (folder / "openb").is_dir():
        raise Problem(f"{folder} holds no openb traces; leave TAILRACE_TRACES unset for the built-in generator.")
    return folder


def _run(house: Path, options: argparse.Namespace) -> int:
    report = Report()
    for name in ("DATABASE_URL", "REDIS_URL", "STRIPE_SECRET_KEY", "STRIPE_BASE_URL"):
        os.environ.pop(name, None)  # the smoke run has servers of its own, always
    at = Ports.free()
    work = arrivals(_traces(options.traces), options.arrivals, miners=options.miners, miner_port=ports.free_port())
    with Cluster() as cluster:
        env = processes.environment(at, house, cluster.environment())
        world = World(house, env, at, say)
        try:
            with report.step("bring the company up") as seen:
                world.start()
                seen.append(f"{len(world.supervisor.running)} processes")
            road.walk(world, report, work, pulse=lambda: world.supervisor.watch(cluster.pids()))
        finally:
            world.supervisor.stop_all(spare=cluster.pids())
    print(f"{report.kept} steps held in {time.monotonic() - report.began:.0f} s", flush=True)
    print(f"{report.kept} passed, 0 failed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
