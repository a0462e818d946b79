"""Charts of a study: light background, colours that colour-blind readers tell apart, legible at a page's width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from harmoq_ao.common.output import atomic_write
from harmoq_ao.recipes.documents import Column, Entry, Plan

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#999999")
"""Okabe and Ito's, and two of Tol's; black is for our own method."""
OURS = "#000000"
GRID = "#e3e3e3"
MARKERS = "osD^vP*X"
WIDTH = 8.4
"""Inches; 1680 pixels, twice a page's width."""
DPI = 200
_LEAST_DROP = 0.005  # dB; smaller drops are drawn here
_LOG_TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


styled = rc_context(cast(Any, _STYLE))
"""Decorator of a function that draws: the house style while it runs."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panels(figure: Figure, rows: int, columns: int, **options: Any) -> Any:
    """A grid of axes `[rows, columns]`."""
    return figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all; nothing in it depends on the day."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)


def without_axes(axis: Any) -> None:
    """A panel that shows a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def plain_numbers(axis: Any) -> None:
    """Few, plain numbers on a logarithmic axis, also where it spans less than a power of ten."""
    axis.yaxis.set_major_locator(LogLocator(subs=_LOG_TICKS))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")


# --- tables -----------------------------------------------------------------------------------------------------------


@styled
def methods_chart(path: Path, plan: Plan, found: Sequence[Entry]) -> None:
    """PSNR lost against the float model by bits, a line for each method, a panel for each set and scale."""
    groups = list(dict.fromkeys(row.group for row in plan.rows if row.group))
    labels = list(dict.fromkeys(row.label for row in plan.rows if row.group))
    across = min(2, len(plan.columns))
    down = math.ceil(len(plan.columns) / across)
    figure = new_figure(WIDTH, 2.9 * down + 0.3)
    axes = panels(figure, down, across, sharey=True)
    for axis, column in zip(axes.flat, plan.columns, strict=False):
        for index, label in enumerate(labels):
            points = [(e.row.group, e.drop_psnr) for e in found if e.column == column and e.row.label == label]
            drawn = {group: max(drop, _LEAST_DROP) for group, drop in points if not math.isnan(drop)}
            axis.plot(
                [groups.index(group) for group in drawn], list(drawn.values()), label=label, **_line(plan, index, label)
            )
        _bicubic_line(axis, found, column)
        axis.set_yscale("log")
        plain_numbers(axis)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(f"{column.set_name} x{column.scale}")
    for axis in axes.flat[len(plan.columns) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR-Y below float, dB")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    save_figure(figure, path)


def _line(plan: Plan, index: int, label: str) -> dict[str, Any]:
    if label == plan.ours:
        return {"color": OURS, "marker": "o", "linewidth": 2.4, "zorder": 5}
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _bicubic_line(axis: Any, found: Sequence[Entry], column: Column) -> None:
    drop = next((e.drop_psnr for e in found if e.column == column and e.row.label == "bicubic"), math.nan)
    if drop > 0:
        axis.axhline(drop, color="#555555", linestyle="--", linewidth=1.0, label="bicubic")


@styled
def rows_chart(path: Path, plan: Plan, found: Sequence[Entry]) -> None:
    """PSNR by row, a panel for each bit width and set, a mark for each variant; SSIM is in the table."""
    groups = list(dict.fromkeys(row.group for row in plan.rows if row.group))
    places = list(dict.fromkeys((column.set_name, column.scale) for column in plan.columns))
    variants = list(dict.fromkeys(column.variant for column in plan.columns))
    labels = list(dict.fromkeys(row.label for row in plan.rows if row.group))
    keys = [(group, place) for group in groups for place in places]
    across = min(2, len(keys))
    down = math.ceil(len(keys) / across)
    figure = new_figure(WIDTH, ((0.16 + 0.12 * len(variants)) * len(labels) + 0.9) * down + 0.3)
    axes = panels(figure, down, across, sharey=True)
    for axis, (group, place) in zip(axes.flat, keys, strict=False):
        for index, variant in enumerate(variants):
            column = Column(*place, variant)
            values = {e.row.label: e.psnr_y for e in found if e.row.group == group and e.column == column}
            offset = (index - (len(variants) - 1) / 2) * 0.36
            _dots(axis, labels, values, offset, COLOURS[index], MARKERS[index], variant or "Algorithm 1")
        axis.set_title(f"{place[0]} x{place[1]}, {group}")
        axis.set_xlabel("PSNR-Y, dB")
        axis.margins(x=0.16)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    if len(variants) > 1:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(variants))
    save_figure(figure, path)


def _dots(
    axis: Any, labels: Sequence[str], values: dict[str, float], offset: float, colour: str, marker: str, name: str
) -> None:
    found = [(index + offset, values.get(label, math.nan)) for index, label in enumerate(labels)]
    known = [(place, value) for place, value in found if not math.isnan(value)]
    axis.plot([value for _, value in known], [i for i, _ in known], marker, color=colour, label=name)
    for place, value in known:
        axis.annotate(
            f"{value:.2f}", (value, place), (5, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour
        )
