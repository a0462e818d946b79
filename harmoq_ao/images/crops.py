"""Calibration data: seeded low-resolution crops of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.images.columns import as_record

# Bicubic resampling reads two low-resolution pixels on each side: downscaled with this margin, a crop equals the crop
# of the downscaled image.
_MARGIN = 3


class SizedImages(Protocol):
    """Images by index, decoded one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class CalibrationCrops(Dataset[torch.Tensor]):
    """A fixed number of low-resolution crops `[3, size, size]`, float32, 0..1, at 8-bit precision.

    The images are taken in a seeded order, each for an equal share of consecutive crops, at seeded positions; crop
    ``i`` is the same whenever and in whatever order it is asked for. One decoded image is held at a time, so memory
    does not grow with the number of crops or images; random access decodes more often. Where an image is smaller than
    a crop, it is mirrored at its right and bottom edge until it is not.

    Args:
        images: What to cut from, see `ImageSource`; anything with a length and an index, such as `list_images`'s list.
        size: Side of a crop in low-resolution pixels.
        count: Number of crops.
        downscale: 1 if the images are low-resolution already; else the factor by which photographs are downscaled
            (bicubic with antialiasing), crop by crop, equal to downscaling the whole image first.
        seed: Fixes the order of images and the positions.

    Raises:
        ConfigError: Size, count or downscale is below 1.
        CalibrationError: There is no image.
        ImageError: Its image cannot be used; raised when a crop is taken.
    """

    def __init__(self, images: SizedImages, size: int = 64, count: int = 64, downscale: int = 1, seed: int = 0) -> None:
        for name, value in (("size", size), ("count", count), ("downscale", downscale)):
            if value < 1:
                raise ConfigError(
                    f"The {name} of calibration crops is out of range", found=value, expected="at least 1"
                )
        if len(images) == 0:
            raise CalibrationError(
                "There is nothing to calibrate on",
                found="0 images",
                expected="at least one image",
                remedy="pass a few photographs of the kind the model will upscale",
            )
        self.images, self.size, self.count, self.downscale, self.seed = images, size, count, downscale, seed
        self._order = [int(index) for index in np.random.default_rng(seed).permutation(len(images))]
        self._decoded: tuple[int, npt.NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"crop {index} of {self.count}")
        pixels, top, left = self._place(index)
        return _as_tensor(_low_resolution_crop(pixels, top, left, self.size, self.downscale))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self.count))

    def reference(self, index: int) -> torch.Tensor:
        """High-resolution reference of a crop: `[3, size * downscale, size * downscale]`, float32, 0..1."""
        pixels, top, left = self._place(index)
        rows, columns = (slice(s * self.downscale, (s + self.size) * self.downscale) for s in (top, left))
        return _as_tensor(pixels[rows, columns])

    def _place(self, index: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        pixels = self._decode(self._order[self._turn(index)])
        position = np.random.default_rng((self.seed, index))
        top = int(position.integers(pixels.shape[0] // self.downscale - self.size + 1))
        left = int(position.integers(pixels.shape[1] // self.downscale - self.size + 1))
        return pixels, top, left

    def _turn(self, index: int) -> int:
        """Place of a crop's image in the seeded order: one crop per image, or equal shares where images are fewer."""
        return index if len(self._order) >= self.count else index * len(self._order) // self.count

    def _decode(self, index: int) -> npt.NDArray[np.uint8]:
        if self._decoded is None or self._decoded[0] != index:
            self._decoded = None  # free it before decoding the next
            pixels = as_record(self.images[index]).to_uint8()
            self._decoded = (index, _mirrored_to(pixels, self.size * self.downscale))
        return self._decoded[1]


def _low_resolution_crop(
    pixels: npt.NDArray[np.uint8], top: int, left: int, size: int, scale: int
) -> npt.NDArray[np.uint8]:
    """Crop `[size, size, 3]` at low-resolution position ``(top, left)`` of the image downscaled by ``scale``."""
    if scale == 1:
        return pixels[top : top + size, left : left + size]
    above, beside = min(_MARGIN, top), min(_MARGIN, left)
    rows = min(top + size + _MARGIN, pixels.shape[0] // scale) - (top - above)
    columns = min(left + size + _MARGIN, pixels.shape[1] // scale) - (left - beside)
    region = pixels[
        (top - above) * scale : (top - above + rows) * scale,
        (left - beside) * scale : (left - beside + columns) * scale,
    ]
    small = np.asarray(Image.fromarray(region).resize((columns, rows), Image.Resampling.BICUBIC))
    return small[above : above + size, beside : beside + size]


def _as_tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255.0)).movedim(-1, 0).contiguous()


def _mirrored_to(pixels: npt.NDArray[np.uint8], least: int) -> npt.NDArray[np.uint8]:
    below, right = max(0, least - pixels.shape[0]), max(0, least - pixels.shape[1])
    if below == 0 and right == 0:
        return pixels
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="symmetric")
