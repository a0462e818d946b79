"""The paper's figures, measured here: pictures with the numbers behind them as CSV.

    python -m harmoq_ao.recipes.figures figure1 --output results --benchmark SETS --calibration PHOTOGRAPHS

`figure1` quantizes weights or activations alone; `figure2` one kind of layer at a time; `figure3` shows what structural
residual calibration changes; `figure5` compares pictures; `convergence` plots the traces of Algorithm 1 and of the
refinement. All take their models and scores from the cells below the output folder, and add what is missing there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from harmoq_ao.common.choices import METHODS
from harmoq_ao.common.errors import DatasetError
from harmoq_ao.recipes import drawing, inspection, options
from harmoq_ao.recipes.cells import HARMOQ, Cell, bicubic_cell, float_cell
from harmoq_ao.recipes.curves import convergence_curves
from harmoq_ao.recipes.demo import busiest_square
from harmoq_ao.recipes.documents import markdown_table
from harmoq_ao.recipes.inspection import OFF
from harmoq_ao.recipes.store import write_text
from harmoq_ao.recipes.study import Outcome, Study
from harmoq_ao.recipes.tables import PROJECTIONS, projection_options, title_of

Failures = dict[Cell, str]
Numbers = tuple[pd.DataFrame, Failures]
"""What a figure shows, and why cells are missing in it."""
_HEATMAPS = 3
_TOKENS = 96
_PREVIEW = 60


# --- figures 1 and 2 --------------------------------------------------------------------------------------------------


def figure1(study: Study, arguments: argparse.Namespace) -> Numbers:
    """PSNR and SSIM with weights alone, and with activations alone, at few bits."""
    cells = {
        (kind, bits): options.template(arguments, arguments.method, arguments.scale, widths)
        for kind in ("weights", "activations")
        for bits in arguments.bits
        for widths in [(bits, OFF) if kind == "weights" else (OFF, bits)]
    }
    outcome = study.run([float_cell(arguments.scale), *cells.values()], arguments.sets)
    numbers = _scores(outcome, {c: {"quantized": kind, "bits": bits} for (kind, bits), c in cells.items()})
    if len(numbers):
        drawing.figure1(study.settings.output / "figure1.png", numbers)
    return numbers, outcome.failures


def figure2(study: Study, arguments: argparse.Namespace) -> Numbers:
    """PSNR lost when one kind of layer is quantized and the rest is float; and one attention map."""
    scale, bits = arguments.scale, arguments.width
    base = options.template(arguments, arguments.method, scale, (bits, bits))
    exact = study.fresh(scale, base.config(arguments.seed))
    operands = {"both": (bits, bits), "weights": (bits, OFF), "activations": (OFF, bits)}
    cells = {
        (group, operand): replace(base, rules=inspection.only(sites, *widths), label=f"{group} ({operand})")
        for group, sites in inspection.layer_groups(exact).items()
        for operand, widths in operands.items()
        if operand == "both" or group != inspection.PRODUCTS
    }
    outcome = study.run([float_cell(scale), *cells.values()], arguments.sets)
    labels = {c: {"layers": group, "quantized": operand, "bits": bits} for (group, operand), c in cells.items()}
    numbers = _scores(outcome, labels)
    whole = [options.template(arguments, arguments.method, scale, widths) for widths in operands.values()]
    quantized, failures = study.models({cell.bits: cell for cell in whole})
    maps = inspection.compare_attention(exact, quantized, _crops(study, scale, 1), arguments.site)
    if len(numbers):
        drawing.figure2(study.settings.output / "figure2.png", numbers, maps)
    return numbers, outcome.failures | failures


def _scores(outcome: Outcome, labels: Mapping[Cell, Mapping[str, object]]) -> pd.DataFrame:
    """A line for each cell and set that were measured, with the cell's labels and the drops against the float model."""
    records = []
    for (cell, name), found in outcome.results.items():
        exact = outcome.get(float_cell(cell.scale), name)
        if cell in labels and exact is not None:
            scores = {"psnr_y": found.psnr_y, "ssim_y": found.ssim_y}
            drops = {"drop_psnr": exact.psnr_y - found.psnr_y, "drop_ssim": exact.ssim_y - found.ssim_y}
            records.append({**labels[cell], "set": name, **scores, **drops})
    return pd.DataFrame(records)


