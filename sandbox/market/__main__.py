"""`python -m sandbox.market [--seed N] [--days N] [--scale N] [--on]`: run inside sandbox.servers, which gives it a database of its own."""

from __future__ import annotations

import argparse
import logging
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="sim-market", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=float, default=90)
    parser.add_argument("--scale", type=int, default=1, help="hosts and customers, in multiples of the smallest market")
    parser.add_argument("--on", action="store_true", help="go on after what is wrong, to find more")
    options = parser.parse_args()
    prepare()
    from sandbox.market import report
    from sandbox.market.market import Market

    def say(words: str) -> None:
        print(words, flush=True)

    outcome = Market(options.seed, days=options.days, scale=options.scale, on=options.on, say=say).run()
    say("\n".join(report.lines(outcome)))
    return 1 if outcome.violations else 0


def prepare() -> None:
    """Django on the database that is given, migrated and empty; faults are counted here, not logged."""
    from sandbox.market.environment import empty, fixed

    fixed()
    import django

    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0, skip_checks=True)
    empty()
    from scheduler.core.warm import warm

    warm()
    logging.disable(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
