"""Charts as SVG text made here: no script, no inline style, colours by class. Heights are integers in user units."""

from collections.abc import Callable, Sequence
from datetime import date, datetime

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

WIDTH, HEIGHT, FOOT = 720, 160, 22


def bars(days: Sequence[tuple[date, int]], *, label: str, unit: str, per_unit: int) -> SafeString:
    """One bar a day; `days` = (day, value), each value shown as value / per_unit with one digit. `label` is read out."""
    most = max((value for _, value in days), default=0)
    step = WIDTH / max(1, len(days))
    room = HEIGHT - FOOT - 14
    drawn = []
    for i, (day, value) in enumerate(days):
        height = value * room // most if most else 0
        x, y = i * step, HEIGHT - FOOT - height
        drawn.append(
            (f"{x + step * 0.14:.1f}", y, f"{step * 0.72:.1f}", max(height, 1), "bar" if value else "bar bar-none",
             f"{day:%-d %b}: {_tenths(value, per_unit)} {unit}")
        )  # fmt: skip
    rects = format_html_join(
        "", '<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="{}"><title>{}</title></rect>', drawn
    )
    marks = [
        (f"{i * step + (step / 2 if i else 0):.1f}", HEIGHT - 6, "middle" if i else "start", f"{day:%-d %b}")
        for i, (day, _) in enumerate(days)
        if i % 7 == len(days) % 7
    ]
    ticks = format_html_join("", '<text x="{}" y="{}" text-anchor="{}">{}</text>', marks)
    return format_html(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        '<line x1="0" y1="{}" x2="{}" y2="{}" class="axis"/><text x="0" y="10">{} {}</text>{}{}</svg>',
        WIDTH, HEIGHT, label, HEIGHT - FOOT, WIDTH, HEIGHT - FOOT, _tenths(most, per_unit), unit, rects, ticks,
    )  # fmt: skip


def steps(points: Sequence[tuple[datetime, int]], *, floor: int, label: str, show: Callable[[int], str]) -> SafeString:
    """A price that holds from each point's instant to the next's, ascending, with its floor as a dashed line. `show` writes a
    value for people; `label` is read out.
    """
    begin, end = points[0][0], points[-1][0] + (points[-1][0] - points[0][0]) / max(1, len(points) - 1)
    span = max(1.0, (end - begin).total_seconds())
    top = max(floor, *(value for _, value in points), 1)
    room = HEIGHT - FOOT - 14

    def x(at: datetime) -> str:
        return f"{(at - begin).total_seconds() * WIDTH / span:.1f}"

    def y(value: int) -> str:
        return f"{HEIGHT - FOOT - value * room / top:.1f}"

    line = [f"M{x(points[0][0])} {y(points[0][1])}"]
    line += [f"H{x(at)}V{y(value)}" for at, value in points[1:]] + [f"H{WIDTH}"]
    hours = [at for at, _ in points if at.hour % 6 == 0 and at.minute == 0]
    ticks = format_html_join(
        "", '<text x="{}" y="{}" text-anchor="middle">{}</text>', [(x(at), HEIGHT - 6, f"{at:%H:%M}") for at in hours]
    )
    return format_html(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"><line x1="0" y1="{}" x2="{}" y2="{}" class="axis"/>'
        '<line x1="0" y1="{}" x2="{}" y2="{}" class="line-floor"/><path d="{}" class="line"/><text x="0" y="10">{}</text>{}</svg>',
        WIDTH, HEIGHT, label, HEIGHT - FOOT, WIDTH, HEIGHT - FOOT, y(floor), WIDTH, y(floor), "".join(line), show(top), ticks,
    )  # fmt: skip


def _tenths(value: int, per_unit: int) -> str:
    tenths = value * 10 // per_unit
    return f"{tenths // 10:,}.{tenths % 10}"


def meter(part: int, whole: int, *, label: str) -> SafeString:
    """How much of `whole` is there, as a small bar."""
    width = 100 * part // whole if whole else 0
    return format_html(
        '<svg class="meter" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect width="100" height="6" class="meter-all"/><rect width="{}" height="6" class="meter-part"/></svg>',
        label, width,
    )  # fmt: skip


def devices(total: int, ours: Sequence[int], *, label: str) -> SafeString:
    """A host's GPUs as squares, the job's own filled."""
    mine = set(ours)
    total = max(total, 1 + max(mine, default=0))
    squares = format_html_join(
        "",
        '<rect x="{}" y="1" width="12" height="12" rx="2.5" class="{}"/>',
        [(1 + i * 15, "gpu-ours" if i in mine else "gpu") for i in range(total)],
    )
    return format_html(
        '<svg class="devices" viewBox="0 0 {} 14" width="{}" height="14" role="img" aria-label="{}">{}</svg>',
        total * 15, total * 15, label, squares,
    )  # fmt: skip
