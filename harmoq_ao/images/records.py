"""Decoded images: samples in the precision of their file, converted to floats on access."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harmoq_ao.common.errors import ImageError
from harmoq_ao.images.tensors import unit_floats

PathLike = str | os.PathLike[str]
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """A decoded image, and what is needed to write its upscaled version in the same form.

    It holds the samples in the file's own precision: 8-bit colour takes 3 bytes a pixel, where floats would take 12.
    `pixels` and `alpha` are converted on each access.

    Attributes:
        codes: `[H, W, C]`, uint8, uint16, or float32 in 0..1; C of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB,
            alpha). As displayed (EXIF rotation applied), colour not multiplied by alpha.
        mode: Pillow's mode of the source, such as ``L``, ``P``, ``I;16`` or ``CMYK``.
        icc_profile: The colour profile to write back, if there was one for gray or RGB.
        path: Where the image came from.
    """

    codes: Array
    mode: str = "RGB"
    icc_profile: bytes | None = None
    path: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def grayscale(self) -> bool:
        """Whether the source had no colour; `pixels` then holds three equal channels."""
        return self.codes.shape[2] < 3

    @property
    def bit_depth(self) -> int:
        """8 or 16, the precision per channel that was read."""
        return 8 if self.codes.dtype == np.uint8 else 16

    @property
    def pixels(self) -> torch.Tensor:
        """`[3, H, W]`, float32, 0..1, RGB, in its own memory."""
        return _own_floats(self.colour_codes()[0])

    @property
    def alpha(self) -> torch.Tensor | None:
        """`[1, H, W]`, float32, 0..1, in its own memory, or ``None`` for an opaque image."""
        plane = self.alpha_codes()
        return None if plane is None else _own_floats(torch.from_numpy(plane))[None]

    def colour_codes(self) -> torch.Tensor:
        """The colour as `[1, 3, H, W]` of the type of the codes, without a copy."""
        colours = torch.from_numpy(self.codes[:, :, : 1 if self.grayscale else 3])
        return colours.movedim(-1, 0)[None].expand(-1, 3, -1, -1)

    def alpha_codes(self) -> Array | None:
        """The alpha channel as `[H, W]` of the type of the codes, without a copy; ``None`` for an opaque image."""
        return self.codes[:, :, -1] if self.codes.shape[2] in (2, 4) else None

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """The colour at 8 bits, `[H, W, 3]`, in its own memory."""
        if self.codes.dtype == np.uint8:
            colours = self.codes[:, :, :1] if self.grayscale else self.codes[:, :, :3]
            return np.repeat(colours, 3, axis=2) if self.grayscale else colours.copy()
        codes: npt.NDArray[np.uint8] = (self.pixels * 255.0).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
        return codes


def image_from_array(array: Array) -> ImageRecord:
    """Convert an array to a record: `[H, W]` or `[H, W, C]` with C of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).

    Args:
        array: uint8, uint16, bool, or float in 0..1; it is copied.

    Raises:
        ImageError: Shape, dtype or values are none of these.
    """
    return record_of(np.array(array, order="C"))


def record_of(array: Array, mode: str | None = None, icc_profile: bytes | None = None) -> ImageRecord:
    """As `image_from_array`, without a copy where possible: the caller must not change the array afterwards."""
    channels = array[:, :, None] if array.ndim == 2 else array
    if channels.ndim != 3 or channels.shape[2] not in (1, 2, 3, 4) or 0 in channels.shape:
        raise ImageError(
            "an array is not an image",
            found=f"shape {list(array.shape)}",
            expected="[H, W] or [H, W, C] with C of 1 to 4 and no side of 0",
        )
    codes = np.ascontiguousarray(_codes(channels))
    return ImageRecord(codes, mode or {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[codes.shape[2]], icc_profile)


def _own_floats(codes: torch.Tensor) -> torch.Tensor:
    return codes.clone(memory_format=torch.contiguous_format) if codes.is_floating_point() else unit_floats(codes)


def _codes(array: Array) -> Array:
    """The array in the type that a record holds."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()  # NaN where any value is
        if low >= 0.0 and high <= 1.0:
            return array.astype(np.float32, copy=False)
        found = f"floats from {low} to {high}"
    else:
        found = f"dtype {array.dtype}"
    raise ImageError(
        "the image's values have no known range",
        found=found,
        expected="8 or 16 bits without sign, or floats in 0..1",
        remedy="scale the image to one of these",
    )
