"""Fidelity of a model on pairs of images by the protocol of `images.metrics`, with the time of each image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harmoq_ao.common.errors import InputError
from harmoq_ao.images import ImagePair, ImageRecord
from harmoq_ao.images.metrics import ScoreTable, score
from harmoq_ao.runtime.tiling import upscale

Named = tuple[str, ImageRecord, ImageRecord]
"""Name, low-resolution image, reference."""


@dataclass
class EvaluationTable(ScoreTable):
    """Scores by image name, and the seconds the model took for each.

    Attributes:
        seconds: Wall-clock time by image name. The first image of each new size also pays for what a model sets up
            once per size, so this is not a benchmark.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_seconds(self) -> float:
        """Arithmetic mean over the images; NaN of none."""
        return math.fsum(self.seconds.values()) / len(self.seconds) if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: `images` by name, and their `mean`; PSNR in dB, time in seconds.

        Raises:
            InputError: Nothing was measured.
        """
        images = {
            name: {"psnr_y": s.psnr, "ssim_y": s.ssim, "seconds": self.seconds[name]} for name, s in self.scores.items()
        }
        mean = self.mean
        return {
            "images": images,
            "mean": {"psnr_y": mean.psnr, "ssim_y": mean.ssim, "seconds": self.mean_seconds},
        }


def evaluate(
    model: Callable[[Tensor], Tensor],
    pairs: Iterable[ImagePair | Named],
    scale: int,
    tile: int | None = None,
    overlap: int = 32,
    window_multiple: int = 1,
    on_image: Callable[[str], None] | None = None,
) -> EvaluationTable:
    """Upscale every low-resolution image and compare it with its reference.

    One pair is in memory at a time. Gray images go through as three equal channels.

    Args:
        model: Upscaler of `[1, 3, H, W]` in 0..1, in evaluation mode; its result may be gray.
        pairs: Pairs of files, or images already decoded.
        scale: Upscaling factor, also the border left out of the comparison, in pixels.
        tile: Side of a tile in input pixels; None takes each image whole.
        overlap: Pixels that adjacent tiles share.
        window_multiple: What the model's input sides must be multiples of.
        on_image: Called with its name after each image.

    Raises:
        ImageError: A file cannot be decoded.
        InputError: Sizes do not fit together, or two images carry the same name.
        ConfigError: Tile, overlap or scale are out of range.
    """
    table = EvaluationTable()
    for pair in pairs:
        name, low, reference = (pair.name, *pair.load()) if isinstance(pair, ImagePair) else pair
        if name in table.scores:
            raise InputError("Two images carry the same name", found=name, expected="one name per image")
        start = time.perf_counter()
        upscaled = upscale(model, low.pixels[None], scale, tile, overlap, window_multiple)
        table.seconds[name] = time.perf_counter() - start
        table.scores[name] = score(_without_rounding_up(upscaled, reference, scale), reference.to_uint8(), scale)
        if on_image is not None:
            on_image(name)
    return table


def _without_rounding_up(upscaled: Tensor, reference: ImageRecord, scale: int) -> Tensor:
    """What is compared of an image whose low-resolution size was rounded up: it ends beyond its reference."""
    for axis, side in zip((-2, -1), reference.size, strict=True):
        if upscaled.shape[axis] == -(-side // scale) * scale:
            upscaled = upscaled.narrow(axis, 0, side - side % scale)
    return upscaled
