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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from harmoq_ao.baselines.methods import METHODS
from harmoq_ao.common.errors import DatasetError
from harmoq_ao.recipes import drawing, inspection, options
from harmoq_ao.recipes.cells import HARMOQ, Cell, bicubic_cell, float_cell
from harmoq_ao.recipes.curves import convergence_curves
from harmoq_ao.recipes.demo import busiest_square
from harmoq_ao.recipes.documents import csv_text, write_text
from harmoq_ao.recipes.study import Outcome, Study
from harmoq_ao.recipes.tables import PROJECTIONS, projection_options, title_of

OFF = inspection.OFF
_HEATMAPS = 3
_TOKENS = 96


@dataclass
class Numbers:
    """What a figure shows, as records of equal keys, and why cells are missing in it."""

    records: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[Cell, str] = field(default_factory=dict)

    def add_scores(self, outcome: Outcome, cell: Cell, sets: Sequence[str], **labels: object) -> None:
        """A record for each set that the cell and the float model were measured on."""
        for name in sets:
            found, exact = outcome.get(cell, name), outcome.get(float_cell(cell.scale), name)
            if found is None or exact is None:
                continue
            scores = {"psnr_y": found.psnr_y, "ssim_y": found.ssim_y}
            drops = {"drop_psnr": exact.psnr_y - found.psnr_y, "drop_ssim": exact.ssim_y - found.ssim_y}
            self.records.append({**labels, "set": name, **scores, **drops})


# --- figures 1 and 2 --------------------------------------------------------------------------------------------------


def figure1(study: Study, arguments: argparse.Namespace) -> Numbers:
    """PSNR and SSIM with weights alone, and with activations alone, at few bits."""
    kinds: dict[str, Callable[[int], tuple[int, int]]] = {
        "weights": lambda b: (b, OFF),
        "activations": lambda b: (OFF, b),
    }
    exact = float_cell(arguments.scale)
    cells = {
        (kind, bits): options.template(arguments, arguments.method, arguments.scale, widths(bits))
        for kind, widths in kinds.items()
        for bits in arguments.bits
    }
    outcome = study.run([exact, *cells.values()], arguments.sets)
    numbers = Numbers(failures=outcome.failures)
    for (kind, bits), cell in cells.items():
        numbers.add_scores(outcome, cell, arguments.sets, quantized=kind, bits=bits)
    limits = {name: outcome.get(exact, name) for name in arguments.sets}
    known = {name: (found.psnr_y, found.ssim_y) for name, found in limits.items() if found is not None}
    drawing.figure1(study.settings.output / "figure1.png", numbers.records, known)
    return numbers


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
    numbers = Numbers(failures=outcome.failures)
    for (group, operand), cell in cells.items():
        numbers.add_scores(outcome, cell, arguments.sets, layers=group, quantized=operand, bits=bits)
    whole = {f"W{w}A{a}": options.template(arguments, arguments.method, scale, (w, a)) for w, a in operands.values()}
    quantized, failures = study.models(whole)
    numbers.failures |= failures
    maps = inspection.compare_attention(exact, quantized, _crops(study, scale, 1), arguments.site)
    drawing.figure2(study.settings.output / "figure2.png", numbers.records, maps)
    return numbers


def _crops(study: Study, scale: int, count: int, size: int = 64) -> Tensor:
    """Held-out crops `[B, C, size, size]` on the device of the study."""
    crops = study.photographs.crops(study.loaded(scale), count, size, held_out=True)
    return torch.stack(list(crops)).to(study.settings.device)


# --- figure 3 ---------------------------------------------------------------------------------------------------------


