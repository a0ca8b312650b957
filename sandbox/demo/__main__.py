"""`python -m sandbox.demo seed --house DIR --site-port P` and `python -m sandbox.demo traffic --house DIR`."""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.demo", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    seed = actions.add_parser("seed", help="make the demo market where it is not there yet")
    seed.add_argument("--house", type=Path, required=True)
    seed.add_argument("--site-port", type=int, required=True)
    traffic = actions.add_parser("traffic", help="use it, step by step, and say what happens")
    traffic.add_argument("--house", type=Path, required=True)
    traffic.add_argument("--rounds", type=int, default=0, help="stop after so many rounds (0: go on)")
    options = parser.parse_args()
    if options.action == "seed":
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
        import django

        django.setup()
        from sandbox.demo.seed import seed as plant

        print(plant(options.house, options.site_port))
        return 0
    from sandbox.demo.traffic import watch

    return watch(options.house, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main())
