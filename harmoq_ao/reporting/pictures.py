"""Pictures of a report: one image through two models, the map of their difference, all as PNG inside the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import uniform_filter
from torch import Tensor

from harmoq_ao.images import ImageRecord
from harmoq_ao.images.metrics import SSIM_WINDOW, Score, bicubic_batch, crop_to_multiple, psnr_y, score, to_uint8
from harmoq_ao.runtime.upscaler import Upscaler

Pixels = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.float32]

MAX_SIDE = 512
"""Longest side of what is shown of a picture, in high-resolution pixels: it bounds the size of the page."""
_FOCUS = 24  # side of the part whose mean error is looked at, to find where to magnify first
_CEILINGS = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 255)


@dataclass(frozen=True)
class Source:
    """An image to show.

    Args:
        name: What the page calls it.
        low: The low-resolution input.
        high: The reference, or None.
    """

    name: str
    low: ImageRecord
    high: ImageRecord | None = None


@dataclass(frozen=True)
class Window:
    """The part of a picture that is shown, in high-resolution pixels: corner, size, and the size of the whole."""

    top: int
    left: int
    height: int
    width: int
    of_height: int
    of_width: int

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return (self.height, self.width) == (self.of_height, self.of_width)

    def cut(self, values: npt.NDArray) -> npt.NDArray:
        """This part of an array `[H, W, ...]`."""
        return values[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Picture:
    """One image through the quantized model and what it is compared with.

    Args:
        name: Of the image.
        low_size: Height and width of the input.
        window: The part that is shown.
        reference: That part by the float model (or bicubic), `[H, W, 3]`.
        quantized: The same by the quantized model.
        error: Mean over the channels of the absolute difference before rounding, `[H, W]` in 8-bit levels.
        mean_error: Its mean over the whole picture.
        max_error: Its maximum over the whole picture.
        agreement: PSNR-Y of the quantized picture to the other one, in dB; infinite for equal pictures.
        scores: Against the high-resolution reference by method, if there is one; SSIM is NaN for too small pictures.
        focus: Row and column in the window around which the two differ most.
    """

    name: str
    low_size: tuple[int, int]
    window: Window
    reference: Pixels
    quantized: Pixels
    error: Levels
    mean_error: float
    max_error: float
    agreement: float
    scores: dict[str, Score]
    focus: tuple[int, int]


def compare(
    source: Source, quantized: Upscaler, reference: Upscaler | None, tile: int | None = None, overlap: int = 32
) -> Picture:
    """Run one image through both models.

    Args:
        source: The image.
        quantized: The quantized model.
        reference: The float model, or None for bicubic.
        tile: Side of the tiles in input pixels; None takes the image whole.
        overlap: Pixels that adjacent tiles share.

    Raises:
        InputError: The reference picture does not fit the scale, or the image does not fit into memory.
        ConfigError: Tile or overlap are out of range.
    """
    image, scale = source.low.pixels[None], quantized.scale
    ours = _colour(quantized(image, tile, overlap))
    bicubic = bicubic_batch(image, scale)[0]
    theirs = bicubic if reference is None else _colour(reference(image, tile, overlap))
    error = (255.0 * (ours - theirs).abs().mean(0)).numpy()
    codes = {"quantized": to_uint8(ours), "bicubic": to_uint8(bicubic)}
    if reference is not None:
        codes = {"float": to_uint8(theirs), **codes}
    window = _window(error)
    shown = codes["bicubic" if reference is None else "float"]
    return Picture(
        source.name,
        source.low.size,
        window,
        window.cut(shown),
        window.cut(codes["quantized"]),
        window.cut(error),
        float(error.mean()),
        float(error.max()),
        psnr_y(codes["quantized"], shown, 0),
        {} if source.high is None else {name: _score(c, source.high, scale) for name, c in codes.items()},
        _largest(window.cut(error), _FOCUS),
    )


def heat_ceiling(pictures: Sequence[Picture]) -> float:
    """End of the colour scale that all pictures share, in 8-bit levels: hardly a pixel lies above it."""
    most = max((float(np.quantile(p.error, 0.998)) for p in pictures), default=0.0)
    return next((float(c) for c in _CEILINGS if c >= most), 255.0)


def heat_png(error: Levels, ceiling: float) -> str:
    """The error as a picture of cividis colours, as a data URI; `ceiling` and all above it have the last colour."""
    codes = np.clip(np.round(error / ceiling * 255.0), 0, 255).astype(np.uint8)
    picture = Image.fromarray(codes, mode="L").convert("P")
    picture.putpalette(heat_colours(256).tobytes())
    return _data_uri(picture)


def heat_colours(count: int) -> Pixels:
    """Colours from no error to the ceiling, `[count, 3]`."""
    colours = matplotlib.colormaps["cividis"](np.linspace(0.0, 1.0, count))[:, :3]
    return np.round(colours * 255.0).astype(np.uint8)


def png(pixels: Pixels) -> str:
    """`[H, W, 3]` as a data URI."""
    return _data_uri(Image.fromarray(np.ascontiguousarray(pixels)))


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _colour(batch: Tensor) -> Tensor:
    """`[3, H, W]` in 0..1 of a batch of one, gray or colour."""
    return batch[0].float().clamp(0.0, 1.0).expand(3, -1, -1).cpu()


def _score(codes: Pixels, high: ImageRecord, scale: int) -> Score:
    reference = high.to_uint8()
    if min(codes.shape[:2]) - 2 * scale >= SSIM_WINDOW:
        return score(codes, reference, scale)
    return Score(psnr_y(codes, crop_to_multiple(reference, scale), scale), math.nan)


def _window(error: Levels) -> Window:
    """All of a picture, or the part of at most :data:`MAX_SIDE` around the largest errors."""
    height, width = error.shape
    shown_height, shown_width = min(height, MAX_SIDE), min(width, MAX_SIDE)
    row, column = _largest(error, _FOCUS)
    top = min(max(row - shown_height // 2, 0), height - shown_height)
    left = min(max(column - shown_width // 2, 0), width - shown_width)
    return Window(top, left, shown_height, shown_width, height, width)


def _largest(error: Levels, side: int) -> tuple[int, int]:
    """Centre of the square with the largest mean error."""
    row, column = np.unravel_index(int(uniform_filter(error, side).argmax()), error.shape)
    return int(row), int(column)
