"""Charts of a conversion plan: megawatts by month, cash over time, halls as bars, what swings it. As `charts`: SVG, no script."""

from collections.abc import Sequence
from typing import Any

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from marketplace.admin.charts import round_up
from marketplace.admin.look import watts

STACK: tuple[tuple[str, str, str], ...] = (
    ("firm", "AI", "ai_w"),
    ("hashing", "Hashing", "hashing_w"),
    ("overhead", "Under works", "works_w"),
)  # bottom to top: class, name, column
PHASES = {
    "hashing": "hashing", "permit and orders": "flexible", "building": "overhead", "commissioning": "idle_gpu", "live": "firm",
    "term over": "spot",
}  # fmt: skip


def dollars(cents: int) -> str:
    """$12.3 M, $4.5 k; the sign in front."""
    sign, whole = "-" if cents < 0 else "", abs(cents)
    for size, unit in ((10**11, " bn"), (10**8, " M"), (10**5, " k")):
        if whole >= size:
            return f"{sign}${whole / size:,.1f}{unit}"
    return f"{sign}${whole / 100:,.0f}"


def megawatts(months: Sequence[dict[str, int]]) -> SafeString:
    """The hashing bridge: what AI draws, what hashes on, what stands still, month by month."""
    top = round_up(max((sum(m[column] for _, _, column in STACK) for m in months), default=1) or 1)
    areas = []
    for i, (css, _, _) in enumerate(STACK):
        upper = [sum(m[column] for _, _, column in STACK[: i + 1]) for m in months]
        lower = [sum(m[column] for _, _, column in STACK[:i]) for m in months]
        if upper != lower:
            areas.append((css, f"M{_steps(upper, 0, top)} {_steps(lower, 0, top, back=True)}Z"))
    drawn = format_html_join("", '<path class="tr-area tr-{}" d="{}"/>', areas)
    marks = [(25 * i, watts(top * i // 4).replace(".00", "")) for i in range(5)]
    legend = format_html_join("", '<li><i class="tr-key tr-{}"></i>{}</li>', [(css, name) for css, name, _ in STACK])
    return _plot(drawn, marks, len(months), "Megawatts by use, month by month", legend)


def cash(ours: Sequence[int], stays: Sequence[int]) -> SafeString:
    """Sums of cash, with the plan and had the site hashed on; cents by month."""
    low, high = min(0, *ours, *stays), max(1, *ours, *stays)
    size = round_up(max(high, -low))
    low, high = (-size if low < 0 else 0), size
    zero = 300 - 300 * -low / (high - low)
    drawn = format_html(
        '<line class="tr-grid" x1="0" x2="1000" y1="{0}" y2="{0}"/><path class="tr-cap" d="M{1}"/><path class="tr-metered" d="M{2}"/>',
        f"{zero:.1f}", _steps(stays, low, high), _steps(ours, low, high),
    )  # fmt: skip
    marks = [(25 * i, dollars(low + (high - low) * i // 4)) for i in range(5)]
    legend = format_html(
        '<li><i class="tr-key tr-key-metered"></i>{}</li><li><i class="tr-key tr-key-cap"></i>{}</li>',
        "This plan", "Hashing on",
    )  # fmt: skip
    return _plot(drawn, marks, len(ours), "Cash so far, month by month", legend)


def phases() -> SafeString:
    """The colours of a hall's phases."""
    return format_html(
        '<ul class="tr-legend">{}</ul>',
        format_html_join("", '<li><i class="tr-key tr-{}"></i>{}</li>', [(css, name) for name, css in PHASES.items()]),
    )


def calendar(halls: Sequence[dict[str, Any]], months: int) -> list[dict[str, Any]]:
    """Each hall as a bar, with its phases in words."""
    rows = []
    for hall in halls:
        ends = [first for first, _ in hall["phases"][1:]] + [months]
        parts = [
            (PHASES[phase], f"{1000 * first / months:.1f}", f"{1000 * (end - first) / months:.1f}", f"{phase}: month {first} to {end}")
            for (first, phase), end in zip(hall["phases"], ends, strict=True)
        ]  # fmt: skip
        bar = format_html_join(
            "", '<rect class="tr-area tr-{}" x="{}" width="{}" height="14"><title>{}</title></rect>', parts
        )
        said = "; ".join(text for *_, text in parts)
        svg = format_html(
            '<svg class="tr-bar" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>', said, bar
        )  # fmt: skip
        rows.append({**hall, "bar": svg, "said": said, "power": watts(hall["it_w"])})
    return rows


def swings(rows: Sequence[dict[str, Any]], planned: int) -> list[dict[str, Any]]:
    """What each input does to the gain: a bar from its low to its high, the plan as a mark."""
    values = [v for row in rows for v in (row["low_cents"], row["high_cents"])] + [planned]
    low, span = min(values), max(1, max(values) - min(values))

    def x(value: int) -> float:
        return 1000 * (value - low) / span

    out = []
    for row in rows:
        left, right = sorted((x(row["low_cents"]), x(row["high_cents"])))
        svg = format_html(
            '<svg class="tr-bar" viewBox="0 0 1000 14" preserveAspectRatio="none" aria-hidden="true"><rect class="tr-bar-all" '
            'width="1000" height="14"/><rect class="tr-bar-booked" x="{}" width="{}" height="14"/>'
            '<line class="tr-meter" x1="{}" x2="{}" y1="0" y2="14"/></svg>',
            f"{left:.1f}", f"{max(2, right - left):.1f}", f"{x(planned):.1f}", f"{x(planned):.1f}",
        )  # fmt: skip
        out.append({**row, "bar": svg, "at_low": dollars(row["low_cents"]), "at_high": dollars(row["high_cents"])})
    return out


def _steps(values: Sequence[int], low: int, high: int, *, back: bool = False) -> str:
    """Points of a line that holds each value for a month, over 1000 x 300."""
    count = len(values)
    points = [
        f"{1000 * at / count:.1f} {300 - 300 * (value - low) / (high - low):.1f}"
        for i, value in enumerate(values)
        for at in (i, i + 1)
    ]
    return " ".join(reversed(points) if back else points)


def _plot(
    drawn: SafeString, marks: Sequence[tuple[int, str]], months: int, label: str, legend: SafeString
) -> SafeString:
    aside = format_html_join("", '<span style="bottom:{}%">{}</span>', marks)
    ticks = format_html_join("", "<span>{}</span>", [(f"month {months * i // 6}",) for i in range(7)])
    return format_html(
        '<div class="tr-plot"><div class="tr-y" aria-hidden="true">{}</div><svg viewBox="0 0 1000 300" preserveAspectRatio="none" '
        'role="img" aria-label="{}">{}</svg><div class="tr-x" aria-hidden="true">{}</div></div><ul class="tr-legend">{}</ul>',
        aside, label, drawn, ticks, legend,
    )  # fmt: skip
