"""Small charts as inline SVG, drawn by matplotlib and painted by the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from harmoq_ao.reporting.distributions import Histogram

Point = tuple[float, float]
_THEME = {"#100000": "--quiet", "#200000": "--grid", "#300000": "--ours", "#400000": "--bound", "#500000": "--beyond"}
"""Colours to draw with, and the variables of the page's style sheet that stand in their places in the SVG."""
QUIET, GRID, OURS, BOUND, BEYOND = _THEME
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "harmoq-ao",  # the same chart is the same SVG
    "font.size": 11.0,
    "text.color": QUIET,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
}
_PRESENTATION = re.compile(r"(fill|stroke|text-anchor)[\w-]*$")
"""Properties that are kept; fonts come from the page."""
_ANCHOR = "{http://www.w3.org/1999/xlink}href"


def xy_chart(
    points: Sequence[Point],
    x: str,
    y: str,
    *,
    title: str,
    log: str = "",
    names: Sequence[str] = (),
    diagonal: bool = False,
    mark: float | None = None,
) -> Markup:
    """A curve, or single points.

    Args:
        points: (x, y), at least one.
        x: Label of the horizontal axis, with its unit.
        y: Label of the vertical axis, with its unit.
        title: For screen readers.
        log: Axes with a logarithmic scale, ``y`` or ``xy``; all their values must be positive.
        names: A text for each point, shown when it is pointed at; with them single points are drawn, without a line.
        diagonal: Draw the line of equal values; both axes then span the same.
        mark: Draw a vertical line here.
    """
    with rc_context(_STYLE):
        figure, axes = _panel(x, y)
        axes.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
        style = {"linestyle": "none" if names else "-", "marker": "o" if names or len(points) <= 12 else ""}
        axes.plot(*zip(*points, strict=True), color=OURS, gid="points", **style)
        rule = {"color": QUIET, "linestyle": ":", "linewidth": 1.0}
        if diagonal:
            limits = [f(*axes.get_xlim(), *axes.get_ylim()) for f in (min, max)]
            axes.set(xlim=limits, ylim=limits)
            axes.plot(limits, limits, **rule)
        if mark is not None:
            axes.axvline(mark, **rule)
        _few_ticks(axes.xaxis, "{x:.3g}")
        _few_ticks(axes.yaxis, "{x:.3g}")
        return _svg(figure, title, names)


def histogram_chart(histogram: Histogram, title: str) -> Markup:
    """Counts on a logarithmic scale, the quantization range as lines, and what lies beyond it shaded."""
    with rc_context(_STYLE):
        figure, axes = _panel("value", "values in a bin")
        low, high = histogram.low, histogram.high
        edges = np.linspace(low, high, len(histogram.counts) + 1)
        axes.stairs(np.maximum(histogram.counts, 0.5), edges, baseline=0.5, fill=True, color=OURS)
        axes.set(yscale="log", xlim=(low, high), ylim=(0.5, 2.0 * max(1, *histogram.counts)))
        _few_ticks(axes.xaxis, None)
        _few_ticks(axes.yaxis, EngFormatter(places=0, sep=""))
        for bound, end in zip(histogram.quant_range or (), (low, high), strict=False):
            axes.axvspan(bound, end, color=BEYOND, linewidth=0.0)
            axes.axvline(bound, color=BOUND, linestyle="--", linewidth=1.5, gid="bound")
        return _svg(figure, title)


def bar(share: float, kind: str) -> Markup:
    """A bar of `share` (0..1) of the width it is given, painted as class `kind`."""
    text = Markup('<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{}</svg>')
    return text.format(Markup('<rect class="{}" width="{:.2f}" height="8"/>').format(kind, 100 * max(share, 0.0)))


def _panel(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(380 / 72, 220 / 72), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.margins(0.04, 0.08)
    return figure, axes


def _few_ticks(axis: Any, formatter: Any) -> None:
    """About five ticks; several also on a logarithmic axis that spans less than a power of ten."""
    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(5))
        return
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(formatter)


def _svg(figure: Figure, title: str, names: Sequence[str] = ()) -> Markup:
    """The figure as an element of the page.

    The page's policy allows no style in an SVG: properties become attributes, and what else matplotlib writes
    (metadata, a style sheet, clip paths, names of groups) is left out.
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for group in root.iter():
        if group.get("id") == "points" and names:
            dots = [element for element in group.iter() if element.tag.endswith("}use")]
            for dot, name in zip(dots, names, strict=True):
                ElementTree.SubElement(dot, "title").text = name
    _tidy(root, used={element.attrib[_ANCHOR][1:] for element in root.iter() if _ANCHOR in element.attrib})
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _tidy(element: ElementTree.Element, used: set[str]) -> None:
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.endswith(("}metadata", "}style", "}clipPath")):
            element.remove(child)
        else:
            _tidy(child, used)
    element.attrib.pop("clip-path", None)  # all that is drawn lies inside
    name, anchor = element.attrib.pop("id", ""), element.attrib.pop(_ANCHOR, None)
    if name in used:
        element.set("id", name)
    elif name == "bound":
        element.set("class", name)
    if anchor is not None:
        element.set("href", anchor)
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if _PRESENTATION.match(key):
            element.set(key, f"var({_THEME[value]})" if value in _THEME else value)
