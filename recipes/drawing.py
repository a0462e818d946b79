"""Pictures of the figures; see `figures.py` for what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patches import Rectangle

from harmoq_ao.recipes.charts import (
    COLOURS,
    MARKERS,
    OURS,
    WIDTH,
    new_figure,
    panels,
    plain_numbers,
    save_figure,
    styled,
    without_axes,
)
from harmoq_ao.recipes.inspection import AttentionMaps

Record = Mapping[str, Any]
Pixels = npt.NDArray[np.uint8]
_DIVERGING = "PuOr"
_SEQUENTIAL = "cividis"


@styled
def figure1(path: Path, records: Sequence[Record], exact: Mapping[str, tuple[float, float]]) -> None:
    """PSNR and SSIM against bits, a row for each set.

    Args:
        path: PNG.
        records: With `quantized`, `bits`, `set`, `psnr_y`, `ssim_y`.
        exact: PSNR and SSIM of the float model by set.
    """
    figure = new_figure(WIDTH, 2.6 * len(exact) + 0.3)
    axes = panels(figure, len(exact), 2)
    widths = sorted({r["bits"] for r in records})
    for row, (name, reference) in zip(axes, exact.items(), strict=True):
        for axis, measure, limit in zip(row, ("psnr_y", "ssim_y"), reference, strict=True):
            for index, kind in enumerate(dict.fromkeys(r["quantized"] for r in records)):
                points = {r["bits"]: r[measure] for r in records if r["quantized"] == kind and r["set"] == name}
                style = {"color": COLOURS[index], "marker": MARKERS[index]}
                axis.plot([widths.index(b) for b in points], list(points.values()), label=f"{kind} only", **style)
            axis.axhline(limit, color=OURS, linestyle="--", linewidth=1.0, label="float")
            axis.set_xticks(range(len(widths)), [f"{b} bits" for b in widths])
            axis.set_title(f"{name}: {'PSNR-Y, dB' if measure == 'psnr_y' else 'SSIM-Y'}")
    axes[0, 0].legend()
    save_figure(figure, path)


@styled
def figure2(path: Path, records: Sequence[Record], attention: AttentionMaps | None) -> None:
    """PSNR lost by kind of layer (bars), above one attention map in several models.

    Args:
        path: PNG.
        records: With `layers`, `quantized`, `set`, `drop_psnr`.
        attention: The maps, or None.
    """
    sets = list(dict.fromkeys(r["set"] for r in records))
    figure = new_figure(WIDTH, 3.0 * max(1, len(sets)) + (2.4 if attention else 0.0))
    parts: Any = [figure]
    if attention:
        parts = figure.subfigures(2, 1, height_ratios=[3.0 * max(1, len(sets)), 2.4])
    axes = parts[0].subplots(max(1, len(sets)), 1, squeeze=False)
    for axis, name in zip(axes.flat, sets, strict=False):
        _sensitivity(axis, [r for r in records if r["set"] == name])
        axis.set_title(name)
    if attention:
        _attention(parts[1], attention)
    save_figure(figure, path)


def _sensitivity(axis: Any, records: Sequence[Record]) -> None:
    groups = list(dict.fromkeys(r["layers"] for r in records))
    kinds = list(dict.fromkeys(r["quantized"] for r in records))
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        drops = {r["layers"]: r["drop_psnr"] for r in records if r["quantized"] == kind}
        places = [groups.index(group) + (index - (len(kinds) - 1) / 2) * width for group in drops]
        bars = axis.bar(places, list(drops.values()), width, label=kind, color=COLOURS[index])
        axis.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
    axis.set_xticks(range(len(groups)), [group.replace(" ", "\n", 1) for group in groups])
    axis.set_ylabel("PSNR-Y below float, dB")
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.2)
    axis.legend(ncols=len(kinds), loc="upper right")


def _attention(part: Any, attention: AttentionMaps) -> None:
    part.suptitle(f"one window and head of {attention.site}", fontsize=9)
    top = max(float(m.max()) for m in attention.maps.values())
    axes = part.subplots(1, len(attention.maps), squeeze=False)
    for axis, (title, values) in zip(axes.flat, attention.maps.items(), strict=True):
        image = axis.imshow(values.numpy(), cmap=_SEQUENTIAL, vmin=0.0, vmax=top, interpolation="nearest")
        axis.set_title(title)
        without_axes(axis)
    part.colorbar(image, ax=list(axes.flat), shrink=0.85)


# --- figure 3 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What structural residual calibration did to a network.

    Args:
        changes: ``W' - W`` of a few layers, `[m, K]`, by site.
        response: Output of one layer along some tokens: float, without and with calibration, by name.
        response_title: Which layer and channel.
        errors: Relative error of every layer's output in execution order, by projection.
        sizes: Relative size of the change of every layer's weight, by projection.
    """

    changes: Mapping[str, npt.NDArray[np.floating]]
    response: Mapping[str, npt.NDArray[np.floating]]
    response_title: str
    errors: Mapping[str, Sequence[float]]
    sizes: Mapping[str, Sequence[float]]


