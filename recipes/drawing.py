"""Pictures of the figures; see `figures.py` for what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harmoq_ao.recipes.charts import (
    COLOURS,
    OURS,
    WIDTH,
    log_axis,
    new_figure,
    panels,
    save_figure,
    show_image,
    square,
    styled,
)
from harmoq_ao.recipes.curves import LOSS, STEPS
from harmoq_ao.recipes.inspection import AttentionMaps

Pixels = npt.NDArray[np.uint8]


@styled
def figure1(path: Path, numbers: pd.DataFrame) -> None:
    """PSNR and SSIM against bits, a row for each set; the float model as a dashed line."""
    sets = numbers.groupby("set", sort=False)
    figure = new_figure(WIDTH, 2.6 * len(sets) + 0.3)
    axes = iter(panels(figure, 2 * len(sets)))
    for name, part in sets:
        for measure, title in (("psnr", "PSNR-Y, dB"), ("ssim", "SSIM-Y")):
            axis = next(axes)
            scores = part.pivot(index="bits", columns="quantized", values=f"{measure}_y")[part["quantized"].unique()]
            axis.plot(scores.to_numpy(), label=[f"{kind} only" for kind in scores])
            exact = (part[f"{measure}_y"] + part[f"drop_{measure}"]).iloc[0]
            axis.axhline(exact, color=OURS, linestyle="--", linewidth=1.0, label="float")
            axis.set_xticks(range(len(scores)), [f"{bits} bits" for bits in scores.index])
            axis.set_title(f"{name}: {title}")
            axis.legend()
    save_figure(figure, path)


@styled
def figure2(path: Path, numbers: pd.DataFrame, attention: AttentionMaps | None) -> None:
    """PSNR lost by kind of layer (bars), above one attention map in several models."""
    sets = numbers.groupby("set", sort=False)
    heights = [3.0 * len(sets), 2.4 if attention else 0.0]
    figure = new_figure(WIDTH, sum(heights))
    parts: Any = figure.subfigures(2, 1, height_ratios=heights) if attention else [figure]
    axes = parts[0].subplots(len(sets), 1, squeeze=False)
    for axis, (name, part) in zip(axes.flat, sets, strict=True):
        drops = part.pivot(index="layers", columns="quantized", values="drop_psnr")
        drops = drops.loc[part["layers"].unique(), part["quantized"].unique()]
        drops.rename(lambda layers: layers.replace(" ", "\n", 1)).plot.bar(ax=axis, rot=0, width=0.8)
        for bars, kind in zip(axis.containers, drops, strict=True):
            texts = drops[kind].map("{:.2f}".format).where(drops[kind].notna(), "")
            axis.bar_label(bars, texts.tolist(), fontsize=6.5, padding=1)
        axis.set(title=name, xlabel="", ylabel="PSNR-Y below float, dB")
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.2)
        axis.legend(ncols=drops.shape[1], loc="upper right")
    if attention:
        parts[1].suptitle(f"one window and head of {attention.site}", fontsize=9)
        top = max(float(values.max()) for values in attention.maps.values())
        axes = parts[1].subplots(1, len(attention.maps), squeeze=False)
        for axis, (title, values) in zip(axes.flat, attention.maps.items(), strict=True):
            image = show_image(axis, values.numpy(), cmap="cividis", vmin=0.0, vmax=top)
            axis.set_title(title)
        parts[1].colorbar(image, ax=list(axes.flat), shrink=0.85)
    save_figure(figure, path)


@styled
def figure3(
    path: Path, numbers: pd.DataFrame, changes: Mapping[str, npt.NDArray], response: pd.DataFrame, title: str
) -> None:
    """What structural residual calibration did: changes of weights, a layer's response, errors and changes by layer.

    Args:
        path: PNG.
        numbers: ``relative_error`` and ``relative_change`` by ``projection`` and ``index`` of the layer.
        changes: ``W' - W`` of a few layers, `[m, K]`, by site.
        response: Output of one layer along some tokens: float, without and with calibration.
        title: Layer and channel of the response.
    """
    figure = new_figure(WIDTH, 8.4)
    parts: Any = figure.subfigures(3, 1, height_ratios=[2.6, 2.2, 3.4])
    top, middle, bottom = parts
    axes = top.subplots(1, len(changes), squeeze=False)
    for axis, (name, change) in zip(axes.flat, changes.items(), strict=True):
        limit = float(np.quantile(np.abs(change), 0.995)) or 1.0
        image = axis.imshow(change, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set_title(f"change of {'.'.join(name.split('.')[-4:])}", fontsize=8)
        axis.set_xlabel("input channel")
        axis.grid(False)
        top.colorbar(image, ax=axis, shrink=0.9)
    axis = middle.subplots()
    response.plot(ax=axis, color=[OURS, COLOURS[1], COLOURS[0]], marker="", title=title, xlabel="token")
    axis.legend(ncols=3)
    axes = bottom.subplots(2, 1, sharex=True)
    labels = {"error": "error\nof the output", "change": "change\nof the weight"}
    for axis, (measure, label) in zip(axes, labels.items(), strict=True):
        lines = numbers.pivot(index="index", columns="projection", values=f"relative_{measure}")
        for index, name in enumerate(numbers["projection"].unique()):
            colour = OURS if name == "none" else COLOURS[index % len(COLOURS)]
            if lines[name].any():  # without SRC no weight changes
                axis.plot(lines[name], label=name, color=colour, linewidth=1.1, marker="")
        axis.set_ylabel(f"relative {label}")
    log_axis(axes[0])
    axes[1].set_xlabel("linear layer, in execution order")
    bottom.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, path)


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
    for part, comparison in zip(parts.flat, comparisons, strict=True):
        grid = part.add_gridspec(2, across + 2)
        whole = part.add_subplot(grid[:, :2])
        show_image(whole, comparison.original)
        whole.add_patch(square(comparison.corner, comparison.side))
        whole.set_title(comparison.title)
        for index, (caption, crop) in enumerate(comparison.crops.items()):
            axis = part.add_subplot(grid[index // across, 2 + index % across])
            show_image(axis, crop)
            axis.set_xlabel(caption, fontsize=8)
    save_figure(figure, path)


@styled
def convergence(path: Path, numbers: pd.DataFrame) -> None:
    """A panel for each curve, a line for each model.

    Args:
        path: PNG.
        numbers: See :func:`harmoq_ao.recipes.curves.convergence_curves`.
    """
    curves = numbers.groupby("curve", sort=False)
    figure = new_figure(WIDTH, 2.6 * math.ceil(len(curves) / 2) + 0.2)
    axes = panels(figure, len(curves))
    for axis, (title, part) in zip(axes, curves, strict=True):
        for label, line in part.groupby("bits", sort=False):
            axis.plot(line["step"], line["value"], label=label, **({} if len(line) < 40 else {"marker": ""}))
        if title == LOSS and part["value"].min() > 0:
            log_axis(axis)
        axis.set(title=title, xlabel=STEPS.get(title, "steps"))
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    save_figure(figure, path)
