"""Charts as SVG text made here: no script. Areas stretch with the page; words stand beside them as HTML, so they keep their size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from marketplace.admin.look import watts

LAYERS: tuple[tuple[str, str], ...] = (
    ("firm_w", "Firm"),
    ("flexible_w", "Flexible"),
    ("spot_w", "Spot"),
    ("idle_gpu_w", "Idle GPUs"),
    ("hashing_w", "Hashing"),
    ("overhead_w", "Cooling and overhead"),
)  # bottom to top; the column of SiteMinute, and what it is called
WIDTH, HEIGHT = 1000, 300


@dataclass(frozen=True)
class Slice:
    """Average watts over `[start, start + step)`, one number a layer; `cap` in watts; `metered` where a meter said so."""

    start: datetime
    layers: tuple[int, ...]
    cap: int
    metered: int | None

    @property
    def total(self) -> int:
        return sum(self.layers)

    @property
    def headroom(self) -> int:
        return self.cap - (self.total if self.metered is None else self.metered)


def power_stack(slices: Sequence[Slice], *, start: datetime, end: datetime, step: timedelta) -> SafeString:
    """What the site's watts did in `[start, end)`: a stack under the cap. Times without a slice stay empty: nothing is known."""
    top = max([s.cap for s in slices] + [s.total for s in slices] + [s.metered or 0 for s in slices], default=0)
    top = round_up(top * 105 // 100) if top else 1
    span = (end - start) // timedelta(seconds=1)

    def x(at: datetime) -> str:
        return f"{WIDTH * ((at - start) / timedelta(seconds=1)) / span:.1f}"

    def y(value: int) -> str:
        return f"{HEIGHT - HEIGHT * value / top:.1f}"

    runs = _runs(slices, step)
    areas = []
    for number, (column, _) in enumerate(LAYERS):
        d = []
        for run in runs:
            above = [(s.start, sum(s.layers[: number + 1])) for s in run]
            below = [(s.start, sum(s.layers[:number])) for s in run]
            if any(a[1] != b[1] for a, b in zip(above, below, strict=True)):
                upper = [f"{x(at)} {y(v)} {x(at + step)} {y(v)}" for at, v in above]
                lower = [f"{x(at + step)} {y(v)} {x(at)} {y(v)}" for at, v in reversed(below)]
                d.append(f"M{' '.join(upper)} {' '.join(lower)}Z")
        areas.append((column.removesuffix("_w"), " ".join(d)))
    drawn = format_html_join("", '<path class="tr-area tr-{}" d="{}"/>', [a for a in areas if a[1]])
    cap = _line(runs, lambda s: s.cap, x, y, step)
    metered = _line(runs, lambda s: s.metered, x, y, step)
    grid = format_html_join(
        "", '<line class="tr-grid" x1="0" x2="1000" y1="{0}" y2="{0}"/>', [(y(top * i // 4),) for i in (1, 2, 3)]
    )
    marks = format_html_join(
        "", '<span style="bottom:{}%">{}</span>', [(25 * i, watts(top * i // 4).replace(".00", "")) for i in range(5)]
    )
    ticks = format_html_join("", "<span>{}</span>", [(f"{start + (end - start) * i / 6:%H:%M}",) for i in range(7)])
    label = f"Power by use, stacked under the cap, from {start:%H:%M} to {end:%H:%M} UTC"
    return format_html(
        '<div class="tr-plot"><div class="tr-y" aria-hidden="true">{}</div>'
        '<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{}">{}{}'
        '<path class="tr-metered" d="{}"/><path class="tr-cap" d="{}"/></svg>'
        '<div class="tr-x" aria-hidden="true">{}</div></div>',
        marks, label, drawn, grid, metered, cap, ticks,
    )  # fmt: skip


def _runs(slices: Sequence[Slice], step: timedelta) -> list[list[Slice]]:
    """Slices that follow each other without a hole."""
    runs: list[list[Slice]] = []
    for piece in slices:
        if runs and runs[-1][-1].start + step == piece.start:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _line(runs: Iterable[Sequence[Slice]], value, x, y, step: timedelta) -> str:  # noqa: ANN001
    parts = []
    for run in runs:
        points = [f"{x(at)} {y(v)}" for s in run if (v := value(s)) is not None for at in (s.start, s.start + step)]
        if points:
            parts.append("M" + " ".join(points))
    return " ".join(parts)


def round_up(value: int) -> int:
    """To 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 times a power of ten, so that quarters read well."""
    size = 10 ** (len(str(value)) - 1)
    return next(
        size * tenths // 10
        for tenths in (10, 12, 16, 20, 24, 28, 32, 40, 48, 60, 80, 100)
        if size * tenths // 10 >= value
    )


def legend(latest: Slice | None) -> SafeString:
    """The layers' names and their last values, and the headroom under the cap."""
    values = latest.layers if latest else (0,) * len(LAYERS)
    rows = [
        (column.removesuffix("_w"), name, watts(value)) for (column, name), value in zip(LAYERS, values, strict=True)
    ]
    items = format_html_join("", '<li><i class="tr-key tr-{}"></i>{} <b>{}</b></li>', rows)
    if latest is None:
        return format_html('<ul class="tr-legend">{}</ul>', items)
    return format_html(
        '<ul class="tr-legend">{}<li><i class="tr-key tr-key-metered"></i>Metered <b>{}</b></li>'
        '<li><i class="tr-key tr-key-cap"></i>Cap <b>{}</b></li><li><i class="tr-key tr-key-room"></i>Headroom <b>{}</b></li></ul>',
        items, watts(latest.metered), watts(latest.cap), watts(latest.headroom),
    )  # fmt: skip


def node_bar(*, cap: int, limit: int | None, fixed: int, booked: int, margin: int, measured: int | None) -> SafeString:
    """One node of the power tree, all in watts: fixed, booked, the margin at the end, the meter as a mark, a curtailment as a line."""

    def part(value: int) -> str:
        return f"{min(1000, 1000 * value / cap):.1f}" if cap else "0"

    marks = []
    if limit is not None:
        marks.append(("tr-limit", part(limit)))
    if measured is not None:
        marks.append(("tr-meter", part(measured)))
    lines = format_html_join("", '<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="14"/>', marks)
    said = f"booked {watts(fixed + booked)} of {watts(cap)}, measured {watts(measured)}"
    return format_html(
        '<svg class="tr-bar" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="tr-bar-all" width="1000" height="14"/><rect class="tr-bar-fixed" width="{}" height="14"/>'
        '<rect class="tr-bar-booked" x="{}" width="{}" height="14"/><rect class="tr-bar-margin" x="{}" width="{}" height="14"/>{}</svg>',
        said, part(fixed), part(fixed), part(booked), f"{1000 - float(part(margin)):.1f}", part(margin), lines,
    )  # fmt: skip


def against_baseline(seconds: Sequence[tuple[datetime, int]], *, baseline: int, cap: int) -> SafeString:
    """A call: what the node drew, under its baseline (dotted) and beside its cap. `seconds`: (when, W), evenly spaced, at least one."""
    top = round_up(max(baseline, cap, *(w for _, w in seconds)) * 105 // 100 or 1)

    def y(value: int) -> str:
        return f"{HEIGHT - HEIGHT * value / top:.1f}"

    points = [
        (f"{WIDTH * i / len(seconds):.1f}", f"{WIDTH * (i + 1) / len(seconds):.1f}", y(w))
        for i, (_, w) in enumerate(seconds)
    ]
    line = " ".join(f"{a} {v} {b} {v}" for a, b, v in points)
    start, end = seconds[0][0], seconds[-1][0]
    marks = format_html_join(
        "", '<span style="bottom:{}%">{}</span>', [(25 * i, watts(top * i // 4).replace(".00", "")) for i in range(5)]
    )
    ticks = format_html_join("", "<span>{}</span>", [(f"{start + (end - start) * i / 6:%H:%M}",) for i in range(7)])
    label = f"Watts drawn from {start:%H:%M} to {end:%H:%M} UTC, baseline {watts(baseline)}, cap {watts(cap)}"
    return format_html(
        '<div class="tr-plot"><div class="tr-y" aria-hidden="true">{}</div>'
        '<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<path class="tr-area tr-hashing" d="M{} 1000 300 0 300Z"/><line class="tr-grid" x1="0" x2="1000" y1="{}" y2="{}"/>'
        '<path class="tr-metered" d="M{}"/><path class="tr-cap" d="M0 {} 1000 {}"/></svg>'
        '<div class="tr-x" aria-hidden="true">{}</div></div>',
        marks, label, line, y(baseline), y(baseline), line, y(cap), y(cap), ticks,
    )  # fmt: skip
