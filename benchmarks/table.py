"""The README's table of what was measured, written from the results that stand in `benchmarks/results/`.

    python -m benchmarks table

A line shows one figure of a benchmark beside the bound that its result names and what the same run saw of a peer. What misses
its bound leads to docs/measured.md, where the curve, the bound and the experiment stand. A benchmark without a result says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from benchmarks.harness import holds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EXPLAINED = "docs/measured.md"
BEGIN, END = "<!-- measured: written by `python -m benchmarks table` -->", "<!-- end of measured -->"
HEAD = "| what | seen | must be | | beside it, in the same run | NAME |\n|---|--:|--:|---|---|---|"
SIGNS = {"<=": "≤", ">=": "≥"}


@dataclass(frozen=True)
class Line:
    """`figure` in `words`; `shape` formats figure and bound, `beside` the run's peers by their keys."""

    figure: str
    words: str
    shape: str = "{:,.0f}"
    beside: str = ""


SHOWN: dict[str, tuple[Line, ...]] = {
    "packing": (
        Line("mean_gain_points", "GPUs allocated over FGD's at 100 and 130 % demand: mean of 17 lists", "{:+.2f} points",
             "at 130 %: FGD {fgd_at_130:.1f} %, best fit {best_fit_at_130:.1f} %, random {random_at_130:.1f} %, "
             "LP bound {lp_keeping_ours_at_130:.1f} %"),
        Line("worst_gain_points", "the same, on the worst list", "{:+.2f} points"),
        Line("multi_gpu_drops_vs_fgd", "jobs of several GPUs dropped, times FGD's", "{:.2f}"),
        Line("refused_fitting", "jobs refused that would have fitted"),
        Line("online_mix_cost_points", "what learning the mix online costs", "{:.2f} points"),
        Line("fgd_abs_error_points", "our FGD, off the published one at most (nearest of 16 orders of tied shapes)", "{:.2f} points",
             "[with no order chosen](docs/measured.md#packing) {fgd_plain_error_points:.2f} points"),
    ),
    "churn": (
        Line("unallocated_ratio_vs_fgd", "GPUs idle while jobs wait, as jobs come and go: times FGD's", "{:.2f}",
             "FGD {fgd_unallocated:.1%}, ours {ours_unallocated:.1%}, LP bound {bound_unallocated:.1%} idle"),
        Line("big_job_wait_ratio", "waiting of jobs of 8 GPUs, times FGD's: hosts held and cleared, which the "
             "[service does not do](docs/measured.md#churn)", "{:.2f}"),
        Line("moves_per_arrival", "moves of running jobs, an arrival", "{:.3f}"),
    ),
    "decisions": (
        Line(
            "per_s_1213",
            "decisions a second on one thread: 1,213 hosts",
            "{:,.0f}",
            "full scan {full_scan_per_s_1213:,.0f}; OR-Tools CP-SAT, on 16 hosts, {cp_sat_per_s:,.1f}",
        ),
        Line("per_s_10k", "on 10,000 hosts", "{:,.0f}", "full scan {full_scan_per_s_10k:,.0f}"),
        Line("per_s_100k", "on 100,000 hosts", "{:,.0f}", "full scan {full_scan_per_s_100k:,.0f}"),
        Line("p99_us_10k", "one decision, 99th percentile", "{:.0f} µs"),
    ),
    "gang": (
        Line("ms", "a gang of 2,304 replicas onto 2,500 hosts", "{:.2f} ms", "plain Python {plain_python_ms:,.0f} ms"),
    ),
    "commit": (
        Line("placements_per_s", "placements made durable a second, decided by real workers", "{:,.0f}",
             "raw SQL {raw_sql_per_s:,.0f}; {cpu_us_each:,.0f} µs of CPU each"),
        Line("share_of_raw_sql", "share of what raw SQL writes", "{:.2f}"),
    ),
    "latency": (
        Line("p50_ms", "from POST to placed at 100 jobs a second, median", "{:.0f} ms",
             "a repeated POST, answered from what is stored, {empty_write_p50_ms:.0f} ms"),
        Line("p99_ms", "the same, 99th percentile", "{:.0f} ms", "the same, {empty_write_p99_ms:.0f} ms"),
    ),
    "snapshot": (
        Line("cold_s", "a cell of 100,000 hosts read cold", "{:.2f} s", "`COPY` {copy_all_s:.2f} s"),
        Line("refresh_ms", "brought up to date after 1,000 changes", "{:.0f} ms", "`COPY` {copy_1000_ms:.0f} ms"),
        Line("rss_mib", "memory of the process", "{:,.0f} MiB"),
    ),
    "philly": (
        Line("queueing_delay_vs_easy", "queueing on the Philly trace, times EASY backfill's", "{:.2f}",
             "EASY {easy_delay_h:.1f} h, best fit {best_fit_delay_h:.1f} h, FIFO {fifo_delay_h:.1f} h"),
        Line("utilisation_vs_easy", "GPU utilisation, times EASY's", "{:.3f}", "EASY {easy_utilisation:.1%}"),
        Line("worst_fair_share", "the worst tenant's GPU time over its fair share", "{:.2f}", "EASY {easy_fair_share:.3f}"),
        Line("promise_misses", "promised starts missed"),
    ),
    "windows": (
        Line("windows_late", "reserved windows on that trace not begun on their second", "{:,.0f}", "{windows_sold:,.0f} sold"),
        Line("promise_misses", "promised starts missed among them"),
        Line("admitted", "of the GPU time that contracts asked for, sold", "{:.2f}",
             "jobs queue {delay_h:.1f} h, without contracts {delay_without_contracts_h:.1f} h"),
    ),
    "safety": (
        Line("runs", "seeded runs under faults"),
        Line("violations", "GPUs or watts oversold, jobs lost, gangs torn in any of them"),
    ),
    "dispatch": (
        Line("ms_20k", "a whole dispatch plan for 20,000 miners", "{:.1f} ms", "HiGHS {highs_lp_ms:,.0f} ms"),
        Line("ms_200k", "for 200,000 miners", "{:.0f} ms"),
        Line("gap_pct", "what it earns less than the LP optimum", "{:.4f} %"),
    ),
    "fleet": (
        Line("sleep_2000_s", "2,000 miners told to sleep and proved asleep by readings and meters", "{:.1f} s",
             "bare socket writes {bare_2000_s:.1f} s; the ramp alone 3 s"),
        Line("sleep_20000_s", "20,000 miners, the same", "{:.0f} s", "bare socket writes {bare_20000_s:.0f} s"),
        Line("false_confirms", "machines believed asleep that draw, with every fault played"),
    ),
    "curtail": (
        Line("seconds_to_15mw", "a grid call at 40 MW: until its meter is 15 MW down", "{:.1f} s", "the ramp alone {ramp_alone_s:.1f} s"),
        Line("firm_jobs_touched", "jobs of firm contracts touched by it"),
        Line("over_cap_instants", "instants of any node over its cap"),
    ),
    "year": (
        Line("share_of_perfect_foresight", "a year of a mixed site: margin, of what perfect foresight would earn", "{:.3f}",
             "margin in USD: ours {ours_usd:,.0f}, AI only {ai_only_usd:,.0f}, all hashing {all_hashing_usd:,.0f}"),
        Line("economic_power_used", "watts used, of those that pay and the caps leave", "{:.3f}"),
        Line("hashing_share_of_bound", "margin of hashing alone, knowing each hour's prices: share", "{:.3f}"),
        Line("over_cap_instants", "turns at which a node stood over its cap or call"),
    ),
    "usage": (
        Line("records_per_s", "usage records stored a second, constraints on", "{:,.0f}", "raw `COPY` {copy_per_s:,.0f}"),
    ),
    "ledger": (
        Line("transactions_per_s", "ledger transactions a second", "{:,.0f}", "bare inserts {bare_inserts_per_s:,.0f}"),
        Line("postings_20k_s", "one transaction of 20,000 postings", "{:.2f} s"),
    ),
    "close": (
        Line("seconds_10k_accounts", "month close of 10,000 accounts, a worker killed on the way", "{:.0f} s",
             "one SQL aggregate {aggregate_s:.1f} s"),
        Line("doubled_or_lost", "invoices doubled or lost"),
        Line("rss_mib", "memory of a worker", "{:,.0f} MiB"),
    ),
    "search": (
        Line("p50_ms", "a search of 5,000 listings, median", "{:.1f} ms", "its bare SQL {p50_ms:.1f} ms"),
        Line("p99_ms", "the same, 99th percentile", "{:.0f} ms", "its bare SQL {p99_ms:.1f} ms"),
    ),
    "quote": (
        Line("p99_ms", "a firm quote with its hold, 99th percentile", "{:.0f} ms", "its bare rows, median {commit_p50_ms:.1f} ms"),
    ),
}  # fmt: skip


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Name -> result, of those that stand in the folder; none where there is no folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def render(found: dict[str, dict[str, Any]]) -> str:
    """The table and where its figures were seen, as Markdown."""
    rows = [row for name, lines in SHOWN.items() for row in _rows(name, lines, found.get(name))]
    return "\n".join([HEAD, *rows, "", *_seen(found)]) + "\n"


