"""Small charts as inline SVG whose colours are classes, so that the page's theme paints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from harmoq_ao.reporting.distributions import Histogram

WIDTH, HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 38
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Args:
        label: With its unit.
        log: Whether values are placed by their logarithm; all must be positive then.
    """

    label: str
    log: bool = False


@dataclass(frozen=True)
class Series:
    """What is drawn.

    Args:
        points: (x, y).
        titles: A text for each point, shown when it is pointed at; with them single points are drawn, without a line.
    """

    points: Sequence[Point]
    titles: Sequence[str] | None = None


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool) -> _Scale:
        placed = [math.log10(v) for v in values] if log else list(values)
        low, high = min(placed), max(placed)
        margin = 0.04 * (high - low) or max(abs(high) * 0.05, 0.05)
        return cls(low - margin, high + margin, start, end, log)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            ticks = [float(t) for t in MaxNLocator(count).tick_values(self.low, self.high)]
            return [t for t in ticks if self.low <= t <= self.high]
        for mantissas in ((1,), (1, 3), (1, 2, 5)):
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            ticks = [
                m * 10.0**d for d in decades for m in mantissas if self.low <= math.log10(m * 10.0**d) <= self.high
            ]
            if len(ticks) >= 2:
                return ticks[:: max(1, len(ticks) // count)]
        return [10.0 ** ((self.low + self.high) / 2)]


def xy_chart(
    series: Series, x: Axis, y: Axis, *, title: str, diagonal: bool = False, mark: float | None = None
) -> Markup:
    """A curve, or single points.

    Args:
        series: At least one point.
        x: Horizontal axis.
        y: Vertical axis.
        title: What a screen reader says.
        diagonal: Draw the line of equal values; both axes then span the same.
        mark: Draw a vertical line here.
    """
    xs, ys = [p[0] for p in series.points], [p[1] for p in series.points]
    if diagonal:
        xs = ys = xs + ys
    across = _Scale.around(xs, _LEFT, WIDTH - _RIGHT, x.log)
    up = _Scale.around(ys, HEIGHT - _BOTTOM, _TOP, y.log)
    parts = [_axes(across, up, x.label, y.label)]
    if diagonal:
        parts.append(_line(across.start, up.start, across.end, up.end, "rule"))
    if mark is not None:
        parts.append(_line(across(mark), _TOP, across(mark), HEIGHT - _BOTTOM, "rule"))
    placed = [(across(a), up(b)) for a, b in series.points]
    if series.titles is None:
        path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(placed))
        parts.append(Markup('<path class="curve" d="{}"/>').format(path))
        parts += [_dot(a, b, None) for a, b in placed] if len(placed) <= 12 else []
    else:
        parts += [_dot(a, b, text) for (a, b), text in zip(placed, series.titles, strict=True)]
    return _svg(parts, title)


def histogram_chart(histogram: Histogram, title: str) -> Markup:
    """Counts on a logarithmic scale, the bounds as lines, and what lies beyond them shaded."""
    across = _Scale(histogram.low, histogram.high, _LEFT, WIDTH - _RIGHT, False)
    most = max(1, *histogram.counts)
    up = _Scale(0.0, math.log10(1 + most) * 1.05, HEIGHT - _BOTTOM, _TOP, False)
    width = (histogram.high - histogram.low) / len(histogram.counts)
    bars = "".join(
        f"M{across(histogram.low + i * width):.1f} {up.start:.1f}V{up(math.log10(1 + c)):.1f}"
        f"H{across(histogram.low + (i + 1) * width):.1f}V{up.start:.1f}z"
        for i, c in enumerate(histogram.counts)
        if c
    )
    decades = [math.log10(1 + 10.0**d) for d in range(0, int(math.log10(most)) + 1, 2 if most > 1e4 else 1)]
    labels = [_thousands(10**d) for d in range(0, int(math.log10(most)) + 1, 2 if most > 1e4 else 1)]
    parts = [_axes(across, up, "value", "values in a bin", list(zip(decades, labels, strict=True)))]
    parts.append(Markup('<path class="bars" d="{}"/>').format(bars))
    for index, bound in enumerate(histogram.bounds or ()):
        edge = across(bound)
        start, end = ((_LEFT, edge), (edge, WIDTH - _RIGHT))[index]
        shade = Markup('<rect class="beyond" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>')
        parts.append(shade.format(start, _TOP, max(0.0, end - start), HEIGHT - _BOTTOM - _TOP))
        parts.append(_line(edge, _TOP, edge, HEIGHT - _BOTTOM, "bound"))
    return _svg(parts, title)


def bar(share: float, kind: str) -> Markup:
    """A bar of `share` (0..1) of the width it is given, painted as class `kind`."""
    text = Markup('<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{}</svg>')
    return text.format(Markup('<rect class="{}" width="{:.2f}" height="8"/>').format(kind, 100 * max(share, 0.0)))


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return start + Markup("").join(parts) + Markup("</svg>")


def _axes(across: _Scale, up: _Scale, x: str, y: str, y_ticks: list[tuple[float, str]] | None = None) -> Markup:
    lines: list[Markup] = []
    for value in across.ticks(5):
        lines.append(_line(across(value), up.start, across(value), up.start + 4, "axis"))
        lines.append(_text(across(value), up.start + 15, _number(value), "middle"))
    for value, label in y_ticks or [(v, _number(v)) for v in up.ticks(4)]:
        lines.append(_line(across.start, up(value), across.end, up(value), "grid"))
        lines.append(_text(across.start - 6, up(value) + 3.5, label, "end"))
    lines.append(_line(across.start, up.start, across.end, up.start, "axis"))
    lines.append(_text((across.start + across.end) / 2, HEIGHT - 6, x, "middle"))
    middle = (up.start + up.end) / 2
    turned = Markup('<text x="11" y="{0:.1f}" text-anchor="middle" transform="rotate(-90 11 {0:.1f})">{1}</text>')
    lines.append(turned.format(middle, y))
    return Markup("").join(lines)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return line.format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _dot(x: float, y: float, title: str | None) -> Markup:
    inner = Markup("") if title is None else Markup("<title>{}</title>").format(title)
    return Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3">{}</circle>').format(x, y, inner)


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _thousands(value: int) -> str:
    """``1``, ``10k``, ``1M``."""
    return next((f"{value // unit}{name}" for unit, name in ((10**6, "M"), (10**3, "k")) if value >= unit), str(value))
