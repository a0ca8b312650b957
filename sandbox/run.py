"""`make run`: the whole company on this machine, with a demo market, until Ctrl-C. `python -m sandbox.run --help` for ports."""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from sandbox import processes
from sandbox.processes import Ports
from sandbox.servers import Cluster, Problem, children, folders
from sandbox.supervisor import Supervisor, run_once, say_to_terminal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.run", description="The whole company on this machine.")
    parser.add_argument("--data", default="run", metavar="NAME", help="the data folder (default: run)")
    parser.add_argument(
        "--port", type=int, default=8000, help="the web's port; the other ports follow it (default: 8000)"
    )
    parser.add_argument("--reset", action="store_true", help="forget the data of NAME and end")
    options = parser.parse_args(arguments)
    try:
        return _forget(options.data) if options.reset else _run(options.data, Ports.based_on(options.port))
    except Problem as problem:
        say_to_terminal(str(problem))
        return problem.exit_code
    except KeyboardInterrupt:
        return 130


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def house_of(name: str) -> Path:
    """The folder of what is not PostgreSQL's: secrets, logs, Stripe's and the agents' state. Made if absent."""
    database = folders.named(name)
    house = database.with_name(database.name + ".house")
    house.mkdir(mode=0o700, parents=True, exist_ok=True)
    return house


def _take(house: Path, stack: ExitStack) -> None:
    lock = stack.enter_context((house / "lock").open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise Problem(
            f"`make run` is already running (process {lock.read().strip() or 'unknown'}). Stop it with Ctrl-C there, or run "
            f"another beside it: {sys.executable} -m sandbox.run --data other --port 8100"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _forget(name: str) -> int:
    with ExitStack() as stack:
        house = house_of(name)
        _take(house, stack)
        there = folders.reset(name) or (house / "secrets.json").exists()
        shutil.rmtree(house)
    print("The data of `make run` is forgotten." if there else "There is no data of `make run`.")
    return 0


def _run(name: str, at: Ports) -> int:
    began = time.monotonic()
    children.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with ExitStack() as stack:
        house = house_of(name)
        _take(house, stack)
        logs = house / "logs"
        logs.mkdir(exist_ok=True)
        servers, cluster = _servers(name, stack)
        env = processes.environment(at, house, servers)
        # The ports first: nobody should wait for a migration to learn of a busy port.
        Supervisor(processes.table(at, house, env), env, logs, say=say_to_terminal).check()
        say_to_terminal("bringing the database up to date")
        owner = env | {"DATABASE_URL": env.get("DATABASE_OWNER_URL", env["DATABASE_URL"])}
        run_once("migrate", processes.migrate(), owner, logs / "migrate.log")
        say_to_terminal("looking after the demo market")
        words = run_once("the demo seed", processes.seed(at, house), env, logs / "seed.log")
        spare = cluster.pids() if cluster else []
        supervisor = Supervisor(processes.table(at, house, env), env, logs, say=say_to_terminal)
        supervisor.check()
        try:
            supervisor.start_all()
            say_to_terminal(f"ready after {time.monotonic() - began:.0f} s; logs are in {logs}; Ctrl-C ends everything")
            print(words.rstrip(), flush=True)
            while True:
                supervisor.watch(spare)
                if cluster and (sentence := cluster.stopped()):
                    raise Problem(sentence)
                time.sleep(0.25)
        except KeyboardInterrupt:
            say_to_terminal("stopping")
            return 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it behind
            supervisor.stop_all(spare=spare)


def _servers(name: str, stack: ExitStack) -> tuple[dict[str, str], Cluster | None]:
    """The caller's own PostgreSQL and Redis where both are given by the environment, else embedded ones."""
    if os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL"):
        say_to_terminal("using the PostgreSQL of DATABASE_URL and the Redis of REDIS_URL")
        return {}, None
    say_to_terminal("starting PostgreSQL and Redis")
    cluster = stack.enter_context(Cluster(name))
    if cluster.note:
        say_to_terminal(cluster.note)
    return cluster.environment(), cluster


if __name__ == "__main__":
    sys.exit(main())
