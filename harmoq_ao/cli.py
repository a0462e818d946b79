"""The command `harmoq`: demo, quantize, evaluate, upscale, inspect."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import warnings
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from harmoq_ao import __version__
from harmoq_ao.config import HarmoqConfig, JointScale, Observer, Profile, SiteRule
from harmoq_ao.convert import convert_harmoq
from harmoq_ao.data import (
    CalibrationCrops,
    ImagePair,
    atomic_write,
    list_images,
    load_image,
    load_pairs,
    luma,
    save_image,
    split_photographs,
)
from harmoq_ao.data.images import WRITABLE
from harmoq_ao.errors import ConfigError, DatasetError, HarmoqError, OutputError
from harmoq_ao.evaluation import EvaluationTable, evaluate
from harmoq_ao.harmonize.presets import PRESETS
from harmoq_ao.harmonize.presets import preset as preset_of
from harmoq_ao.methods import METHODS, check_method, prepare_with
from harmoq_ao.metrics import bicubic_upscale
from harmoq_ao.prepare import prepare_harmoq
from harmoq_ao.progress import progress_bar, track
from harmoq_ao.report import Report, SiteRow
from harmoq_ao.serialization import float_bytes, folder_bytes, load_quantized, save_quantized
from harmoq_ao.tiling import Model
from harmoq_ao.upscaler import OPENVINO_TILE, Upscaler, open_float, open_model

EXIT_PARTIAL = 1
"""Some images failed, the others were written."""
EXIT_ERROR = 2
"""Nothing could be done; the message says why."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it."""

_RULE = re.compile(r"(?P<sites>.+):[Ww](?P<weight>\d+)[Aa](?P<act>\d+)")
_KINDS = ("linear", "matmul", "conv2d")

out = Console()
err = Console(stderr=True)


class FloatDtype(StrEnum):
    """Type of the parts that are not integers."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """As torch names it."""
        return torch.float32 if self is FloatDtype.float32 else torch.bfloat16


class _Group(TyperGroup):
    """Turns errors into one readable message and an exit code; `--verbose` shows the traceback instead."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("[yellow]Interrupted; outputs that were not complete were not written.[/]")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except HarmoqError as error:
            if ctx.params.get("verbose"):
                err.print_exception()
            else:
                _print_error(error)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training quantization of image super-resolution transformers to 8, 4, 3 and 2 bits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A saved model's folder, a float checkpoint, or demo:x2, x3, x4."),
]
TileOption = Annotated[int | None, typer.Option(min=8, help="Upscale in tiles of this side, in input pixels.")]
OverlapOption = Annotated[int, typer.Option(min=0, help="Pixels that adjacent tiles share.")]
OpenVinoOption = Annotated[
    bool,
    typer.Option("--openvino", help=f"Let OpenVINO run a quantized model, in tiles of {OPENVINO_TILE} by default."),
]
DtypeOption = Annotated[FloatDtype | None, typer.Option(help="Type of the parts that are not integers.")]


