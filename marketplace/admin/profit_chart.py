"""The chart of a site's profit and loss: what was earned stands above the line, what energy cost below it, the margin is a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from marketplace.admin.charts import round_up

EARNED = (("firm", "AI", "ai"), ("hashing", "Hashing", "hashing"), ("spot", "Demand response", "demand_response"))
SPENT = (
    ("flexible", "Energy of AI", "ai"),
    ("idle_gpu", "Energy of hashing", "hashing"),
    ("overhead", "Energy of the site itself", "energy"),
)
# class, name, kind: outward from the line


@dataclass(frozen=True)
class Slice:
    """Micro-USD in `[start, start + step)`: by EARNED, by SPENT (each may be negative: energy is sometimes paid for)."""

    start: datetime
    earned: tuple[int, ...]
    spent: tuple[int, ...]
    seen: bool

    @property
    def margin(self) -> int:
        return sum(self.earned) - sum(self.spent)


def floor(at: datetime, step: timedelta) -> datetime:
    seconds = int(step.total_seconds())
    return datetime.fromtimestamp(int(at.timestamp()) // seconds * seconds, UTC)


def slices(lines: Sequence[dict[str, Any]], start: datetime, end: datetime, step: timedelta) -> list[Slice]:
    """One for each step, also where nothing is on record."""
    sums: dict[tuple[datetime, str], list[int]] = {}
    for line in lines:
        found = sums.setdefault((floor(line["start"], step), line["kind"]), [0, 0])
        found[0] += line["revenue_microusd"]
        found[1] += line["energy_microusd"]
    out, at = [], start
    while at < end:
        earned = tuple(sums.get((at, kind), (0, 0))[0] for _, _, kind in EARNED)
        spent = tuple(sums.get((at, kind), (0, 0))[1] for _, _, kind in SPENT)
        out.append(Slice(at, earned, spent, any(key[0] == at for key in sums)))
        at += step
    return out


def bars(parts: Sequence[Slice], step_hours: int) -> SafeString:
    """Bars by time with the margin over them, legend and axes; the numbers stand in the table beside."""
    stacks = [_stacked(s) for s in parts]
    high = max(1, *(top for rows in stacks for _, _, top in rows), *(s.margin for s in parts))
    low = min(0, *(bottom for rows in stacks for _, bottom, _ in rows), *(s.margin for s in parts))
    size = round_up(max(high, -low))
    high, low = size, -size if low < -size // 2 else -size // 2 if low else 0
    width = 1000 / len(parts)

    def y(value: int) -> float:
        return 300 * (high - value) / (high - low)

    shapes: dict[str, list[str]] = {}
    for i, rows in enumerate(stacks):
        for css, bottom, top in rows:
            left, right = i * width + width * 0.12, (i + 1) * width - width * 0.12
            shapes.setdefault(css, []).append(f"M{left:.1f} {y(bottom):.1f}H{right:.1f}V{y(top):.1f}H{left:.1f}Z")
    drawn = format_html_join(
        "", '<path class="tr-area tr-{}" d="{}"/>', [(css, "".join(d)) for css, d in shapes.items()]
    )
    margin = " ".join(
        f"{'M' if i == 0 or not parts[i - 1].seen else 'L'}{(i + 0.5) * width:.1f} {y(s.margin):.1f}"
        for i, s in enumerate(parts)
        if s.seen
    )
    zero = format_html('<line class="tr-zero" x1="0" x2="1000" y1="{0}" y2="{0}"/>', f"{y(0):.1f}")
    marks = format_html_join(
        "", '<span style="bottom:{}%">{}</span>', [(25 * i, dollars(low + (high - low) * i // 4)) for i in range(5)]
    )
    shape = "%H:%M" if step_hours < 6 else "%m-%d"
    length = timedelta(hours=step_hours) * len(parts)
    ticks = format_html_join("", "<span>{}</span>", [(f"{parts[0].start + length * i / 6:{shape}}",) for i in range(7)])
    said = f"Revenue above and energy below the line from {parts[0].start:%F %H:%M} UTC, {step_hours} h a bar"
    keys = [(css, name) for css, name, _ in (*EARNED, *SPENT)]
    legend = format_html_join("", '<li><i class="tr-key tr-{}"></i>{}</li>', keys)
    return format_html(
        '<div class="tr-plot"><div class="tr-y" aria-hidden="true">{}</div><svg viewBox="0 0 1000 300" preserveAspectRatio="none" '
        'role="img" aria-label="{}">{}{}<path class="tr-metered" d="{}"/></svg><div class="tr-x" aria-hidden="true">{}</div></div>'
        '<ul class="tr-legend">{}<li><i class="tr-key tr-key-metered"></i>Margin</li></ul>',
        marks, said, drawn, zero, margin, ticks, legend,
    )  # fmt: skip


def dollars(micro: int) -> str:
    """$12.3 k; cents where it is little."""
    sign, whole = "-" if micro < 0 else "", abs(micro)
    for unit, name in ((10**12, " M"), (10**9, " k")):
        if whole >= unit:
            return f"{sign}${whole / unit:,.1f}{name}"
    return f"{sign}${whole / 10**6:,.2f}" if whole < 10**8 else f"{sign}${whole / 10**6:,.0f}"


def _stacked(s: Slice) -> list[tuple[str, int, int]]:
    """(class, lower, upper) of each part, outward from the line on the side on which it counts."""
    up = down = 0
    rows = []
    counted = [(css, v) for (css, _, _), v in zip(EARNED, s.earned, strict=True)]
    counted += [(css, -v) for (css, _, _), v in zip(SPENT, s.spent, strict=True)]
    for css, value in counted:
        if value > 0:
            rows.append((css, up, up + value))
            up += value
        elif value < 0:
            rows.append((css, down + value, down))
            down += value
    return rows
