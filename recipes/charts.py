"""Charts of a study: light background, colours that colour-blind readers tell apart, legible at a page's width."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator
from PIL import Image

from harmoq_ao.common.output import atomic_write

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#999999")
"""Okabe and Ito's, and two of Tol's; black is for our own method."""
OURS = "#000000"
WIDTH = 8.4
"""Inches; 1680 pixels, twice a page's width."""
DPI = 200
_LEAST_DROP = 0.005  # dB; smaller drops are drawn here: the axis is logarithmic
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=list("osD^vP*X")),
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}

styled = rc_context(_STYLE)
"""Decorator of a function that draws: the house style while it runs."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panels(figure: Figure, count: int, **options: Any) -> list[Any]:
    """Axes in rows of at most two."""
    across = min(2, count)
    axes = figure.subplots(math.ceil(count / across), across, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return list(axes.flat[:count])


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all; nothing in it depends on the day."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)


def show_image(axis: Any, pixels: Any, **options: Any) -> Any:
    """An image without ticks, grid or frame."""
    image = axis.imshow(pixels, **{"interpolation": "nearest", **options})
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return image


def square(corner: tuple[int, int], side: int) -> Any:
    """Frame around a part of a picture; `corner` is its top and left."""
    return Rectangle(corner[::-1], side, side, fill=False, edgecolor="#ffd400", linewidth=1.7)


def log_axis(axis: Any) -> None:
    """Logarithmic y axis with few, plain numbers, also where it spans less than a power of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")


# --- tables -----------------------------------------------------------------------------------------------------------


@styled
def methods_chart(path: Path, numbers: pd.DataFrame, ours: str | None) -> None:
    """PSNR lost against the float model by bits, a line for each method, a panel for each set and scale.

    Args:
        path: PNG.
        numbers: See :func:`harmoq_ao.recipes.documents.numbers`.
        ours: The row that is drawn in black.
    """
    places = numbers.groupby(["scale", "set"], sort=False)
    figure = new_figure(WIDTH, 2.9 * math.ceil(len(places) / 2) + 0.3)
    axes = panels(figure, len(places), sharey=True)
    for axis, ((scale, name), part) in zip(axes, places, strict=True):
        quantized, bicubic = part[part["group"] != ""], part[part["row"] == "bicubic"]
        drops = quantized.pivot(index="group", columns="row", values="drop_psnr")
        drops = drops.loc[quantized["group"].unique(), quantized["row"].unique()].clip(lower=_LEAST_DROP)
        for line, row in zip(axis.plot(drops.to_numpy(), label=list(drops)), drops, strict=True):
            if row == ours:
                line.set(color=OURS, linewidth=2.4, zorder=5)
        for drop in bicubic["drop_psnr"][bicubic["drop_psnr"] > 0]:
            axis.axhline(drop, color="#555555", linestyle="--", linewidth=1.0, label="bicubic")
        log_axis(axis)
        axis.set_xticks(range(len(drops)), drops.index)
        axis.set(title=f"{name} x{scale}", ylabel="PSNR-Y below float, dB")
        axis.label_outer()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, path)


@styled
def rows_chart(path: Path, numbers: pd.DataFrame, ours: str | None = None) -> None:
    """PSNR by row, a panel for each bit width and set, a mark for each variant; SSIM is in the table."""
    quantized = numbers[numbers["group"] != ""]
    places = quantized.groupby(["group", "scale", "set"], sort=False)
    rows, variants = quantized["row"].unique(), quantized["variant"].unique()
    height = (0.16 + 0.12 * len(variants)) * len(rows) + 0.9
    figure = new_figure(WIDTH, height * math.ceil(len(places) / 2) + 0.3)
    axes = panels(figure, len(places), sharey=True)
    for axis, ((group, scale, name), part) in zip(axes, places, strict=True):
        scores = part.pivot(index="row", columns="variant", values="psnr_y").loc[rows, variants]
        for index, variant in enumerate(variants):
            heights = np.arange(len(rows)) + (index - (len(variants) - 1) / 2) * 0.36
            (line,) = axis.plot(scores[variant], heights, linestyle="", label=variant or "Algorithm 1")
            for value, at in zip(scores[variant].dropna(), heights[scores[variant].notna()], strict=True):
                style = {"va": "center", "fontsize": 7.5, "color": line.get_color()}
                axis.annotate(f"{value:.2f}", (value, at), (5, 0), textcoords="offset points", **style)
        axis.set(title=f"{name} x{scale}, {group}", xlabel="PSNR-Y, dB")
        axis.margins(x=0.16)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    if len(variants) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(variants))
    save_figure(figure, path)
