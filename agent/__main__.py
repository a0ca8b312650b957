"""`python -m agent enrol` and `python -m agent run`: see docs/agent.md."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from agent import __version__
from agent.config import ConfigError, load
from agent.control import Control, ControlError
from agent.site import Site
from agent.store import StateBusyError, Store, write_private
from agent.supervise import read


async def enrol(url: str, token: str, state: Path, config_path: Path) -> int:
    config = load(config_path)
    if read(str(state / "identity.json")):
        print(f"{state} holds an enrolled agent already; use another folder or remove it first", file=sys.stderr)
        return 2
    control = Control(url, version=__version__)
    try:
        answer = await control.enrol(token, config.name, __version__, config.runtime)
    except ControlError as error:
        if error.kind == "unauthorized":
            print(
                f"the enrolment token is wrong, used or expired: ask the operator for a new one ({error})",
                file=sys.stderr,
            )
            return 3
        print(f"enrolment failed: {error}", file=sys.stderr)
        return 4
    finally:
        await control.close()
    identity = {key: answer[key] for key in ("agent", "key", "site", "site_name", "stream_url") if key in answer}
    write_private(state / "identity.json", identity | {"url": url, "config": str(config_path)})
    where = answer.get("site_name") or answer.get("site")
    print(f"enrolled as {answer['agent']} at {where}; start it with: python -m agent run --state {state}")
    return 0


async def run(state: Path, config_path: Path | None) -> int:
    identity = read(str(state / "identity.json"))
    if not identity:
        print(f"{state} holds no enrolled agent: run `python -m agent enrol` first", file=sys.stderr)
        return 2
    config = load(config_path or Path(identity["config"]))
    store = Store(state)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await Site(config, identity, store).run()
    except asyncio.CancelledError:
        logging.getLogger("agent").info("ended; work that runs goes on under its supervisors")
    finally:
        store.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agent", description="the Tailrace site agent")
    parser.add_argument("--verbose", action="store_true")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("enrol", help="exchange an enrolment token for a key")
    one.add_argument("--url", required=True, help="the control plane, such as https://api.example.com")
    one.add_argument(
        "--token", default=os.environ.get("TAILRACE_ENROLMENT_TOKEN", ""), help="enr_..., or TAILRACE_ENROLMENT_TOKEN"
    )
    one.add_argument("--state", type=Path, required=True, help="folder for key, state, workspaces and logs")
    one.add_argument("--config", type=Path, required=True)
    two = commands.add_parser("run", help="run the enrolled agent")
    two.add_argument("--state", type=Path, required=True)
    two.add_argument("--config", type=Path, help="instead of the file named when it enrolled")
    args = parser.parse_args()
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if args.command == "enrol":
            args.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            return asyncio.run(enrol(args.url, args.token, args.state, args.config.resolve()))
        return asyncio.run(run(args.state, args.config))
    except ConfigError as error:
        print(f"configuration: {error}", file=sys.stderr)
        return 2
    except StateBusyError as error:
        print(str(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
