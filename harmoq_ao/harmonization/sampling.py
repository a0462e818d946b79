"""Images of gradient steps: mirrored, and cut from crops to sides that the network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.sites.model import PreparedModel


def mirrored(crop: Tensor, turn: int) -> Tensor:
    """One of the eight mirrorings and rotations of `[C, S, S]`; of another shape the four that keep it."""
    if turn & 1:
        crop = crop.flip(-1)
    if turn & 2:
        crop = crop.flip(-2)
    return crop.transpose(-1, -2) if turn & 4 and crop.shape[-1] == crop.shape[-2] else crop


def allowed_side(prepared: PreparedModel, side: int) -> int:
    """The smallest side, at least `side`, that the network accepts according to its traits."""
    traits = prepared.traits
    return math.ceil(max(side, traits.size_minimum) / traits.size_multiple) * traits.size_multiple


def random_cut(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A part of `[C, H, W]`, `[C, side, side]` or as much as there is, at a random place."""
    height, width = (min(side, length) for length in image.shape[1:])
    top, left = (
        int(torch.randint(length - part + 1, (), generator=generator))
        for length, part in zip(image.shape[1:], (height, width), strict=True)
    )
    return image[:, top : top + height, left : left + width]


def check_crops(crops: Sequence[Tensor]) -> None:
    """Raise :class:`CalibrationError` unless there are crops `[C, S, S]`, all of one size."""
    if not len(crops):
        raise CalibrationError("There is nothing to refine on", found="0 crops", expected="at least one")
    shapes = {tuple(crop.shape) for crop in crops}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise CalibrationError(
            "The crops for refinement do not have one size",
            found=sorted(shapes)[:4],
            expected="[C, S, S], all the same",
            remedy="cut them with harmoq_ao.images.CalibrationCrops",
        )


def image_batches(
    prepared: PreparedModel, crops: Sequence[Tensor], count: int, batch_size: int, crop_size: int | None, seed: int
) -> list[Tensor]:
    """`count` images in batches `[B, C, S, S]`: parts of the crops of side `crop_size`, or whole crops, each once.

    Raises:
        CalibrationError: No crops, or crops of different sizes.
    """
    check_crops(crops)
    like = next(p for p in prepared.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    if crop_size is None:
        images = list(crops[:count])
    else:
        side = allowed_side(prepared, crop_size)
        images = [random_cut(crops[index % len(crops)], side, generator) for index in range(count)]
    parts = (images[i * batch_size : (i + 1) * batch_size] for i in range(math.ceil(len(images) / batch_size)))
    return [torch.stack(part).to(like) for part in parts]
