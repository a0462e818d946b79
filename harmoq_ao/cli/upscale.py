"""`harmoq upscale`: images in, larger images out."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import harmoq_ao
from harmoq_ao.cli.common import (
    EXIT_PARTIAL,
    CompileOption,
    DtypeOption,
    FloatDtype,
    ModelArgument,
    OpenVinoOption,
    OverlapOption,
    TileOption,
    app,
    chosen_runtime,
    err,
    fixed_tile,
    out,
)
from harmoq_ao.common.choices import Runtime
from harmoq_ao.common.errors import ConfigError, DatasetError, OutputError
from harmoq_ao.common.output import make_folder

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from harmoq_ao.runtime.file_jobs import FileUpscaler
    from harmoq_ao.runtime.tiling import Progress


class Engine(StrEnum):
    """Where images are upscaled."""

    local = "local"
    ray = "ray"


@app.command("upscale")
def upscale_command(
    model: ModelArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Image files, folders, glob patterns, or lists of paths (.txt)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the upscaled images.")],
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    compiled: CompileOption = False,
    suffix: Annotated[str, typer.Option(help="Text to append to each file name.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing images.")] = False,
    engine: Annotated[Engine, typer.Option(help="Upscale in this process or on a Ray cluster.")] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of Ray's worker processes, of one CPU each; by default one per CPU."),
    ] = None,
) -> None:
    """Upscale images; transparency, gray and 16 bits are kept."""
    from harmoq_ao.common.progress import progress_bar
    from harmoq_ao.runtime.file_jobs import Job, upscale_here
    from harmoq_ao.runtime.ray_jobs import upscale_on_ray

    images = harmoq_ao.image_files(inputs)
    jobs = list(map(Job, images, _targets(images, output, suffix, overwrite)))
    if workers is not None and engine is not Engine.ray:
        raise ConfigError("Only Ray has workers", found=f"--workers with --engine {engine}", expected="--engine ray")
    runtime = chosen_runtime(openvino, compiled)
    name = str(Path(model).resolve()) if Path(model).exists() else model  # workers may run in other folders
    opened = partial(_open, name, float_dtype, runtime, fixed_tile(tile, runtime), overlap)
    upscale = opened()  # for Ray too: report a model that cannot be opened before anything starts
    make_folder(output)
    with progress_bar() as progress:
        task = progress.add_task("Upscaling", total=len(jobs))
        if engine is Engine.ray:
            jobs = [Job(job.image.resolve(), job.target.resolve()) for job in jobs]
            failures = upscale_on_ray(jobs, opened, lambda: progress.advance(task), workers=workers)
        else:
            upscale = replace(upscale, progress=_tiles_shown(progress))
            failures = upscale_here(jobs, upscale, lambda: progress.advance(task))
    told = f"{len(images) - len(failures)} of {len(images)} images written to {escape(str(output))}"
    out.print(told, highlight=False, soft_wrap=True)
    for image, message in failures:
        err.print(f"[red]{escape(str(image))}[/]: {escape(message)}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(EXIT_PARTIAL)


def _open(model: str, float_dtype: FloatDtype | None, runtime: Runtime, tile: int | None, overlap: int) -> FileUpscaler:
    from harmoq_ao.runtime.file_jobs import FileUpscaler

    upscaler = harmoq_ao.open_model(model, None if float_dtype is None else float_dtype.torch, runtime=runtime)
    return FileUpscaler(upscaler, tile, overlap)


def _tiles_shown(bar: Bar) -> Progress:
    """Add a second bar for the tiles of the current image, visible where it has several."""
    task = bar.add_task("  its tiles", total=1, visible=False)

    def show(done: int, total: int) -> None:
        if done == 1:
            bar.reset(task, total=total, visible=total > 1)
        bar.update(task, completed=done)

    return show


def _targets(images: list[Path], output: Path, suffix: str, overwrite: bool) -> list[Path]:
    """The output of each image.

    Raises:
        OutputError: An output exists already, or is the source of another.
        DatasetError: Two images have the same output.
    """
    from harmoq_ao.images import WRITABLE

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
