"""What a soak came to, for people: each fault with what was done about it, and the verdict with its seed."""

from __future__ import annotations

from collections import Counter, defaultdict

from sandbox.soak.grounds import OWN
from sandbox.soak.soak import Outcome

QUIET = {"turns", "jobs", "sleeps", *OWN}  # of the last three each place is named


def lines(outcome: Outcome) -> list[str]:
    out = [f"power soak of seed {outcome.seed}: {outcome.hours:.1f} hours at the site in {outcome.seconds:.0f} s"]
    out += [f"  {n:>8,}  {what}" for what, n in sorted(outcome.counts.items())]
    out.append("\nfaults, and what was done while they lasted")
    by_row: dict[str, Counter[str]] = defaultdict(Counter)
    for fault in outcome.faults:
        seconds = int((fault.until - fault.began).total_seconds())
        done = ", ".join(f"{n} {what}" for what, n in fault.done.items() if what not in QUIET) or "nothing was needed"
        seen = "" if fault.struck else " (never to be seen)"
        out.append(f"  {fault.began:%d %T} {seconds:>6} s  {fault.row}: {fault.what}{seen}: {done}")
        by_row[fault.row]["times"] += 1
    out.append("\nrows of the failure table")
    out += [f"  {n['times']:>5}  {row}" for row, n in sorted(by_row.items())]
    if outcome.missing:
        out.append(f"\n{len(outcome.missing)} ROWS PROVE NOTHING (a longer run, or something is broken)")
        out += [f"  {words}" for words in outcome.missing]
    if not outcome.violations:
        back = int(outcome.back_in.total_seconds()) if outcome.back_in is not None else 0
        out.append(f"\n0 violations in {outcome.counts['turns']:,} turns; all was back {back} s after the last fault")
        return out
    out.append(
        f"\n{len(outcome.violations)} VIOLATIONS; again: make soak-power ARGS='--seed {outcome.seed} --hours {outcome.hours + 1:.0f}'"
    )
    return out + [f"  {words}" for words in outcome.violations[:12]]
