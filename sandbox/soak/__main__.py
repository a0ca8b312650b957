"""`python -m sandbox.soak [--seed N] [--minutes N | --hours N]`: run inside sandbox.servers, which gives it a database of its own."""

from __future__ import annotations

import argparse
import logging
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak-power", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="of this machine's time, at most")
    parser.add_argument(
        "--hours", type=float, help="of the site's time: a run of a seed is then the same on every machine"
    )
    options = parser.parse_args()
    from sandbox.market.__main__ import prepare

    prepare()
    logging.disable(logging.CRITICAL)
    from sandbox.soak import report
    from sandbox.soak.soak import Soak

    def say(words: str) -> None:
        print(words, flush=True)

    minutes = options.minutes if options.hours is None else 24 * 60
    outcome = Soak(options.seed, minutes=minutes, hours=options.hours, whole=True, say=say).run()
    say("\n".join(report.lines(outcome)))
    return 1 if outcome.violations or outcome.missing else 0


if __name__ == "__main__":
    sys.exit(main())