def _print_version(value: bool) -> None:
    if value:
        out.print(f"harmoq-ao {__version__} (torch {torch.__version__})", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show log messages and tracebacks.")] = False,
) -> None:
    """Options before the command apply to every command."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_time=False)],
    )
    logging.getLogger("harmoq_ao").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:  # remarks of libraries on how they use each other
        warnings.filterwarnings("ignore", category=UserWarning)
    if threads is not None:
        torch.set_num_threads(threads)


# --- demo -------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture, the saved models and results.json.")] = Path(
        "demo_output"
    ),
) -> None:
    """Quantize a pretrained DAT-light x2 to 8 and 4 bits, with MinMax and DOBI beside HarmoQ, and write a picture."""
    from harmoq_ao.recipes.demo import run_demo  # matplotlib and the recipes are needed here only

    run_demo(output, console=out)


# --- quantize ---------------------------------------------------------------------------------------------------------


@app.command()
def quantize(
    checkpoint: Annotated[str, typer.Argument(help="A .pth or .safetensors that spandrel knows, or demo:x2, x3, x4.")],
    output: Annotated[Path, typer.Argument(help="Folder for the saved model.")],
    calibration: Annotated[Path, typer.Option(help="Folder of photographs to calibrate on.")],
    weight_bits: Annotated[int, typer.Option(help="2 to 8; 16 or 32 is off.")] = 8,
    act_bits: Annotated[int, typer.Option(help="2 to 8; 16 or 32 is off.")] = 8,
    profile: Annotated[str, typer.Option(help="deploy or paper.")] = "deploy",
    matmul_bits: Annotated[int | None, typer.Option(help="Attention products; the profile chooses.")] = None,
    conv_bits: Annotated[int, typer.Option(help="Convolutions; 32 leaves them in float.")] = 32,
    observer: Annotated[str, typer.Option(help="minmax, percentile, mse or histogram.")] = "mse",
    joint_scale: Annotated[str, typer.Option(help="hso, search or none.")] = "hso",
    rule: Annotated[
        list[str] | None, typer.Option(help="GLOB:W8A8 or KIND:W8A8, repeatable; the last that matches a site wins.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "harmoq",
    preset: Annotated[
        str,
        typer.Option(help=f"How much optimisation: {', '.join(PRESETS)}; auto is none at 8 bits and fast below."),
    ] = "auto",
    crops: Annotated[int | None, typer.Option(min=1, help="Number of calibration crops; the preset's choice.")] = None,
    crop_size: Annotated[int, typer.Option(min=8, help="Side of a crop in low-resolution pixels.")] = 64,
    downscale: Annotated[
        bool,
        typer.Option("--downscale/--lr", help="Photographs are high-resolution (default), or low-resolution already."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the crops and of the observers' samples.")] = 0,
    float_dtype: Annotated[
        FloatDtype, typer.Option(help="Type of the parts that are not integers.")
    ] = FloatDtype.float32,
) -> None:
    """Quantize a float checkpoint with a folder of photographs, and save it."""
    config = _config(
        weight_bits=weight_bits,
        act_bits=act_bits,
        profile=profile,
        matmul_bits=matmul_bits,
        conv_bits=conv_bits,
        observer=observer,
        joint_scale=joint_scale,
        rules=tuple(map(parse_rule, rule or ())),
        seed=seed,
    )
    check_method(method)
    chosen = _preset_for(preset, weight_bits, act_bits)
    settings = preset_of(chosen)
    photographs = list_images(calibration, recursive=True)
    loaded = open_float(checkpoint)
    learned, held_out = split_photographs(photographs, seed)
    factor = loaded.scale if downscale else 1
    cut = partial(_crops, loaded=loaded, size=crop_size, factor=factor, seed=seed)
    progress = output.with_name(f"{output.name}.progress.safetensors")
    prepared = prepare_with(
        method,
        loaded,
        cut(learned, crops or settings.crops),
        config,
        preset=chosen,
        held_out=cut(held_out, settings.held_out) if held_out and settings.refine is not None else (),
        checkpoint=progress,
    )
    with err.status("Converting to integers"):
        quantized = convert_harmoq(prepared, float_dtype=float_dtype.torch)
    save_quantized(quantized, output)
    progress.unlink(missing_ok=True)
    report = quantized.report()
    size, reference = folder_bytes(output), float_bytes(loaded.model)
    out.print(
        f"[bold]{escape(str(output))}[/]: {loaded.architecture} x{loaded.scale}, W{weight_bits}A{act_bits}, {profile}, "
        f"{method}, {chosen}"
    )
    out.print(_summary(report), highlight=False)
    out.print(f"{size:,} bytes, {reference / size:.2f}x smaller than {reference:,} bytes of float32", highlight=False)


def _preset_for(preset: str, weight_bits: int, act_bits: int) -> str:
    """`auto`: 8 bits lose nothing that optimisation could win back."""
    if preset != "auto":
        return preset
    return "none" if min(weight_bits, act_bits) >= 8 else "fast"


def _crops(photographs: Sequence[Path], count: int, *, loaded: Any, size: int, factor: int, seed: int) -> list[Any]:
    """Crops for a model; for one of a single channel their luma."""
    cut = CalibrationCrops(photographs, size, count, factor, seed)
    return [crop if loaded.input_channels == 3 else luma(crop) for crop in track(cut, "Cutting crops")]


def parse_rule(text: str) -> SiteRule:
    """`GLOB:W8A8` (or a kind of site for the glob) as a rule.

    Raises:
        ConfigError: Another form, or bits out of range.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigError(
            "A rule is not readable", found=text, expected="GLOB:W8A8, such as '*.attn.qkv:W8A8' or 'matmul:W8A8'"
        )
    sites, weight, act = match["sites"], int(match["weight"]), int(match["act"])
    if sites in _KINDS:
        return SiteRule(kind=sites, weight_bits=weight, act_bits=act)  # type: ignore[arg-type]
    return SiteRule(sites, weight_bits=weight, act_bits=act)