def figure3(study: Study, arguments: argparse.Namespace) -> Numbers:
    """What SRC changes in the weights, what that does to a response, and errors by layer for every projection."""
    scale, bits = arguments.scale, arguments.width
    base = options.template(arguments, HARMOQ, scale, (bits, bits))
    cells = {
        name: replace(base.with_options({**projection_options(name), "refine": None}), label=f"projection {name}")
        for name in dict.fromkeys(("none", arguments.projection, *arguments.projections))
    }
    models, failures = study.models(cells)
    numbers, crops = Numbers(failures=failures), _crops(study, scale, 4)
    if not {"none", arguments.projection} <= set(models):
        return numbers
    exact = study.fresh(scale, base.config(arguments.seed))
    wanted = inspection.site_outputs(exact, crops)
    reached = {name: inspection.site_outputs(model, crops) for name, model in models.items()}
    changes = {name: inspection.weight_changes(model, exact) for name, model in models.items()}
    weights = {s.site.name: s.weight.detach().float().norm() for s in inspection.linear_sites(models["none"])}
    for name in models:
        errors = inspection.relative_errors(reached[name], wanted)
        for index, site in enumerate(errors):
            size = float(changes[name][site].norm() / weights[site].cpu().clamp_min(1e-12))
            record = {"projection": name, "index": index, "layer": site}
            numbers.records.append({**record, "relative_error": errors[site], "relative_change": size})
    layer = arguments.layers[0] if arguments.layers else _most_improved(numbers.records, arguments.projection)
    shown = arguments.layers or _spread(list(wanted), layer)
    series = {n: [r for r in numbers.records if r["projection"] == n] for n in models}
    found = drawing.Calibration(
        {name: changes[arguments.projection][name].numpy() for name in shown},
        *_response(layer, wanted, reached["none"], reached[arguments.projection], arguments.projection),
        {n: [r["relative_error"] for r in records] for n, records in series.items()},
        {n: [r["relative_change"] for r in records] for n, records in series.items()},
    )
    drawing.figure3(study.settings.output / "figure3.png", found)
    return numbers


def _most_improved(records: Sequence[Mapping[str, Any]], projection: str) -> str:
    """The layer whose error SRC reduces most."""
    errors = {(r["projection"], r["layer"]): r["relative_error"] for r in records}
    layers = [layer for name, layer in errors if name == "none"]
    return max(layers, key=lambda layer: errors["none", layer] - errors[projection, layer])


def _spread(layers: Sequence[str], chosen: str) -> list[str]:
    """A few layers between the first and the last, the chosen one among them."""
    others = [layer for layer in layers if layer != chosen]
    places = [len(others) * number // _HEATMAPS for number in range(1, _HEATMAPS)]
    return [chosen, *dict.fromkeys(others[place] for place in places if others)]


def _response(
    layer: str, wanted: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], str]:
    """Output of one layer along the first tokens, in the channel that varies most."""
    rows = {"float": wanted[layer], "without SRC": before[layer], f"SRC ({name})": after[layer]}
    flat = {title: y.reshape(-1, y.shape[-1]) for title, y in rows.items()}
    channel = int(flat["float"][:_TOKENS].std(0).argmax())
    lines = {title: y[:_TOKENS, channel].cpu().numpy() for title, y in flat.items()}
    return lines, f"output channel {channel} of {layer}"


# --- figure 5 and convergence -----------------------------------------------------------------------------------------


def figure5(study: Study, arguments: argparse.Namespace) -> Numbers:
    """The same part of a few images by every method, with the PSNR and SSIM of the whole image."""
    scale, set_name = arguments.scale, arguments.sets[0]
    cells = {"bicubic": bicubic_cell(scale), "float": float_cell(scale)}
    for method in arguments.methods:
        title, widths = title_of(method), (arguments.width, arguments.width)
        cells[title] = options.template(arguments, method, scale, widths, title)
    outcome = study.run(cells.values(), [set_name])
    measured = {title: cell for title, cell in cells.items() if outcome.get(cell, set_name) is not None}
    numbers = Numbers(failures=outcome.failures)
    comparisons = []
    for image in arguments.images or _interesting(outcome, scale, set_name, arguments.count):
        study.pair(scale, set_name, image)  # says so where there is none
        scores = {title: outcome.results[cell, set_name].image(image) for title, cell in measured.items()}
        for title, score in scores.items():
            numbers.records.append({"set": set_name, "image": image, "method": title, **score})
        comparisons.append(_comparison(study, measured, scores, set_name, image, arguments.zoom))
    drawing.figure5(study.settings.output / "figure5.png", comparisons)
    return numbers


def _interesting(outcome: Outcome, scale: int, set_name: str, count: int) -> list[str]:
    """Images that the float model improves most over bicubic: there is something to lose."""
    exact, bicubic = (outcome.get(cell, set_name) for cell in (float_cell(scale), bicubic_cell(scale)))
    if exact is None or bicubic is None:
        raise DatasetError(f"Nothing was measured on {set_name}", remedy="see the failures above")
    images = exact.record["scores"]["images"]
    gains = {name: exact.image(name)["psnr_y"] - bicubic.image(name)["psnr_y"] for name in images}
    return sorted(gains, key=lambda name: -gains[name])[:count]


