"""Random pictures for tests of reading and writing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from harmoq_ao.images import ImageRecord

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 9, 13


def codes(channels: int, depth: int = 8, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray[Any, Any]:
    """`[H, W, channels]` of uint8 or uint16."""
    dtype = np.uint8 if depth == 8 else np.uint16
    return RNG.integers(0, 2**depth, (*size, channels)).astype(dtype)


def unit(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """`[H, W, C]` codes as the `[C, H, W]` tensor they stand for."""
    return torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max).movedim(-1, 0)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def doubled(record: ImageRecord) -> torch.Tensor:
    """Stands in for a model: every pixel twice in each direction."""
    return record.pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)
