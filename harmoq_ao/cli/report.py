"""`harmoq report`: an HTML page on the effects of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import harmoq_ao
from harmoq_ao.cli.common import KernelDeviceOption, OverlapOption, TileOption, app, err, out
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.files import FOLDER, found_at
from harmoq_ao.common.output import check_output_file

if TYPE_CHECKING:
    from harmoq_ao.reporting import Source

_DEMO_SIDE = 256


@app.command("report")
def report_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Low-resolution images or a folder, repeatable; by default photographs from scikit-image."),
    ] = None,
    hr: Annotated[
        Path | None,
        typer.Option(help="Folder of their references by name, or without --images a root with HR and LR_bicubic/X2."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--float", help="The float model for comparison; by default bicubic interpolation.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Maximum number of pictures.")] = 6,
    worst: Annotated[
        int, typer.Option(min=0, help="Number of sites, from the lowest SQNR, whose distributions are shown.")
    ] = 6,
    device: KernelDeviceOption = "cpu",
    tile: TileOption = None,
    overlap: OverlapOption = 32,
) -> None:
    """Write an HTML report: pictures beside those of the float model, sites, distributions, convergence and size."""
    from harmoq_ao.reporting import Scene, write_report

    _check_paths(model, output)
    with err.status("Reading the model"):
        quantized = harmoq_ao.open_model(model)
        compared = None if reference is None else harmoq_ao.open_model(reference)
    shown, given = _images(images or [], hr, quantized.scale, pictures)
    scene = Scene(
        quantized,
        harmoq_ao.folder_bytes(model),
        shown,
        compared,
        left_out=given - len(shown),
        device=device,
        worst=worst,
        tile=tile,
        overlap=overlap,
    )
    write_report(scene, output)
    against = (
        "bicubic interpolation (--float compares with the float model)" if reference is None else escape(reference)
    )
    told = f"[bold]{escape(str(output))}[/]: {len(shown)} of {given} pictures, compared with {against}"
    out.print(told, highlight=False, soft_wrap=True)
    out.print(f"{output.stat().st_size:,} bytes; opens in any browser, offline", highlight=False)


def _check_paths(model: Path, output: Path) -> None:
    """Check before any work, because a report takes a while."""
    found = found_at(model)
    if found != FOLDER:
        raise ConfigError(
            "This is not a saved model",
            found=f"{model}, {found}",
            expected="a folder from harmoq quantize",
            remedy="quantize first",
        )
    check_output_file(output)


def _images(images: list[Path], hr: Path | None, scale: int, most: int) -> tuple[list[Source], int]:
    """The first `most` of the given images, decoded, and the number of all."""
    from harmoq_ao.images import list_images
    from harmoq_ao.reporting import Source

    if hr is not None:
        if len(images) > 1 or any(found_at(path) != FOLDER for path in images):
            raise ConfigError(
                "References are paired with one folder of images",
                found=", ".join(map(str, images)),
                expected="--images FOLDER --hr FOLDER, or --hr ROOT alone",
            )
        pairs = harmoq_ao.load_pairs(hr, images[0] if images else None, scale)
        return [Source(pair.name, *pair.load()) for pair in pairs[:most]], len(pairs)
    if images:
        paths = list_images(images)
        return [Source(path.name, harmoq_ao.load_image(path), None) for path in paths[:most]], len(paths)
    from harmoq_ao.recipes.demo import evaluation_images

    found = evaluation_images(scale, _DEMO_SIDE)
    return [Source(name, low, high) for name, (low, high) in list(found.items())[:most]], len(found)
