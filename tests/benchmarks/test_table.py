"""The README's table says what the committed results say, and every result says what its benchmark promises to."""

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks import harness, table

pytestmark = pytest.mark.serverless
# The contract: what `figures` of each benchmark holds. `--quick` keeps the keys.
FIGURES = {
    "packing": {
        "fgd_abs_error_points", "worst_gain_points", "mean_gain_points", "refused_fitting", "multi_gpu_drops_vs_fgd",
        "online_mix_cost_points", "default_at_130",
    },
    "churn": {"unallocated_ratio_vs_fgd", "big_job_wait_ratio", "moves_per_arrival"},
    "decisions": {"per_s_1213", "per_s_10k", "per_s_100k", "p99_us_10k"},
    "gang": {"ms"},
    "commit": {"placements_per_s", "share_of_raw_sql"},
    "latency": {"p50_ms", "p99_ms"},
    "snapshot": {"cold_s", "refresh_ms", "rss_mib"},
    "philly": {"queueing_delay_vs_easy", "worst_fair_share", "utilisation_vs_easy", "promise_misses"},
    "windows": {"windows_late", "promise_misses", "admitted"},
    "safety": {"runs", "violations"},
    "dispatch": {"ms_20k", "ms_200k", "gap_pct"},
    "fleet": {"sleep_2000_s", "sleep_20000_s", "false_confirms"},
    "year": {
        "share_of_perfect_foresight", "economic_power_used", "over_cap_instants", "hashing_share_of_bound", "over_ai_only",
        "over_all_hashing",
    },
    "curtail": {"seconds_to_15mw", "firm_jobs_touched", "over_cap_instants"},
    "usage": {"records_per_s", "share_of_copy"},
    "ledger": {"transactions_per_s", "postings_20k_s"},
    "close": {"seconds_10k_accounts", "rss_mib", "doubled_or_lost"},
    "search": {"p50_ms", "p99_ms", "cold_ms", "offers_shown"},
    "quote": {"p99_ms", "p50_ms"},
}  # fmt: skip
HERE = {"date": "2026-11-02", "cpus": 2, "python": "3.11.9", "machine": "x86_64", "processor": "Some CPU", "load": 1.5}


def result(name, figures, must, peer=None, **conditions):
    return {"name": name, "figures": figures, "peer": peer or {}, "conditions": {**HERE, **conditions, "must": must}}