def _crops(study: Study, scale: int, count: int, size: int = 64) -> Tensor:
    """Held-out crops `[B, C, size, size]` on the device of the study."""
    crops = study.photographs.crops(study.loaded(scale), count, size, held_out=True)
    return torch.stack(crops).to(study.device)


# --- figure 3 ---------------------------------------------------------------------------------------------------------


def figure3(study: Study, arguments: argparse.Namespace) -> Numbers:
    """What SRC changes in the weights, what that does to a response, and errors by layer for every projection."""
    scale, bits, projection = arguments.scale, arguments.width, arguments.projection
    base = options.template(arguments, HARMOQ, scale, (bits, bits))
    cells = {
        name: replace(base.with_options({**projection_options(name), "refine": None}), label=f"projection {name}")
        for name in dict.fromkeys(("none", projection, *arguments.projections))
    }
    models, failures = study.models(cells)
    if not {"none", projection} <= set(models):
        return pd.DataFrame(), failures
    crops = _crops(study, scale, 4)
    exact = study.fresh(scale, base.config(arguments.seed))
    wanted = inspection.site_outputs(exact, crops)
    reached = {name: inspection.site_outputs(model, crops) for name, model in models.items()}
    changes = {name: inspection.weight_changes(model, exact) for name, model in models.items()}
    weights = {s.site.name: s.weight.detach().float().norm() for s in inspection.linear_sites(models["none"])}
    records = []
    for name in models:
        for index, (site, error) in enumerate(inspection.relative_errors(reached[name], wanted).items()):
            size = float(changes[name][site].norm() / weights[site].cpu().clamp_min(1e-12))
            place = {"projection": name, "index": index, "layer": site}
            records.append({**place, "relative_error": error, "relative_change": size})
    numbers = pd.DataFrame(records)
    errors = numbers.pivot(index="layer", columns="projection", values="relative_error")
    layer = arguments.layers[0] if arguments.layers else str((errors["none"] - errors[projection]).idxmax())
    shown = {name: changes[projection][name].numpy() for name in arguments.layers or _spread(list(wanted), layer)}
    outputs = {"float": wanted, "without SRC": reached["none"], f"SRC ({projection})": reached[projection]}
    response, channel = _response({title: found[layer] for title, found in outputs.items()})
    title = f"output channel {channel} of {layer}"
    drawing.figure3(study.settings.output / "figure3.png", numbers, shown, response, title)
    return numbers, failures


