"""`python -m benchmarks NAME [--json] [--quick] [--trace-dir DIR] [--traces a,b] [--seeds 42,43]`; NAME `all` runs every one, each
in a process of its own; NAME `table` writes the README's table anew from the results that stand.

Exit status: 0 done; 1 the work did not happen, or was not right (`harness.WRONGS`: oversold, refused, lost, doubled); 2 a bound
was missed (only with --strict).
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import table
from benchmarks.harness import Options, Report, WorkNotDoneError, names

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".numba"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="One claim each, beside its peer.")
    parser.add_argument("name", choices=[*names(), "all", "table"])
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--quick", action="store_true", help="smaller: ends within 50 s, same keys")
    parser.add_argument("--strict", action="store_true", help="exit 2 when a bound is missed")
    parser.add_argument("--trace-dir")
    parser.add_argument("--traces", default="", help="comma-separated pod lists")
    parser.add_argument("--seeds", default="", help="comma-separated seeds")
    parser.add_argument("--weights", default="", help="packing: weights of the score, as hole=4,open_host=250")
    parser.add_argument("--ablation", action="store_true", help="packing: each weight left out once, too")
    parser.add_argument("--out", help="folder for NAME.json")
    given = parser.parse_args(argv)
    if given.name == "table":
        print("README.md: written anew" if table.write() else "README.md: was up to date")
        return 0
    if given.name == "all":
        return _all(sys.argv[1:] if argv is None else argv)
    options = Options(
        given.quick,
        given.trace_dir,
        tuple(filter(None, given.traces.split(","))),
        tuple(int(s) for s in given.seeds.split(",") if s),
        tuple((name, float(value)) for name, _, value in (w.partition("=") for w in given.weights.split(",") if w)),
        given.ablation,
    )
    print(f"== {given.name}", flush=True)
    try:
        report: Report = importlib.import_module(f"benchmarks.{given.name}").run(options)
    except WorkNotDoneError as error:
        print(f"{given.name}: the work did not happen: {error}", file=sys.stderr)
        return 1
    report.conditions["quick"] = given.quick
    report.show()
    if report.missed():
        print(f"missed: {', '.join(report.missed())}")
    if given.out:
        Path(given.out).mkdir(parents=True, exist_ok=True)
        (Path(given.out) / f"{given.name}.json").write_text(report.as_json() + "\n")
    if given.json:
        print(report.as_json(), flush=True)
    if wrong := report.wrong():
        print(f"{given.name}: the work was not right: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 2 if report.missed() and given.strict else 0


def _all(argv: list[str]) -> int:
    """One after the other; a process each, so that none measures what another left in memory or in the settings."""
    at = argv.index("all")
    worst = 0
    for name in names():
        done = subprocess.run([sys.executable, "-m", "benchmarks", *argv[:at], name, *argv[at + 1 :]], check=False)
        worst = worst or done.returncode
    return worst


if __name__ == "__main__":
    sys.exit(main())