def cells(text, begins):
    """The cells of the only row that begins so."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {begins}")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_readme_is_what_the_committed_results_say():
    between = table.README.read_text().partition(f"{table.BEGIN}\n")[2].partition(table.END)[0]
    assert between == table.render(table.results()), "run `python -m benchmarks table` and commit README.md"


def test_every_benchmark_has_its_lines_and_every_line_a_figure():
    assert set(harness.names()) == set(table.SHOWN) == set(FIGURES), (
        "a benchmark wants its lines in benchmarks/table.py"
    )
    for name, lines in table.SHOWN.items():
        assert {line.figure for line in lines} <= FIGURES[name], name


@pytest.mark.parametrize("name", sorted(table.results()))
def test_a_committed_result_is_its_benchmarks(name):
    found = table.results()[name]
    assert found["name"] == name
    assert set(found["figures"]) == FIGURES[name]
    assert set(found["conditions"]["must"]) <= FIGURES[name]
    assert HERE.keys() <= found["conditions"].keys()


def test_what_is_short_is_explained():
    sections = set(re.findall(r"^## (\w+)$", (table.ROOT / table.EXPLAINED).read_text(), flags=re.MULTILINE))
    missed = {name for name, found in table.results().items() if table.short(name, found)}
    assert missed <= sections, f"{table.EXPLAINED} says nothing about these"
    assert sections <= set(table.SHOWN)


def test_a_row_says_what_was_seen_beside_its_bar_and_its_peer():
    text = table.render(
        {
            "gang": result("gang", {"ms": 1.234}, {"ms": ["<=", 2.0]}, {"plain_python_ms": 1500.0}),
            "churn": result(
                "churn",
                {"unallocated_ratio_vs_fgd": 0.94, "big_job_wait_ratio": 0.37, "moves_per_arrival": 0.024},
                {"unallocated_ratio_vs_fgd": ["<=", 0.6], "big_job_wait_ratio": ["<=", 0.5]},
                {"fgd_unallocated": 0.043, "ours_unallocated": 0.040, "bound_unallocated": 0.034},
                quick=True, date="2026-11-04",
            ),
        }
    )  # fmt: skip
    assert cells(text, "a gang")[1:] == ["1.23 ms", "≤ 2.00 ms", "met", "plain Python 1,500 ms", "`gang`"]
    assert cells(text, "GPUs idle")[1:] == [
        "0.94 (quick)", "≤ 0.60", "[short](docs/measured.md#churn)", "FGD 4.3%, ours 4.0%, LP bound 3.4% idle", "`churn`",
    ]  # fmt: skip
    assert cells(text, "waiting of jobs of 8")[1:] == ["0.37 (quick)", "≤ 0.50", "met", "", ""]
    assert cells(text, "moves")[1:] == ["0.024 (quick)", "", "", "", ""]  # the result names no bar for it
    assert "seen on 2 cores (Some CPU), Python 3.11.9, 2026-11-02 to 2026-11-04, at loads of 1.5 to 1.5" in text


def test_machines_are_told_apart():
    figures, must = {"p99_ms": 20.0, "p50_ms": 5.0}, {"p99_ms": ["<=", 50]}
    runs = {"quote": result("quote", figures, must, {"commit_p50_ms": 1.0})}
    runs["gang"] = result("gang", {"ms": 1.0}, {}, {"plain_python_ms": 9.0}, cpus=16)
    last = table.render(runs).splitlines()[-2:]
    assert [line.partition(": seen on ")[0] for line in last] == ["`gang`", "`quote`"]


def test_results_may_be_absent_or_few(tmp_path: Path):
    assert table.results(tmp_path / "nowhere") == {}
    text = table.render({})
    assert [line.count("not yet run") for line in text.splitlines() if line.endswith("` |")] == [1] * len(table.SHOWN)
    (tmp_path / "gang.json").write_text(
        json.dumps(result("gang", {"ms": 3.0}, {"ms": ["<=", 2]}, {"plain_python_ms": 9}))
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nwhat stood\n{table.END}\nafter\n")
    assert table.write(readme, tmp_path)
    assert not table.write(readme, tmp_path), "writing again changes nothing"
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "what stood" not in text
    assert cells(text, "a gang")[3] == "[short](docs/measured.md#gang)"
    assert text.count("not yet run") == len(table.SHOWN) - 1


def test_a_peer_that_could_not_run_is_named():
    text = table.render({"dispatch": result("dispatch", {"ms_20k": 9.0, "ms_200k": 90.0, "gap_pct": 0.001}, {})})
    assert cells(text, "a whole dispatch")[4] == "not run: highs_lp_ms"


@pytest.mark.parametrize("name", sorted(table.results()))
def test_a_committed_result_has_every_peer_that_its_lines_show(name):
    found = table.results()[name]
    for line in table.SHOWN[name]:
        beside = table.beside_it(line, found["peer"])
        assert bool(beside) == bool(line.beside)
        assert not beside.startswith("not run"), f"{line.figure}: {beside}; the run has {sorted(found['peer'])}"
    for value in (*found["figures"].values(), *found["peer"].values()):
        assert isinstance(value, int | float)
        assert math.isfinite(value)
    for key, value in found["conditions"].items():
        assert value is not None, key
        assert value not in ("", [], {}), key


def test_a_readme_without_marks_is_left_alone(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("no marks\n")
    with pytest.raises(ValueError, match="put both lines"):
        table.write(readme, tmp_path)
    assert readme.read_text() == "no marks\n"


def test_what_a_report_writes_is_what_the_table_reads():
    rows, runs = [["gang", "ms"], ["whole cell", "1.0"]], [{"gang": "whole cell", "seed": 3, "ms": 1.0}]
    report = harness.Report(
        "gang", {"ms": 1.0}, {"plain_python_ms": 9.0}, {"quick": False}, {"ms": ("<=", 2.0)}, rows, runs
    )
    written = json.loads(report.as_json())
    assert written["name"] == "gang"
    assert HERE.keys() <= written["conditions"].keys()
    assert (written["table"], written["runs"]) == (rows, runs), "what the figures are made of is kept"
    assert cells(table.render({"gang": written}), "a gang")[1:4] == ["1.00 ms", "≤ 2.00 ms", "met"]