def _spread(layers: Sequence[str], chosen: str) -> list[str]:
    """A few layers between the first and the last, the chosen one among them."""
    others = [layer for layer in layers if layer != chosen]
    places = [len(others) * number // _HEATMAPS for number in range(1, _HEATMAPS)]
    return [chosen, *dict.fromkeys(others[place] for place in places if others)]


def _response(outputs: Mapping[str, Tensor]) -> tuple[pd.DataFrame, int]:
    """Outputs of one layer along the first tokens, in the channel in which the first of them varies most."""
    flat = {title: y.reshape(-1, y.shape[-1])[:_TOKENS] for title, y in outputs.items()}
    channel = int(next(iter(flat.values())).std(0).argmax())
    return pd.DataFrame({title: y[:, channel].cpu().numpy() for title, y in flat.items()}), channel


# --- figure 5 and convergence -----------------------------------------------------------------------------------------


def figure5(study: Study, arguments: argparse.Namespace) -> Numbers:
    """The same part of a few images by every method, with the PSNR and SSIM of the whole image."""
    scale, set_name, widths = arguments.scale, arguments.sets[0], (arguments.width, arguments.width)
    made = (options.template(arguments, method, scale, widths, title_of(method)) for method in arguments.methods)
    cells = {cell.label or cell.method: cell for cell in (bicubic_cell(scale), float_cell(scale), *made)}
    outcome = study.run(cells.values(), [set_name])
    scores = {title: r.images for title, cell in cells.items() if (r := outcome.get(cell, set_name)) is not None}
    if not {"bicubic", "float"} <= set(scores):
        raise DatasetError(f"Nothing was measured on {set_name}", remedy="see the failures above")
    gains = {name: exact["psnr_y"] - scores["bicubic"][name]["psnr_y"] for name, exact in scores["float"].items()}
    # Images that the float model improves most over bicubic: there is something to lose.
    images = arguments.images or sorted(gains, key=lambda name: -gains[name])[: arguments.count]
    for image in images:
        study.pair(scale, set_name, image)  # an unknown name ends here
    records = [
        {"set": set_name, "image": image, "method": title, **found[image]}
        for image in images
        for title, found in scores.items()
    ]
    comparisons = [
        _comparison(study, {t: cells[t] for t in scores}, record["image"], part, arguments)
        for _, part in pd.DataFrame(records).groupby("image", sort=False)
        for record in [part.iloc[0]]
    ]
    drawing.figure5(study.settings.output / "figure5.png", comparisons)
    return pd.DataFrame(records), outcome.failures


def _comparison(
    study: Study, cells: Mapping[str, Cell], image: str, scores: pd.DataFrame, arguments: argparse.Namespace
) -> drawing.Comparison:
    """The part of an image in which bicubic upscaling errs most, by every method."""
    scale, set_name = arguments.scale, arguments.sets[0]
    original = study.pair(scale, set_name, image).load()[1].to_uint8()
    original = original[: original.shape[0] // scale * scale, : original.shape[1] // scale * scale]
    shown = {title: study.picture(cell, set_name, image) for title, cell in cells.items()}
    side = min(arguments.zoom, *original.shape[:2])
    top, left = busiest_square(np.square(original.astype(np.float64) - shown["bicubic"]).sum(2), side, step=2)
    lines = zip(scores["method"], scores["psnr_y"], scores["ssim_y"], strict=True)
    captions = {title: f"{title}\n{psnr:.2f} dB / {ssim:.4f}" for title, psnr, ssim in lines}
    crops = {"original\n": original} | {captions[title]: picture for title, picture in shown.items()}
    parts = {title: picture[top : top + side, left : left + side] for title, picture in crops.items()}
    return drawing.Comparison(f"{set_name}: {image} (x{scale})", original, (top, left), side, parts)


def convergence(study: Study, arguments: argparse.Namespace) -> Numbers:
    """Objective and balance of Algorithm 1, loss and held-out PSNR of the refinement."""
    made = [options.template(arguments, HARMOQ, arguments.scale, (bits, bits)) for bits in arguments.bits]
    models, failures = study.models({cell.bits: cell for cell in made})
    curves = [convergence_curves(cell.bits, study.trace(cell)) for cell in made if cell.bits in models]
    numbers = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
    if len(numbers):
        drawing.convergence(study.settings.output / "convergence.png", numbers)
    return numbers, failures


# --- the command ------------------------------------------------------------------------------------------------------

_FIGURES: dict[str, Callable[[Study, argparse.Namespace], Numbers]] = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "figure5": figure5,
    "convergence": convergence,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="harmoq_ao.recipes.figures", description=(__doc__ or "").partition("\n")[0])
    commands = top.add_subparsers(dest="figure", required=True)
    for name, figure in _FIGURES.items():
        command = commands.add_parser(name, help=(figure.__doc__ or "").partition("\n")[0])
        options.add_common(command)
        add = command.add_argument
        add("--scale", type=int, default=2)
        if name in ("figure1", "convergence"):
            add("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
        else:
            add("--width", type=int, default=4 if name == "figure2" else 3, help="bits")
        if name in ("figure1", "figure2"):
            add("--method", choices=METHODS, default="dobi")
        if name == "figure2":
            add("--site", help="attention-value product whose map is shown")
        if name == "figure3":
            add("--projection", choices=PROJECTIONS[1:], default="laplacian", help="of the heatmaps")
            add("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
            add("--layers", nargs="+", help="linear layers of the heatmaps; the first one's response")
        if name == "figure5":
            add("--methods", choices=METHODS, nargs="+", default=list(METHODS))
            add("--images", nargs="+", help="names; by default those that the float model improves most")
            add("--count", type=int, default=2, help="how many, without --images")
            add("--zoom", type=int, default=64, help="side of the magnified part in pixels")
    return top


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure a figure, draw it and write its numbers.

    Returns:
        0, 1 where cells failed, 2 where nothing could be done, 130 where it was interrupted.
    """
    arguments = parser().parse_args(sys.argv[1:] if argv is None else list(argv))

    def measure() -> bool:
        study = options.open_study(arguments)
        numbers, failures = _FIGURES[arguments.figure](study, arguments)
        write_text(study.settings.output / f"{arguments.figure}.csv", numbers.to_csv(index=False, lineterminator="\n"))
        preview = markdown_table(numbers.head(_PREVIEW).round(4))
        (console or Console()).print(Markdown(f"**{arguments.figure}**: {len(numbers)} numbers\n\n{preview}"))
        return not failures

    return options.guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