def _config(*, profile: str, observer: str, joint_scale: str, **settings: Any) -> HarmoqConfig:
    """Text options are checked by the configuration itself, which says what it would have taken."""
    chosen: tuple[Profile, Observer, JointScale] = (profile, observer, joint_scale)  # type: ignore[assignment]
    return HarmoqConfig(profile=chosen[0], observer=chosen[1], joint_scale=chosen[2], **settings)


# --- evaluate ---------------------------------------------------------------------------------------------------------


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    hr: Annotated[Path, typer.Argument(metavar="HR_FOLDER", help="References, or a root with HR and LR_bicubic/X2.")],
    lr: Annotated[Path | None, typer.Argument(metavar="[LR_FOLDER]", help="Low-resolution images by name.")] = None,
    scale: Annotated[int | None, typer.Option(min=1, help="To check against the model's own.")] = None,
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    reference: Annotated[str | None, typer.Option("--float", help="A second model to compare with.")] = None,
    bicubic: Annotated[bool, typer.Option("--bicubic", help="Compare with bicubic, too.")] = False,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results here.")] = None,
) -> None:
    """PSNR and SSIM of luma on pairs of images, 8-bit, with a border of the scale left out."""
    dtype = None if float_dtype is None else float_dtype.torch
    tile = tile or (OPENVINO_TILE if openvino else None)
    upscalers = [open_model(model, dtype, openvino=openvino)]
    if reference is not None:
        upscalers.append(open_model(reference))
    factor = _common_scale(upscalers, scale)
    pairs = load_pairs(hr, lr, factor)
    names = [u.name for u in upscalers] + (["bicubic"] if bicubic else [])
    if len(set(names)) < len(names):
        raise ConfigError("The model is compared with itself", found=names[0], expected="two different models")
    callables: list[Model] = [partial(u, tile=tile, overlap=overlap) for u in upscalers]
    if bicubic:
        callables.append(partial(_bicubic, scale=factor))
    tables = {name: _evaluated(name, call, pairs, factor) for name, call in zip(names, callables, strict=True)}
    out.print(_score_table(tables, factor, hr))
    if json_file is not None:
        results = {"scale": factor, "models": {name: table.to_dict() for name, table in tables.items()}}
        _write(json_file, json.dumps(results, indent=2) + "\n")
    if csv_file is not None:
        _write(csv_file, _csv(tables))


def _common_scale(upscalers: list[Upscaler], given: int | None) -> int:
    scales = {u.scale for u in upscalers} | ({given} if given is not None else set())
    if len(scales) > 1:
        found = ", ".join(f"x{u.scale} ({u.name})" for u in upscalers) + (f", --scale {given}" if given else "")
        raise ConfigError("Scales do not agree", found=found, expected="one scale", remedy="leave out --scale")
    return scales.pop()


def _bicubic(image: torch.Tensor, scale: int) -> torch.Tensor:
    codes = (image[0] * 255.0).round().to(torch.uint8).movedim(0, -1).numpy()
    return torch.from_numpy(bicubic_upscale(codes, scale).copy()).movedim(-1, 0)[None].float() / 255.0


def _evaluated(name: str, call: Model, pairs: list[ImagePair], scale: int) -> EvaluationTable:
    with progress_bar() as progress:
        task = progress.add_task(f"Evaluating {escape(name)}", total=len(pairs))
        return evaluate(call, pairs, scale, on_image=lambda _: progress.advance(task))


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
        file.write(text.encode())


# --- upscale ----------------------------------------------------------------------------------------------------------


