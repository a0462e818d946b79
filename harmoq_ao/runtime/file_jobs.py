"""Upscaling of image files one after the other, and the job of a single file that every engine runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmoq_ao.common.errors import ConfigError, HarmoqError
from harmoq_ao.common.output import make_folder
from harmoq_ao.images import load_image, save_rows
from harmoq_ao.runtime.tiling import Progress
from harmoq_ao.runtime.upscaler import Upscaler

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Job:
    """One image to upscale.

    Args:
        image: The file.
        target: Where the result goes; it appears there whole or not at all, so a job can be repeated.
    """

    image: Path
    target: Path


Failure = tuple[Path, str]
"""An image that was not upscaled, and why."""
UpscaleFile = Callable[[Job], None]
"""Does one job, or raises HarmoqError."""


@dataclass(frozen=True)
class FileUpscaler:
    """A model applied to files.

    Args:
        upscaler: The model.
        tile: Side of a tile in input pixels; None takes images whole.
        overlap: Pixels that adjacent tiles share.
        progress: Called after each tile.
    """

    upscaler: Upscaler
    tile: int | None = None
    overlap: int = 32
    progress: Progress | None = None

    def __call__(self, job: Job) -> None:
        """Upscale one image; transparency, gray and 16 bits are kept.

        In tiles, PNG and TIFF are written row of tiles by row of tiles, and the result is never in memory as a whole.

        Raises:
            ConfigError: Tile or overlap are out of range, for any image.
            HarmoqError: This image cannot be read, upscaled or written.
        """
        record = load_image(job.image)
        height, width = (side * self.upscaler.scale for side in record.size)
        make_folder(job.target.parent)
        rows = self.upscaler.rows(record, self.tile, self.overlap, self.progress)
        save_rows(job.target, rows, (height, width), like=record)


def upscale_here(jobs: Sequence[Job], upscale: UpscaleFile, advance: Callable[[], None]) -> list[Failure]:
    """Do all jobs in this process. What goes wrong with one image, foreseen or not, leaves the others alone.

    Args:
        jobs: In this order.
        upscale: Does one.
        advance: Called after each.

    Raises:
        ConfigError: A setting that fits no image.
    """
    failures: list[Failure] = []
    for job in jobs:
        try:
            upscale(job)
        except ConfigError:  # the same for every image
            raise
        except Exception as error:
            failures.append((job.image, reason_for(error)))
        advance()
    return failures


def reason_for(error: Exception) -> str:
    """Why an image was not upscaled; of an error that nobody foresaw, its type too, and the traceback is logged."""
    if isinstance(error, HarmoqError):
        return str(error)
    logger.debug("an error that was not foreseen", exc_info=error)
    first = (str(error).strip() or "no message").splitlines()[0][:_LONGEST_REASON]
    return f"{type(error).__name__}: {first}. What to do: run it with --verbose, and report it."
