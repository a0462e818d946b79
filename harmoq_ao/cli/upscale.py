"""`harmoq upscale`: images in, larger images out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from harmoq_ao.cli.common import (
    EXIT_PARTIAL,
    DtypeOption,
    ModelArgument,
    OpenVinoOption,
    OverlapOption,
    TileOption,
    app,
    err,
    out,
)
from harmoq_ao.data import (
    image_files,
    load_image,
    save_image,
)
from harmoq_ao.data.images import WRITABLE
from harmoq_ao.errors import ConfigError, DatasetError, HarmoqError, OutputError
from harmoq_ao.progress import progress_bar
from harmoq_ao.upscaler import OPENVINO_TILE, Upscaler, open_model


@app.command("upscale")
def upscale_command(
    model: ModelArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Image files, folders of them, patterns, or lists of paths (.txt)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the upscaled images.")],
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    suffix: Annotated[str, typer.Option(help="Appended to each name.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that are there already.")] = False,
) -> None:
    """Upscale images; transparency, gray and 16 bits are kept."""
    images = image_files(inputs)
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