@app.command("upscale")
def upscale_command(
    model: ModelArgument,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Image files or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the upscaled images.")],
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    suffix: Annotated[str, typer.Option(help="Appended to each name.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that are there already.")] = False,
) -> None:
    """Upscale images; transparency, gray and 16 bits are kept."""
    images = list_images(inputs)
    targets = _targets(images, output, suffix, overwrite)
    tile = tile or (OPENVINO_TILE if openvino else None)
    upscaler = open_model(model, None if float_dtype is None else float_dtype.torch, openvino=openvino)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be created", found=error.strerror, remedy="choose another folder"
        ) from error
    failures: list[tuple[Path, str]] = []
    with progress_bar() as progress:
        task = progress.add_task("Upscaling", total=len(images))
        for image, target in zip(images, targets, strict=True):
            try:
                _upscale_file(upscaler, image, target, tile, overlap)
            except ConfigError:  # the same for every image
                raise
            except HarmoqError as error:
                failures.append((image, str(error)))
            progress.advance(task)
    out.print(
        f"{len(images) - len(failures)} of {len(images)} images written to {escape(str(output))}", highlight=False
    )
    for image, message in failures:
        err.print(f"[red]{escape(str(image))}[/]: {escape(message)}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(EXIT_PARTIAL)


def _targets(images: list[Path], output: Path, suffix: str, overwrite: bool) -> list[Path]:
    """Where each image goes; nothing is upscaled when two would collide, or one would replace something unasked."""
    targets = [output / f"{p.stem}{suffix}{p.suffix if p.suffix.lower() in WRITABLE else '.png'}" for p in images]
    if "/" in suffix or "\\" in suffix:
        raise ConfigError("A suffix is part of a file name", found=suffix, expected="no slash")
    twice = sorted({t.name for t in targets if targets.count(t) > 1})
    if twice:
        raise DatasetError(
            "Two images would be written to one file", found=twice[0], remedy="upscale them into different folders"
        )
    sources = {p.resolve() for p in images}
    own = next((t for t in targets if t.resolve() in sources), None)
    if own is not None:
        raise OutputError(
            "An image would replace its own source", found=own, remedy="choose another --output, or give a --suffix"
        )
    there = [t for t in targets if t.exists()]
    if there and not overwrite:
        raise OutputError(
            f"{len(there)} of the images exist already", found=there[0], remedy="pass --overwrite, or another --output"
        )
    return targets


def _upscale_file(upscaler: Upscaler, image: Path, target: Path, tile: int | None, overlap: int) -> None:
    record = load_image(image)
    result = upscaler(record.pixels[None], tile, overlap)
    save_image(target, result, like=record)


# --- inspect ----------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also list what stays in float.")] = False,
    device: Annotated[str, typer.Option(help="Whose kernels to name: cpu or cuda (which need not be there).")] = "cpu",
) -> None:
    """What of a model is quantized and how; of a float checkpoint, which sites it has."""
    with err.status("Reading the model"):
        if Path(model).is_dir():
            report = load_quantized(model).report(device)
            size: int | None = folder_bytes(model)
        else:
            report = prepare_harmoq(open_float(model), HarmoqConfig()).report()
            size = None
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    out.print(_site_table(report, every))
    out.print(_summary(report), highlight=False)
    if size is not None:
        out.print(f"{size:,} bytes on disk", highlight=False)
    else:
        out.print("A float model, shown as W8A8 of the deploy profile would quantize it.", highlight=False)


def _summary(report: Report) -> str:
    quantized = sum(row.quantized for row in report.sites)
    return (
        f"{quantized} of {len(report.sites)} sites (linears and attention products) quantized, "
        f"{100 * report.macs_share:.1f} % of all multiply-accumulates"
    )


def _site_table(report: Report, every: bool) -> Table:
    table = Table(title=escape(report.title), title_justify="left")
    for column in ("site", "kind", "shape", "bits", "bounds", "joint scale", "SQNR dB", "kernel or reason"):
        table.add_column(column, overflow="fold")
    for row in report.rows:
        if every or row.quantized:
            table.add_row(*map(escape, _row_cells(row)), style=None if row.quantized else "dim")
    return table


def _row_cells(row: SiteRow) -> tuple[str, ...]:
    bounds = f"{row.bounds[0]:.3g} .. {row.bounds[1]:.3g}" if isinstance(row.bounds, tuple) else row.bounds or ""
    joint = "" if row.joint_scale is None else f"{row.joint_scale[0]:.3g} .. {row.joint_scale[1]:.3g}"
    return (
        row.name,
        row.kind,
        "x".join(map(str, row.shape)),
        f"W{row.weight_bits}A{row.act_bits}" if row.quantized else "float",
        bounds,
        joint,
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
        row.reason or row.kernel or "",
    )


# --- errors -----------------------------------------------------------------------------------------------------------


def _print_error(error: HarmoqError) -> None:
    err.print(f"[bold red]Error:[/] [red]{escape(error.what.rstrip('.'))}.[/]", highlight=False, soft_wrap=True)
    for label, text in (("found", error.found), ("expected", error.expected), ("what to do", error.remedy)):
        if text is not None:
            err.print(f"  {label}: {escape(str(text))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
