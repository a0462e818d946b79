"""`harmoq report`: a page that shows what quantization did to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from harmoq_ao.cli.common import OverlapOption, TileOption, app, err, out
from harmoq_ao.common.errors import ConfigError, OutputError
from harmoq_ao.conversion.save import folder_bytes
from harmoq_ao.images import ImageRecord, list_images, load_image, load_pairs
from harmoq_ao.runtime.upscaler import open_model

_DEMO_SIDE = 256
_Shown = tuple[str, ImageRecord, ImageRecord | None]  # name, input and original


@app.command("report")
def report_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A saved model's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Low-resolution images or a folder, repeatable; photographs of scikit-image by default."),
    ] = None,
    hr: Annotated[
        Path | None, typer.Option(help="Their originals by name, or without --images a root with HR and LR_bicubic/X2.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--float", help="The float model to compare with; bicubic without it.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Most pictures that are shown.")] = 6,
    worst: Annotated[int, typer.Option(min=0, help="Sites of the lowest SQNR whose distributions are shown.")] = 6,
    device: Annotated[str, typer.Option(help="Whose kernels to name: cpu or cuda (which need not be there).")] = "cpu",
    tile: TileOption = None,
    overlap: OverlapOption = 32,
) -> None:
    """Write one HTML page: pictures beside the float model's, every site, distributions, convergence and size."""
    from harmoq_ao.reporting import Scene, Source, write_report  # matplotlib and jinja2 are needed here only

    _check_paths(model, output)
    with err.status("Reading the model"):
        quantized = open_model(model)
        compared = None if reference is None else open_model(reference)
    shown, given = _images(images or [], hr, quantized.scale, pictures)
    scene = Scene(
        quantized,
        folder_bytes(model),
        [Source(*image) for image in shown],
        compared,
        left_out=given - len(shown),
        device=device,
        worst=worst,
        tile=tile,
        overlap=overlap,
    )
    write_report(scene, output)
    against = "bicubic (pass --float for the float model)" if reference is None else escape(reference)
    told = f"[bold]{escape(str(output))}[/]: {len(shown)} of {given} pictures, against {against}"
    out.print(told, highlight=False, soft_wrap=True)
    out.print(f"{output.stat().st_size:,} bytes; opens in any browser, without a network", highlight=False)


def _check_paths(model: Path, output: Path) -> None:
    """Before any work: a report takes a while."""
    if not model.is_dir():
        found = "a file" if model.exists() else "no such folder"
        raise ConfigError(
            f"{model} is no saved model", found=found, expected="a folder from harmoq quantize", remedy="quantize first"
        )
    if output.is_dir() or not output.absolute().parent.is_dir():
        found = "a folder" if output.is_dir() else f"no folder {output.parent}"
        raise OutputError(
            f"{output} cannot be written", found=found, expected="a file name in an existing folder", remedy="--output"
        )


def _images(images: list[Path], hr: Path | None, scale: int, most: int) -> tuple[list[_Shown], int]:
    """The first images that were asked for, decoded, and how many there were."""
    if hr is not None:
        if len(images) > 1 or any(not path.is_dir() for path in images):
            raise ConfigError(
                "Originals are paired with one folder of images",
                found=", ".join(map(str, images)),
                expected="--images FOLDER --hr FOLDER, or --hr ROOT alone",
            )
        pairs = load_pairs(hr, images[0] if images else None, scale)
        return [(pair.name, *pair.load()) for pair in pairs[:most]], len(pairs)
    if images:
        paths = list_images(images)
        return [(path.name, load_image(path), None) for path in paths[:most]], len(paths)
    from harmoq_ao.recipes.demo import evaluation_images  # the recipes are needed here only

    found = evaluation_images(scale, _DEMO_SIDE)
    return [(name, low, high) for name, (low, high) in list(found.items())[:most]], len(found)
