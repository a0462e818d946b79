"""Writing image files, whole or streamed by rows: gray, alpha, 16 bits and colour profile as in the source.

Rows are converted to codes and written in strips of a fixed height, independent of the bands they arrive in. The file
therefore does not depend on the bands, and formats that can be streamed (PNG by `png`, TIFF by tifffile) need memory
for a strip only. Pillow writes the other formats from codes that are collected at 8 bits.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from harmoq_ao.common.errors import InputError, OutputError
from harmoq_ao.common.output import atomic_write
from harmoq_ao.images.png import write_png
from harmoq_ao.images.records import Array, ImageRecord, PathLike
from harmoq_ao.images.tensors import check_image_tensor, luma, unit_floats

logger = logging.getLogger(__name__)

WRITABLE = {
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
"""File suffixes that `save_image` supports, with Pillow's names of the formats."""

_DEEP_FORMATS = ("PNG", "TIFF")
_ALPHA_FORMATS = ("PNG", "TIFF", "WEBP")
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_STRIP_PIXELS = 1 << 18
_ICC_PROFILE_TAG = (34675, 7)  # tag number, and the type UNDEFINED
_CLASSIC_TIFF_BYTES = 2**32 - 2**25  # the limit of 32-bit offsets, less room for directories


def save_image(path: PathLike, tensor: torch.Tensor, like: ImageRecord | None = None) -> None:
    """Write an image in the form of the one it was made from, whole or not at all.

    The file is written beside its target and renamed, so an interrupted write leaves the old file intact. Taken from
    ``like`` are grayscale (by BT.601 luma), 16 bits (PNG and TIFF), the colour profile, and the alpha channel, which is
    resized bicubically. Formats without alpha or 16 bits lose them with a logged warning. Palette and CMYK images are
    written as RGB, and so is 16-bit gray with alpha in TIFF, which few readers support. JPEG is written at quality 95
    without chroma subsampling, WebP lossless.

    Args:
        path: Target; its suffix, one of `WRITABLE`, picks the format. The folder must exist.
        tensor: `[3, H, W]`, `[1, H, W]` or with a leading batch dimension of 1; floating; clamped to 0..1.
        like: The source image's record.

    Raises:
        InputError: The tensor is not one image of finite values.
        OutputError: The suffix is unknown, the format cannot hold the image, or the file cannot be written (no folder,
            no permission, disk full).
    """
    _check_band(tensor)
    _save(Path(path), iter([tensor]), (tensor.shape[-2], tensor.shape[-1]), like)


def save_rows(
    path: PathLike, rows: Iterable[torch.Tensor], size: tuple[int, int], like: ImageRecord | None = None
) -> None:
    """Write an image from bands of rows; the file equals that of `save_image`, byte for byte.

    PNG and TIFF are streamed, in memory for a band and a few more rows. JPEG, WebP and BMP are first collected at 8
    bits. If a band raises, or on Ctrl-C, no file is left.

    Args:
        path: As in `save_image`.
        rows: Bands from top to bottom, each `[C, h, W]` or `[1, C, h, W]` with C of 1 or 3 in all of them; floating;
            clamped to 0..1.
        size: Height and width of the whole image.
        like: As in `save_image`.

    Raises:
        InputError: A band is not finite, or the bands do not make up an image of this size.
        OutputError: As in `save_image`.
    """
    _save(Path(path), map(_check_band, rows), size, like)


