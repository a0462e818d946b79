"""`harmoq evaluate`: PSNR and SSIM on pairs of images."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

import harmoq_ao
from harmoq_ao.cli.common import (
    CompileOption,
    DtypeOption,
    ModelArgument,
    OpenVinoOption,
    OverlapOption,
    TileOption,
    app,
    chosen_runtime,
    fixed_tile,
    out,
)
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.output import atomic_write, check_output_file

if TYPE_CHECKING:
    from harmoq_ao import EvaluationTable, ImagePair, Upscaler
    from harmoq_ao.runtime.tiling import Model


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    hr: Annotated[Path, typer.Argument(metavar="HR_FOLDER", help="References, or a root with HR and LR_bicubic/X2.")],
    lr: Annotated[
        Path | None, typer.Argument(metavar="[LR_FOLDER]", help="Low-resolution images of the same names.")
    ] = None,
    lr_name: Annotated[
        str | None,
        typer.Option(help="Low-resolution names, such as '{name}_small{scale}'; the usual ones need no pattern."),
    ] = None,
    scale: Annotated[int | None, typer.Option(min=1, help="Fail unless the model has this scale.")] = None,
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    reference: Annotated[str | None, typer.Option("--float", help="A second model for comparison.")] = None,
    bicubic: Annotated[bool, typer.Option("--bicubic", help="Also compare with bicubic interpolation.")] = False,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    compiled: CompileOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this JSON file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this CSV file.")] = None,
) -> None:
    """Measure PSNR and SSIM of 8-bit luma on pairs of images, without a border of `scale` pixels."""
    from harmoq_ao.images.metrics import bicubic_batch

    for file in (json_file, csv_file):
        if file is not None:
            check_output_file(file)
    dtype = None if float_dtype is None else float_dtype.torch
    runtime = chosen_runtime(openvino, compiled)
    tile = fixed_tile(tile, runtime)
    upscalers = [harmoq_ao.open_model(model, dtype, runtime=runtime)]
    if reference is not None:
        upscalers.append(harmoq_ao.open_model(reference))
    factor = _common_scale(upscalers, scale)
    pairs = harmoq_ao.load_pairs(hr, lr, factor, lr_name)
    names = [u.name for u in upscalers] + (["bicubic"] if bicubic else [])
    if len(set(names)) < len(names):
        raise ConfigError("A model is compared with itself", found=names[0], expected="two different models")
    callables: list[Model] = [partial(u, tile=tile, overlap=overlap) for u in upscalers]
    if bicubic:
        callables.append(partial(bicubic_batch, scale=factor))
    tables = {name: _evaluated(name, call, pairs, factor) for name, call in zip(names, callables, strict=True)}
    if json_file is not None:
        results = {"scale": factor, "models": {name: table.to_dict() for name, table in tables.items()}}
        _write(json_file, json.dumps(results, indent=2) + "\n")
    if csv_file is not None:
        _write(csv_file, _csv(tables))
    out.print(_score_table(tables, factor, hr))


def _common_scale(upscalers: list[Upscaler], given: int | None) -> int:
    scales = {u.scale for u in upscalers} | ({given} if given is not None else set())
    if len(scales) > 1:
        found = ", ".join(f"x{u.scale} ({u.name})" for u in upscalers) + (f", --scale {given}" if given else "")
        raise ConfigError("The scales differ", found=found, expected="one scale", remedy="leave out --scale")
    return scales.pop()


def _evaluated(name: str, call: Model, pairs: list[ImagePair], scale: int) -> EvaluationTable:
    from harmoq_ao.common.progress import progress_bar

    with progress_bar() as progress:
        task = progress.add_task(f"Evaluating {escape(name)}", total=len(pairs))
        return harmoq_ao.evaluate(call, pairs, scale, on_image=lambda _: progress.advance(task))


def _score_table(tables: dict[str, EvaluationTable], scale: int, folder: Path) -> Table:
    table = Table(title=f"{escape(str(folder))}, x{scale}", title_justify="left")
    table.add_column("image")
    for name in tables:
        heading = "" if len(tables) == 1 else f"{escape(Path(name).name)}\n"
        for column in ("PSNR-Y", "SSIM-Y", "s"):
            table.add_column(f"{heading}{column}", justify="right", min_width=6, overflow="fold")
    for image in next(iter(tables.values())).scores:
        cells = [_cells(t.scores[image].psnr, t.scores[image].ssim, t.seconds[image]) for t in tables.values()]
        table.add_row(escape(image), *(text for group in cells for text in group))
    table.add_section()
    means = [_cells(t.mean.psnr, t.mean.ssim, t.mean_seconds) for t in tables.values()]
    table.add_row("mean", *(text for group in means for text in group), style="bold")
    return table


def _cells(psnr: float, ssim: float, seconds: float) -> tuple[str, str, str]:
    return f"{psnr:.3f}", f"{ssim:.4f}", f"{seconds:.2f}"


def _csv(tables: dict[str, EvaluationTable]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "image", "psnr_y", "ssim_y", "seconds"])
    for name, table in tables.items():
        for image, found in table.scores.items():
            writer.writerow([name, image, f"{found.psnr:.6f}", f"{found.ssim:.6f}", f"{table.seconds[image]:.3f}"])
        writer.writerow([name, "mean", f"{table.mean.psnr:.6f}", f"{table.mean.ssim:.6f}", f"{table.mean_seconds:.3f}"])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a file name may hold bytes that are no text
