"""Charts as inline SVG: lines with intervals, and bars. Colours are the page's CSS variables, so light and dark both fit.

Owns: scales, ticks and marks. Does not own: what is drawn (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
BAR_HEIGHT, BAR_LABEL = 30, 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """points: (x, y) in order of x. intervals: (x, low, high). color: a CSS colour."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float, float]] = field(default=())
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """low, high: the interval drawn over the bar. text: what is written at the right."""

    name: str
    color: str
    value: float
    low: float
    high: float
    text: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short number: 1200 as 1.2k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.0f}k"
    return f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:.3g}"


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, y_label: str, y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None, percent: bool = False, band: tuple[float, float] | None = None,
    markers: bool = True, height: int = HEIGHT,
) -> str:
    """An SVG element. percent: y is a share. band: an x range that is shaded. y starts at 0 unless y_range says otherwise."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [high for line in lines for _, _, high in line.intervals]
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    pad = (x_high - x_low or 1.0) * (0.06 if markers else 0.0)
    x_low, x_high = x_low - pad, x_high + pad
    y_low, y_high = y_range or (0.0, max([*ys, 1e-9]) * 1.08)

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return height - BOTTOM - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = [_open(height, title)]
    if band is not None:
        parts.append(f'<rect class="band" x="{x_at(band[0]):.1f}" y="{TOP}" width="{x_at(band[1]) - x_at(band[0]):.1f}" '
                     f'height="{height - TOP - BOTTOM}"/>')
    for tick in ticks(y_low, y_high, 5 if height >= HEIGHT else 3):
        label = f"{tick * 100:.4g}%" if percent else number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_at(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks if x_ticks is not None else ticks(x_low, x_high, 6):
        parts.append(f'<text x="{x_at(tick):.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    for line in lines:
        for x, low, high in line.intervals:
            parts.append(f'<line stroke="{line.color}" stroke-opacity=".45" stroke-width="5" x1="{x_at(x):.1f}" '
                         f'x2="{x_at(x):.1f}" y1="{y_at(low):.1f}" y2="{y_at(high):.1f}"/>')
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        dash = ' stroke-dasharray="6 5"' if line.dashed else ""
        width = "2.2" if markers else "1.7"
        parts.append(f'<polyline fill="none" stroke="{line.color}" stroke-width="{width}"{dash} points="{path}"/>')
        for x, y in line.points if markers else ():
            shown = f"{y * 100:.2f}%" if percent else number(y)
            parts.append(f'<circle fill="{line.color}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4">'
                         f"<title>{escape(line.name)}: {shown}</title></circle>")
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    y_middle = TOP + (height - TOP - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {y_middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>')
    return "".join(parts)


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str, x_max: float, mark: float | None = None) -> str:
    """Horizontal bars from 0 to x_max, an SVG element. mark: a dashed line across all of them."""
    height = len(bars) * BAR_HEIGHT + 34
    room = WIDTH - BAR_LABEL - 74

    def x_at(value: float) -> float:
        return BAR_LABEL + min(max(value, 0.0), x_max) / x_max * room

    parts = [_open(height, title)]
    for i, bar in enumerate(bars):
        y = i * BAR_HEIGHT + 5
        parts.append(f'<text x="{BAR_LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(f'<rect fill="{bar.color}" x="{BAR_LABEL}" y="{y}" width="{x_at(bar.value) - BAR_LABEL:.1f}" '
                     f'height="{BAR_HEIGHT - 10}" rx="2"/>')
        if bar.high > bar.low:
            parts.append(f'<line class="whisker" x1="{x_at(bar.low):.1f}" x2="{x_at(bar.high):.1f}" y1="{y + 10}" '
                         f'y2="{y + 10}"/>')
        parts.append(f'<text x="{WIDTH - 6}" y="{y + 15}" text-anchor="end">{escape(bar.text)}</text>')
    if mark is not None:
        parts.append(f'<line class="mark" x1="{x_at(mark):.1f}" x2="{x_at(mark):.1f}" y1="0" y2="{height - 30}"/>')
    parts.append(f'<text x="{BAR_LABEL + room / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text></svg>')
    return "".join(parts)


def _open(height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
