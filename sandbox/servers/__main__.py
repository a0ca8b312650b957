"""`python -m sandbox.servers run [--data NAME] [--unsafe-fast] [--owner] -- CMD...` and `... reset NAME`."""

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from sandbox.servers import Cluster, Problem, children, folders


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox.servers", description="PostgreSQL and Redis for one command."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="start both, run CMD with DATABASE_URL and REDIS_URL, stop both")
    run.add_argument("--data", metavar="NAME", help="keep the data in this named folder (default: throw-away)")
    run.add_argument("--unsafe-fast", action="store_true", help="no fsync: for tests on throw-away data")
    run.add_argument("--owner", action="store_true", help="DATABASE_URL is the owner's role (migrations, tests)")
    run.add_argument("--postgres-port", type=int, metavar="PORT", help="default: a free one")
    run.add_argument("--redis-port", type=int, metavar="PORT", help="default: a free one")
    run.add_argument("command", nargs="+", metavar="CMD", help="after --")
    forget = actions.add_parser("reset", help="forget a named data folder")
    forget.add_argument("name")
    options = parser.parse_args(arguments)
    try:
        if options.action == "reset":
            there = folders.reset(options.name)
            print(f"The data of {options.name!r} is forgotten." if there else f"There is no data of {options.name!r}.")
            return 0
        return _run(options)
    except Problem as problem:
        print(f"servers: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> int:
    children.adopt_orphans()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    with Cluster(
        options.data,
        postgres_port=options.postgres_port,
        redis_port=options.redis_port,
        unsafe_fast=options.unsafe_fast,
    ) as cluster:
        if cluster.note:
            print(f"servers: {cluster.note}", file=sys.stderr)
        return _command(options.command, cluster, as_owner=options.owner)


def _command(command: list[str], cluster: Cluster, *, as_owner: bool) -> int:
    environment = os.environ | cluster.environment(as_owner=as_owner)
    asked: list[int] = []

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        asked.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, pass_on)
    try:
        # In our own process group, so that it keeps the terminal (a debugger's prompt works).
        child = children.start(command, env=environment, own_session=False)
    except (FileNotFoundError, PermissionError) as error:
        raise Problem(f"Cannot run {command[0]!r}: {error.strerror}.") from None
    code = _watch(child, cluster, asked)
    children.end_descendants(spare=cluster.pids())
    return code


def _watch(child: subprocess.Popen[bytes], cluster: Cluster, asked: list[int]) -> int:
    kill_at = float("inf")
    handled = 0
    while True:
        try:
            code = child.wait(0.2)
        except subprocess.TimeoutExpired:
            children.bury({child.pid, *cluster.pids()})
        else:
            return code if code >= 0 else 128 - code
        while handled < len(asked):
            signum = asked[handled]
            handled += 1
            # Ctrl-C at a terminal has reached the child already: a second one would mean "at once" to it.
            if not (signum == signal.SIGINT and _at_terminal()):
                child.send_signal(signum)
            kill_at = min(kill_at, time.monotonic() + 30)
        if kill_at == float("inf") and (sentence := cluster.stopped()):
            print(f"servers: {sentence}; stopping {child.args!r}", file=sys.stderr)
            child.terminate()
            kill_at = time.monotonic() + 10
        if time.monotonic() > kill_at:
            child.kill()


def _at_terminal() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
