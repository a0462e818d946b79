"""`harmoq upscale`: images in, larger images out."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from harmoq_ao.common.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from harmoq_ao.runtime.file_jobs import Failure, FileUpscaler, Job
    from harmoq_ao.runtime.targets import Naming, Plan
    from harmoq_ao.runtime.tiling import Progress


_NAMED = 5  # skipped files in a line


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
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the upscaled images; for one image also a file.")
    ],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Descend into subfolders, and repeat them in the output.")
    ] = False,
    tile: TileOption = None,
    overlap: OverlapOption = 32,
    float_dtype: DtypeOption = None,
    openvino: OpenVinoOption = False,
    compiled: CompileOption = False,
    suffix: Annotated[str, typer.Option(help="Text to append to each file name.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing images.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave images alone whose results exist: continues a run.")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="Upscale in this process or on a Ray cluster.")] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of Ray's worker processes, of one CPU each; by default one per CPU."),
    ] = None,
) -> None:
    """Upscale images; transparency, gray and 16 bits are kept. One that fails is named at the end."""
    from harmoq_ao.runtime.targets import Naming

    if workers is not None and engine is not Engine.ray:
        raise ConfigError("Only Ray has workers", found=f"--workers with --engine {engine}", expected="--engine ray")
    runtime = chosen_runtime(openvino, compiled)
    plan = _planned(inputs, Naming(output, suffix, recursive, overwrite, skip_existing))
    failures: list[Failure] = []
    if plan.jobs:
        name = str(Path(model).resolve()) if os.path.exists(model) else model  # workers may run in other folders
        opened = partial(_open, name, float_dtype, runtime, fixed_tile(tile, runtime), overlap)
        failures = _done(plan.jobs, opened, workers, engine)
    kept = f", {len(plan.kept)} were there" if plan.kept else ""
    told = f"{len(plan.jobs) - len(failures)} of {len(plan.jobs)} images written to {escape(str(output))}{kept}"
    for image, message in failures:
        err.print(f"[red]{escape(str(image))}[/]: {escape(message)}", highlight=False, soft_wrap=True)
    out.print(told, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(EXIT_PARTIAL)


def _planned(inputs: list[str], naming: Naming) -> Plan:
    """The images and where they go; what is skipped is named."""
    from harmoq_ao.images import list_sources
    from harmoq_ao.runtime.targets import plan_jobs

    with err.status("Listing images"):
        listing = list_sources(inputs, naming.mirror, None if naming.names_a_file else naming.output)
        plan = plan_jobs(listing.files, naming)
    reasons: dict[str, list[str]] = {}
    for path, reason in (*listing.skipped, *((path, "the result of another image") for path in plan.results)):
        reasons.setdefault(reason, []).append(str(path))
    for reason, paths in reasons.items():
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        named = escape(", ".join(sorted(paths)[:_NAMED]))
        err.print(f"[yellow]skipped[/] {named}{more}: {reason}", highlight=False, soft_wrap=True)
    return plan


def _done(jobs: list[Job], opened: Callable[[], FileUpscaler], workers: int | None, engine: Engine) -> list[Failure]:
    """Do all jobs under progress bars; returns those that failed."""
    from harmoq_ao.common.progress import progress_bar
    from harmoq_ao.runtime.file_jobs import Job, upscale_here
    from harmoq_ao.runtime.ray_jobs import upscale_on_ray

    upscale = opened()  # for Ray too: report a model that cannot be opened before anything starts
    with progress_bar() as progress:
        task = progress.add_task("Upscaling", total=len(jobs))
        if engine is Engine.ray:
            jobs = [Job(job.image.resolve(), job.target.resolve()) for job in jobs]
            return upscale_on_ray(jobs, opened, lambda: progress.advance(task), workers=workers)
        upscale = replace(upscale, progress=_tiles_shown(progress))
        return upscale_here(jobs, upscale, lambda: progress.advance(task))


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