@dataclass(frozen=True)
class _Form:
    """Layout of a written file: that of the source, as far as the format supports it.

    Attributes:
        size: Height and width.
        colours: 1 (gray) or 3.
        depth: 8 or 16.
        to_gray: Whether colour is converted to gray.
        translucent: The source of the alpha channel, if there is one.
        icc_profile: The colour profile.
    """

    size: tuple[int, int]
    colours: int
    depth: int = 8
    to_gray: bool = False
    translucent: ImageRecord | None = None
    icc_profile: bytes | None = None

    @property
    def channels(self) -> int:
        """Number of channels, alpha included."""
        return self.colours + (self.translucent is not None)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Type of the codes."""
        return np.uint16 if self.depth == 16 else np.uint8

    @property
    def strip_height(self) -> int:
        """Rows per strip; the last may have fewer."""
        return min(self.size[0], max(1, _STRIP_PIXELS // self.size[1]))


def _check_band(band: torch.Tensor) -> torch.Tensor:
    check_image_tensor(band)
    if band.ndim == 4 and band.shape[0] != 1:
        raise InputError(
            "A file holds one image", found=f"a batch of {band.shape[0]}", remedy="save the images one by one"
        )
    return band


def _save(path: Path, bands: Iterator[torch.Tensor], size: tuple[int, int], like: ImageRecord | None) -> None:
    pillow_format = WRITABLE.get(path.suffix.lower())
    if pillow_format is None:
        raise OutputError(
            f"{path} cannot be written",
            found=f"suffix '{path.suffix}'",
            expected=f"one of {', '.join(WRITABLE)}",
            remedy="rename the output",
        )
    longest = _LONGEST_SIDE.get(pillow_format)
    if longest is not None and max(size) > longest:  # checked before a model runs for hours
        raise _not_encodable(path, size, pillow_format, f"sides of at most {longest}")
    with atomic_write(path) as file:
        channels, bands = _peeked(bands)
        form = _form(path, pillow_format, channels, size, like)
        strips = _strips(bands, channels, form)
        if pillow_format == "PNG":
            write_png(file, strips, (*size, form.channels), form.depth, form.icc_profile)
        elif pillow_format == "TIFF":
            _write_tiff(file, strips, form)
        else:
            _write_by_pillow(file, strips, form, pillow_format, path)


def _not_encodable(path: Path, size: tuple[int, int], pillow_format: str, found: object) -> OutputError:
    return OutputError(
        f"{path} cannot be encoded",
        found=f"{size[1]}x{size[0]} pixels: {found}",
        expected=f"an image that {pillow_format} can hold",
        remedy="choose another format, such as PNG",
    )


def _form(path: Path, pillow_format: str, channels: int, size: tuple[int, int], like: ImageRecord | None) -> _Form:
    if like is None:
        return _Form(size, channels)
    depth, translucent = like.bit_depth, None if like.alpha_codes() is None else like
    if depth == 16 and pillow_format not in _DEEP_FORMATS:
        logger.warning("%s: %s holds 8 bits per channel; the other 8 are dropped", path, pillow_format)
        depth = 8
    if translucent is not None and pillow_format not in _ALPHA_FORMATS:
        logger.warning("%s: %s holds no transparency; the alpha channel is dropped", path, pillow_format)
        translucent = None
    to_gray = like.grayscale and channels == 3
    colours = 1 if to_gray else channels
    if translucent is not None and pillow_format == "TIFF" and depth == 16:
        colours = 3  # few readers support 16-bit gray with alpha
    return _Form(size, colours, depth, to_gray, translucent, like.icc_profile)


# --- codes ------------------------------------------------------------------------------------------------------------


def _peeked(bands: Iterator[torch.Tensor]) -> tuple[int, Iterator[torch.Tensor]]:
    """The channels of the first band, and all bands; no band is kept alive while the next one is computed."""
    first = next(bands, None)
    if first is None:
        raise InputError("There are no rows to write", found="no band", expected="an image from top to bottom")
    return first.shape[-3], chain([first], bands)


def _strips(bands: Iterator[torch.Tensor], channels: int, form: _Form) -> Iterator[Array]:
    """Codes `[h, W, C]` in strips of `strip_height` rows; each strip overwrites the one before."""
    height, width = form.size
    strip = np.empty((form.strip_height, width, form.channels), form.dtype)
    done = 0
    for band in bands:
        _check_fits(band, channels, done, form)
        image, taken = band.reshape(band.shape[-3:]), 0
        while taken < image.shape[1]:
            start = done % len(strip)
            count = min(len(strip) - start, image.shape[1] - taken)
            strip[start : start + count, :, : form.colours] = _codes(image[:, taken : taken + count], form)
            taken, done = taken + count, done + count
            if done % len(strip) == 0 or done == height:
                finished = strip[: start + count]
                if form.translucent is not None:
                    alpha = _resized_alpha(form.translucent, done - len(finished), done, form.size)
                    finished[:, :, -1] = np.rint(alpha * (2**form.depth - 1))
                yield finished
        del band, image  # free them before the next band is computed
    if done < height:
        raise InputError("The image ends too early", found=f"{done} rows", expected=height)


def _check_fits(band: torch.Tensor, channels: int, done: int, form: _Form) -> None:
    height, width = form.size
    if band.shape[-3] != channels or band.shape[-1] != width or done + band.shape[-2] > height:
        raise InputError(
            "A band of rows does not fit into its image",
            found=f"shape {list(band.shape)} after {done} rows",
            expected=f"[{channels}, h, {width}] with h of at most {height - done}",
        )


def _codes(image: torch.Tensor, form: _Form) -> Array:
    """Convert floats `[C, h, W]` to codes `[h, W, colours]`, still of type float."""
    image = image.detach().to(device="cpu", dtype=torch.float32).clamp(0.0, 1.0)
    if form.to_gray:
        image = luma(image).clamp_(max=1.0)
    codes: Array = (image * (2**form.depth - 1)).round_().movedim(0, -1).numpy()
    return codes


def _resized_alpha(source: ImageRecord, start: int, stop: int, size: tuple[int, int]) -> Array:
    """Rows ``start:stop`` of the resized alpha channel, `[h, W]` in 0..1; bicubic overshoot is clamped."""
    plane, (height, width) = source.alpha_codes(), source.size
    assert plane is not None
    if source.size == size:
        return unit_floats(torch.from_numpy(plane[start:stop])).numpy()
    top, bottom = start * height / size[0], stop * height / size[0]
    # Bicubic resampling reads two pixels beyond the box, of the source or, when downscaling, of the result.
    margin = math.ceil(2 * max(1.0, height / size[0])) + 1
    first, last = max(0, math.floor(top) - margin), min(height, math.ceil(bottom) + margin)
    around = Image.fromarray(unit_floats(torch.from_numpy(plane[first:last])).numpy())
    box = (0.0, top - first, float(width), bottom - first)
    rows: Array = np.asarray(around.resize((size[1], stop - start), Image.Resampling.BICUBIC, box))
    return rows.clip(0.0, 1.0)


# --- formats ----------------------------------------------------------------------------------------------------------


def _write_tiff(file: BinaryIO, strips: Iterator[Array], form: _Form) -> None:
    import tifffile

    (height, width), profile = form.size, form.icc_profile
    shape = form.size if form.channels == 1 else (*form.size, form.channels)
    large = height * width * form.channels * form.depth // 8 > _CLASSIC_TIFF_BYTES
    with tifffile.TiffWriter(file, bigtiff=large, byteorder="<") as writer:
        writer.write(
            (zlib.compress(np.ascontiguousarray(strip, f"<u{form.depth // 8}").data) for strip in strips),
            shape=shape,
            dtype=form.dtype,
            photometric="rgb" if form.colours == 3 else "minisblack",
            planarconfig=None if form.channels == 1 else "contig",
            extrasamples=None if form.translucent is None else ["unassalpha"],
            compression="zlib",
            rowsperstrip=form.strip_height,
            extratags=[] if profile is None else [(*_ICC_PROFILE_TAG, len(profile), profile, True)],
            metadata=None,
        )
    for _ in strips:  # tifffile stops after the last strip it needs; draining raises for surplus rows
        pass


def _write_by_pillow(file: BinaryIO, strips: Iterator[Array], form: _Form, pillow_format: str, path: Path) -> None:
    height, width = form.size
    image = Image.new(_MODES[form.channels], (width, height))
    for index, strip in enumerate(strips):
        part = Image.fromarray(strip[:, :, 0] if form.channels == 1 else strip)
        image.paste(part, (0, index * form.strip_height))
    options = dict(_SAVE_OPTIONS.get(pillow_format, {}))
    if form.icc_profile is not None:
        options["icc_profile"] = form.icc_profile
    stream = _Stream(file)
    try:
        image.save(stream, pillow_format, **options)  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        if stream.failed:
            raise
        raise _not_encodable(path, form.size, pillow_format, error) from error


class _Stream:
    """A stream without a file descriptor: with one, Pillow ends a JPEG on a full disk without an error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.failed = file, False

    def write(self, data: bytes) -> int:
        """Write to the file, and remember a failure."""
        try:
            return self._file.write(data)
        except OSError:
            self.failed = True
            raise

    def flush(self) -> None:
        """Do nothing: there is no buffer."""
