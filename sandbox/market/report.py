"""What a run came to, for people: events, promises, money, occupancy, and the verdict with its seed."""

from __future__ import annotations

from collections import Counter

from sandbox.market.market import Outcome

SUMS = {"GPU-hours": "contracts", "cents credited": "offers"}  # promises that are counted in amounts, and to whom


def lines(outcome: Outcome) -> list[str]:
    out = [f"market of seed {outcome.seed}, {outcome.days:g} days, scale {outcome.scale}: {outcome.seconds:.0f} s"]
    out.append("\nevents")
    out += [f"  {n:>8,}  {what}" for what, n in sorted(outcome.counts.items())]
    out.append("\npromises")
    for promise, fates in sorted(outcome.promises.items()):
        if to := next((whom for words, whom in SUMS.items() if words in promise), ""):
            out.append(f"  {promise}: {sum(fates.values()):,} to {len(fates)} {to}")
            continue
        out.append(f"  {promise}: " + ", ".join(f"{n:,} {fate}" for fate, n in _ordered(fates)))
    out.append("\nmoney (cents where nothing else is said)")
    out += [f"  {n:>14,}  {what}" for what, n in outcome.money.items()]
    out.append(
        "\noccupancy, mean over the audits: "
        + ", ".join(f"{share:.0%} {what}" for what, share in outcome.occupancy.items())
    )
    if not outcome.violations:
        out.append(f"\n0 violations in {outcome.counts['audits']:,} audits")
        return out
    out.append(f"\n{len(outcome.violations)} VIOLATIONS; again: make sim-market ARGS='{_options(outcome)}'")
    out += [f"  day {day}, {at:%F %T}: {words}" for day, at, words in outcome.violations[:12]]
    return out


def _options(outcome: Outcome) -> str:
    return f"--seed {outcome.seed} --days {outcome.days:g} --scale {outcome.scale}"


def _ordered(fates: Counter[str]) -> list[tuple[str, int]]:
    order = ["made", "kept", "compensated"]
    shown = Counter({"broken": 0}) if "kept" in fates else Counter()
    shown.update(fates)
    return sorted(
        shown.items(), key=lambda each: (order.index(each[0]) if each[0] in order else 9, each[0] != "broken", each[0])
    )