@styled
def figure3(path: Path, found: Calibration) -> None:
    """Heatmaps of the changes, the response of a layer, and errors and changes by layer."""
    figure = new_figure(WIDTH, 8.4)
    parts: Any = figure.subfigures(3, 1, height_ratios=[2.6, 2.2, 3.4])
    top, middle, bottom = parts
    for axis, (name, change) in zip(
        top.subplots(1, len(found.changes), squeeze=False).flat, found.changes.items(), strict=True
    ):
        limit = float(np.quantile(np.abs(change), 0.995)) or 1.0
        image = axis.imshow(change, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set_title(f"change of {_short(name)}", fontsize=8)
        axis.set_xlabel("input channel")
        axis.grid(False)
        top.colorbar(image, ax=axis, shrink=0.9)
    axis = middle.subplots(1, 1)
    for (name, values), colour in zip(found.response.items(), (OURS, COLOURS[1], COLOURS[0]), strict=False):
        axis.plot(values, label=name, color=colour)
    axis.set_title(found.response_title)
    axis.set_xlabel("token")
    axis.legend(ncols=3)
    axes = bottom.subplots(2, 1, sharex=True)
    _by_layer(axes[0], found.errors, "relative error\nof the output")
    _by_layer(axes[1], found.sizes, "relative change\nof the weight")
    axes[0].set_yscale("log")
    plain_numbers(axes[0])
    axes[1].set_xlabel("linear layer, in execution order")
    bottom.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, path)


def _by_layer(axis: Any, lines: Mapping[str, Sequence[float]], label: str) -> None:
    for index, (name, values) in enumerate(lines.items()):
        if not any(values):  # without SRC no weight changes
            continue
        colour = OURS if name == "none" else COLOURS[index % len(COLOURS)]
        axis.plot(values, label=name, color=colour, linewidth=1.1)
    axis.set_ylabel(label)


def _short(name: str) -> str:
    return ".".join(name.split(".")[-4:])


# --- figure 5 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One image by every method.

    Args:
        title: Its name and set.
        original: The reference, `[H, W, 3]`.
        corner: Top left of the magnified square.
        side: Of the square in pixels.
        crops: Magnified squares `[side, side, 3]` by caption, the reference first.
    """

    title: str
    original: Pixels
    corner: tuple[int, int]
    side: int
    crops: Mapping[str, Pixels]


@styled
def figure5(path: Path, comparisons: Sequence[Comparison]) -> None:
    """For each image the whole reference, and the magnified square by every method in two rows."""
    across = max(math.ceil(len(c.crops) / 2) for c in comparisons)
    figure = new_figure(1.55 * (across + 2), 3.7 * len(comparisons))
    parts: Any = figure.subfigures(len(comparisons), 1, squeeze=False)
    for part, comparison in zip(parts[:, 0], comparisons, strict=True):
        grid = part.add_gridspec(2, across + 2)
        whole = part.add_subplot(grid[:, :2])
        whole.imshow(comparison.original)
        top, left = comparison.corner
        side = comparison.side
        whole.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="#ffd400", linewidth=1.8))
        whole.set_title(comparison.title)
        without_axes(whole)
        for index, (caption, crop) in enumerate(comparison.crops.items()):
            axis = part.add_subplot(grid[index // across, 2 + index % across])
            axis.imshow(crop, interpolation="nearest")
            axis.set_xlabel(caption, fontsize=8)
            without_axes(axis)
    save_figure(figure, path)


# --- convergence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line of the convergence figure: values over steps."""

    title: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    unit: str = "steps"
    logarithmic: bool = True


@styled
def convergence(path: Path, curves: Sequence[Curve]) -> None:
    """A panel for each title, with the curves of that title."""
    titles = list(dict.fromkeys(curve.title for curve in curves))
    across = min(2, len(titles))
    figure = new_figure(WIDTH, 2.6 * math.ceil(len(titles) / across) + 0.2)
    axes = panels(figure, math.ceil(len(titles) / across), across)
    for axis, title in zip(axes.flat, titles, strict=False):
        chosen = [curve for curve in curves if curve.title == title]
        for index, curve in enumerate(chosen):
            marker = MARKERS[index % len(MARKERS)] if len(curve.steps) < 40 else None
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(curve.steps, curve.values, label=curve.label, color=colour, marker=marker)
        if all(curve.logarithmic and min(curve.values) > 0 for curve in chosen):
            axis.set_yscale("log")
            plain_numbers(axis)
        axis.set_title(title)
        axis.set_xlabel(chosen[0].unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, len(handles)))
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    save_figure(figure, path)