def write(readme: Path = README, folder: Path = RESULTS) -> bool:
    """Rewrites what stands between the marks; True where it was not up to date."""
    before = readme.read_text()
    head, mark, rest = before.partition(BEGIN)
    _, closing, tail = rest.partition(END)
    if not mark or not closing:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}: put both lines where the table shall stand")
    after = f"{head}{BEGIN}\n{render(results(folder))}{END}{tail}"
    readme.write_text(after)
    return after != before


def short(name: str, result: dict[str, Any]) -> list[str]:
    """Figures of a result that are shown and miss their bound."""
    return [line.figure for line in SHOWN[name] if _verdict(name, line.figure, result)[1].startswith("[")]


def beside_it(line: Line, peer: dict[str, float]) -> str:
    """What the run saw of the line's peers. One that could not run (a package or a trace was not there) is named, never left out."""
    wanted = [key for _, key, _, _ in Formatter().parse(line.beside) if key]
    missing = [key for key in wanted if key not in peer]
    return f"not run: {', '.join(missing)}" if missing else line.beside.format_map(peer)


def _rows(name: str, lines: tuple[Line, ...], result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return [f"| {lines[0].words} | not yet run | | | | `{name}` |"]
    quick = " (quick)" if result["conditions"].get("quick") else ""
    rows = []
    for i, line in enumerate(lines):
        bound, verdict = _verdict(name, line.figure, result)
        seen = line.shape.format(result["figures"][line.figure])
        must = f"{SIGNS[bound[0]]} {line.shape.format(bound[1]).lstrip('+')}" if bound else ""
        beside = beside_it(line, result["peer"])
        rows.append(f"| {line.words} | {seen}{quick} | {must} | {verdict} | {beside} | {'' if i else f'`{name}`'} |")
    return rows


def _verdict(name: str, figure: str, result: dict[str, Any]) -> tuple[tuple[str, float] | None, str]:
    """The bound, if the result names one, and whether it is met."""
    bound = result["conditions"].get("must", {}).get(figure)
    if bound is None:
        return None, ""
    how, limit = bound
    return (how, limit), "met" if holds(result["figures"][figure], how, limit) else f"[short]({EXPLAINED}#{name})"


def _seen(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each machine, with the days and, where there are several, the names."""
    if not found:
        return ["No result stands in `benchmarks/results/` yet."]
    at = defaultdict(list)
    for name, result in found.items():
        c = result["conditions"]
        at[f"{c['cpus']} cores ({c.get('processor', c['machine'])}), Python {c['python']}"].append(
            (name, c["date"], c["load"])
        )
    lines = []
    for machine, runs in sorted(at.items()):
        days = sorted({day for _, day, _ in runs})
        loads = [load for _, _, load in runs]
        names = f"{', '.join(f'`{n}`' for n, _, _ in runs)}: " if len(at) > 1 else ""
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(
            f"{names}seen on {machine}, {when}, at loads of {min(loads):.1f} to {max(loads):.1f} (benchmark included)."
        )
    return lines