def _comparison(
    study: Study,
    cells: Mapping[str, Cell],
    scores: Mapping[str, Mapping[str, float]],
    set_name: str,
    image: str,
    zoom: int,
) -> drawing.Comparison:
    scale = next(iter(cells.values())).scale
    original = study.pair(scale, set_name, image).load()[1].to_uint8()
    original = original[: original.shape[0] // scale * scale, : original.shape[1] // scale * scale]
    shown = {title: study.picture(cell, set_name, image) for title, cell in cells.items()}
    side = min(zoom, *original.shape[:2])
    errors = np.square(original.astype(np.float64) - shown["bicubic"]).sum(2)
    top, left = busiest_square(errors, side, step=2)
    captions = {t: f"{t}\n{s['psnr_y']:.2f} dB / {s['ssim_y']:.4f}" for t, s in scores.items()}
    crops = {"original\n": original} | {captions[title]: picture for title, picture in shown.items()}
    parts = {title: picture[top : top + side, left : left + side] for title, picture in crops.items()}
    return drawing.Comparison(f"{set_name}: {image} (x{scale})", original, (top, left), side, parts)


def convergence(study: Study, arguments: argparse.Namespace) -> Numbers:
    """Objective and balance of Algorithm 1, loss and held-out PSNR of the refinement."""
    cells = {
        f"W{bits}A{bits}": options.template(arguments, HARMOQ, arguments.scale, (bits, bits)) for bits in arguments.bits
    }
    models, failures = study.models(cells)
    numbers, curves = Numbers(failures=failures), []
    for name in models:
        making = study.store.making(study.identity(cells[name]))
        assert making is not None
        curves += convergence_curves(name, making["trace"] or {})
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            numbers.records.append({"curve": curve.title, "bits": curve.label, "step": step, "value": value})
    if curves:
        drawing.convergence(study.settings.output / "convergence.png", curves)
    return numbers


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
        command.add_argument("--scale", type=int, default=2)
        command.add_argument("--sets", nargs="+", default=["Set5"], help="folders below --benchmark")
        if name in ("figure1", "convergence"):
            command.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
        else:
            command.add_argument("--width", type=int, default=4 if name == "figure2" else 3, help="bits")
        if name in ("figure1", "figure2"):
            command.add_argument("--method", type=options.methods, default="dobi")
        if name == "figure2":
            command.add_argument("--site", help="attention-value product whose map is shown")
        if name == "figure3":
            command.add_argument("--projection", choices=PROJECTIONS[1:], default="laplacian", help="of the heatmaps")
            command.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
            command.add_argument("--layers", nargs="+", help="linear layers of the heatmaps; the first one's response")
        if name == "figure5":
            command.add_argument("--methods", type=options.methods, nargs="+", default=list(METHODS))
            command.add_argument(
                "--images", nargs="+", help="names; by default those that the float model improves most"
            )
            command.add_argument("--count", type=int, default=2, help="how many, without --images")
            command.add_argument("--zoom", type=int, default=64, help="side of the magnified part in pixels")
    return top


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure a figure, draw it and write its numbers.

    Returns:
        0, 1 where cells failed, 2 where nothing could be done, 130 where it was interrupted.
    """
    arguments = parser().parse_args(sys.argv[1:] if argv is None else list(argv))

    def measure() -> bool:
        study = options.open_study(arguments)
        numbers = _FIGURES[arguments.figure](study, arguments)
        header = list(numbers.records[0]) if numbers.records else []
        lines = [header, *(list(record.values()) for record in numbers.records)]
        write_text(study.settings.output / f"{arguments.figure}.csv", csv_text(lines))
        (console or Console()).print(_preview(arguments.figure, numbers))
        return not numbers.failures

    return options.guarded(measure)


def _preview(name: str, numbers: Numbers, most: int = 60) -> Table:
    table = Table(
        title=f"{name}: {len(numbers.records)} numbers" + ("" if len(numbers.records) <= most else ", the first")
    )
    for key in numbers.records[0] if numbers.records else ():
        table.add_column(key, overflow="fold")
    for record in numbers.records[:most]:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else escape(str(v)) for v in record.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
