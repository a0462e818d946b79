"""Reading image files: grayscale, alpha, palettes, 16 bits, and typed errors for damaged files.

Files are decoded by Pillow. It holds colour at 8 bits only, so 16-bit colour is decoded in two passes (torchvision
takes one for such a PNG, but crashed the process on a truncated file). TIFF files that it does not know are left to
tifffile.
"""

from __future__ import annotations

import io
import logging
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from harmoq_ao.common.errors import ImageError
from harmoq_ao.common.files import check_file
from harmoq_ao.images.records import Array, ImageRecord, PathLike, record_of
from harmoq_ao.images.tiff import is_tiff, read_tiff, tiff_size

logger = logging.getLogger(__name__)
_pillow_limits = threading.Lock()
T = TypeVar("T")

MAX_PIXELS = 178_956_970
"""Largest image read by default, in pixels (Pillow's own limit against decompression bombs)."""

_FILE_BYTES = 16, 64 << 20  # most bytes of a file: those of a pixel of four floats, and of all beside the pixels
_MAX_TEXT_BYTES = 64 << 20  # of a text or profile of a PNG, unpacked: as much as Pillow allows all of a file together
_BAND_PIXELS = 1 << 20
_CONVERTIBLE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION_TAG = 0x0112
# The raw mode that makes Pillow read the low bytes of 16-bit samples in place of the high ones; N is native byte order.
_LOW_BYTES = {
    "LA;16B": "RGBA",
    **{f"{colour};16{order}": f"{colour};16{other}" for colour in ("RGB", "RGBA") for order, other in ("BL", "LB")},
    **{f"{colour};16N": f"{colour};16{'B' if sys.byteorder == 'little' else 'L'}" for colour in ("RGB", "RGBA")},
}
# Most decoded bytes for one of the file, of PNG and of a TIFF's compressions; samples of gray and palettes may be bits.
_DENSEST = {"PNG": 1100, "raw": 8, "packbits": 200, "tiff_lzw": 4096, "tiff_adobe_deflate": 1100, "tiff_deflate": 1100}
_LEAST_BITS = {"RGB": 24, "RGBA": 32, "LA": 16, "I;16": 16, "CMYK": 32}
# Raised by Pillow and its decoders for corrupt data.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(path: PathLike, max_pixels: int = MAX_PIXELS) -> ImageRecord:
    """Read an image file of any mode as RGB.

    Palettes are expanded, transparency of every kind becomes ``alpha``, CMYK is converted without its profile, the
    EXIF rotation is applied, and of an animation the first frame is taken. 16 bits are kept for gray images, for
    colour PNG and TIFF; a warning is logged where a layout (such as separate colour planes) is read at 8 bits instead.

    Args:
        path: The file.
        max_pixels: Larger images are refused before they are decoded; beyond the default, Pillow's own limit has to be
            raised too.

    Raises:
        ImageError: The file is missing, empty, truncated, corrupt, not an image, without pixels, or too large.
    """
    path = Path(path)
    size = _check_file(path, max_pixels)
    return replace(_decoded(lambda: path, str(path), size, max_pixels), path=path)


@dataclass(frozen=True, order=True)
class EncodedImage:
    """An image file in memory, decoded on request.

    Attributes:
        row: Its row in the data set, the order of images.
        name: Its name in error messages.
        data: The bytes of the file.
    """

    row: int
    name: str
    data: bytes = field(repr=False)

    def load(self) -> ImageRecord:
        """Decode it, as `load_image` does with a file.

        Raises:
            ImageError: As in `load_image`.
        """
        return _decoded(lambda: io.BytesIO(self.data), self.name, len(self.data), MAX_PIXELS)


def _decoded(opened: Callable[[], Path | BinaryIO], name: str, size: int, max_pixels: int) -> ImageRecord:
    """Decode a file of ``size`` bytes, which is opened more than once where it holds 16-bit colour or long texts."""

    def decode() -> ImageRecord:
        with _without_bomb_warning(), Image.open(opened()) as image:
            _check_size(image.size, max_pixels)
            _check_held(image, size)
            rawmode = _colour_rawmode(image)
            deep = _read_deep_colour(opened, name, rawmode) if ";16" in rawmode else None
            return _record_from_pillow(image, name) if deep is None else deep

    try:
        return _with_long_texts(decode)
    except Image.DecompressionBombError as error:
        raise _in_file(name, _too_large(str(error).rstrip("."), max_pixels)) from error
    except UnidentifiedImageError as error:
        return _unknown_to_pillow(opened, name, size, max_pixels, error)
    except ImageError as error:
        raise _in_file(name, error) from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read", found="permission denied", remedy="change its mode") from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is corrupt or truncated",
            found=f"{type(error).__name__}: {error}",
            expected="a complete image file",
            remedy="download or copy the file again, or leave it out",
        ) from error


def _unknown_to_pillow(
    opened: Callable[[], Path | BinaryIO], name: str, size: int, max_pixels: int, error: UnidentifiedImageError
) -> ImageRecord:
    """Read a TIFF by tifffile; other files are no images."""
    if not is_tiff(opened()):
        raise ImageError(
            f"{name} is not an image",
            found=f"{size} bytes of no known image format",
            expected="PNG, JPEG, TIFF, WebP, BMP or another format that Pillow reads",
            remedy="check that the file was downloaded or copied as a whole, and is what its name says",
        ) from error
    try:
        array, orientation = read_tiff(opened(), max_pixels)
        return record_of(_oriented(array, orientation))
    except ImageError as refused:
        raise _in_file(name, refused) from refused


def image_from_pillow(image: Image.Image) -> ImageRecord:
    """Convert a Pillow image to a record, as `load_image` does with a file (colour at 8 bits).

    Raises:
        ImageError: It has no pixels, cannot be decoded, or its values have no known range.
    """
    _check_size(image.size, MAX_PIXELS)
    try:
        return _record_from_pillow(image, getattr(image, "filename", "") or "An image")
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            "An image is corrupt or truncated",
            found=f"{type(error).__name__}: {error}",
            expected="a complete image",
            remedy="leave it out of the data",
        ) from error


def image_size(path: PathLike) -> tuple[int, int]:
    """Height and width of an image file as displayed, from its header alone.

    Raises:
        ImageError: The file is missing or its header is not an image's.
    """
    path = Path(path)
    _check_file(path, MAX_PIXELS)

    def read() -> tuple[bool, tuple[int, int]]:
        with _without_bomb_warning(), Image.open(path) as image:
            sideways = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
            if sideways and image.format == "TIFF":
                # Whether the header's size is already rotated depends on Pillow's version; the loaded one always is.
                image.load()
                sideways = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
            return sideways, image.size

    try:
        sideways, (width, height) = _with_long_texts(read)
    except UnidentifiedImageError as error:
        (height, width), orientation = _size_unknown_to_pillow(path, error)
        sideways = 5 <= orientation <= 8
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ImageError(f"The size of {path} cannot be read", found=f"{type(error).__name__}: {error}") from error
    return (width, height) if sideways else (height, width)


def _size_unknown_to_pillow(path: Path, error: UnidentifiedImageError) -> tuple[tuple[int, int], int]:
    try:
        if is_tiff(path):
            return tiff_size(path)
    except ImageError as refused:
        raise _in_file(str(path), refused) from refused
    raise ImageError(f"The size of {path} cannot be read", found=f"{type(error).__name__}: {error}") from error


def _check_file(path: Path, max_pixels: int) -> int:
    """The size of a regular file that may be an image of so many pixels, in bytes."""
    of_a_pixel, of_the_rest = _FILE_BYTES
    return check_file(path, ImageError, "an image file", of_a_pixel * max_pixels + of_the_rest)


@contextmanager
def _without_bomb_warning() -> Iterator[None]:
    """Context manager that silences Pillow's warning at half the size that `load_image` refuses with an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _with_long_texts(read: Callable[[], T]) -> T:
    """What reading gives; once more where a text or colour profile of a PNG is larger, unpacked, than Pillow's 1 MiB.

    Picture generators store their programs there, and calibrated screens large profiles. The limit is one for the whole
    process: other threads that read meanwhile meet the wider one.
    """
    try:
        return read()
    except ValueError as error:
        if "decompressed data too large" not in str(error).lower():
            raise
    with _pillow_limits:
        before = PngImagePlugin.MAX_TEXT_CHUNK
        PngImagePlugin.MAX_TEXT_CHUNK = max(before, _MAX_TEXT_BYTES)
        try:
            return read()
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = before


def _in_file(name: str, error: ImageError) -> ImageError:
    return ImageError(f"{name}: {error.what}", found=error.found, expected=error.expected, remedy=error.remedy)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width == 0 or height == 0:
        raise ImageError("the image has no pixels", found=f"{width}x{height}", expected="at least 1x1")
    if width * height > max_pixels:
        raise _too_large(f"{width}x{height} = {width * height} pixels", max_pixels)


def _check_held(image: Image.Image, size: int) -> None:
    """Refuse what the file cannot hold: where compressed data end early, Pillow leaves the rest of an image black."""
    compression = image.info.get("compression") if image.format == "TIFF" else image.format
    ratio = _DENSEST.get(compression or "")
    if ratio is None:
        return
    least = image.width * image.height * _LEAST_BITS.get(image.mode, 1) // 8
    if least > ratio * size:
        raise ImageError(
            "the file contradicts itself",
            found=f"{image.width}x{image.height} pixels in {size} bytes",
            expected=f"at least {least // ratio + 1} bytes for so many",
            remedy="download or copy the file again, or leave it out",
        )


def _too_large(found: str, max_pixels: int) -> ImageError:
    return ImageError(
        "the image is too large, or a decompression bomb",
        found=found,
        expected=f"at most {max_pixels} pixels",
        remedy="cut it into parts; if you trust the file, raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS",
    )


def _record_from_pillow(image: Image.Image, name: str = "An image") -> ImageRecord:
    if getattr(image, "n_frames", 1) > 1:
        logger.warning("%s has several frames; only the first is used", name)
    mode = image.mode
    image.load()
    return _finished(image, _array_from_pillow(image), mode)


def _finished(image: Image.Image, array: Array, mode: str) -> ImageRecord:
    """The record of a loaded image's samples, rotated upright."""
    # Read after loading: Pillow applies the orientation of a TIFF while loading, and then drops the tag.
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    profile = image.info.get("icc_profile") if mode != "CMYK" else None
    return record_of(_oriented(array, orientation), mode, profile)


def _array_from_pillow(image: Image.Image) -> Array:
    """Samples `[H, W]` or `[H, W, C]` in a type that `image_from_array` takes, transparency expanded to a channel."""
    mode = image.mode
    if mode.startswith("I"):
        return _array_from_integers(_samples(image))
    if mode == "F":
        return _samples(image)
    if mode not in _CONVERTIBLE_MODES:
        raise ImageError(
            "the image's colour model is not handled",
            found=f"mode {mode}",
            expected="gray, RGB, palette, CMYK, YCbCr or HSV",
            remedy="convert the image to RGB",
        )
    transparent = "transparency" in image.info or mode in ("PA", "RGBA", "RGBa", "LA", "La")
    gray = mode in ("1", "L", "LA", "La")
    target = {(True, True): "LA", (True, False): "L", (False, True): "RGBA", (False, False): "RGB"}[gray, transparent]
    return _samples(image if mode == target else image.convert(target))


def _samples(image: Image.Image, dtype: Any = None) -> Array:
    """Copy a loaded image to an array, by default of the image's own type."""
    array: Array | None = None
    for rows, band in _bands(image):
        if array is None:
            array = np.empty((image.height, *band.shape[1:]), dtype or band.dtype)
        array[rows] = band
    assert array is not None
    return array


def _bands(image: Image.Image) -> Iterator[tuple[slice, Array]]:
    """Bands of rows of a loaded image: converting it as a whole, Pillow makes two more copies."""
    height = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), np.asarray(image.crop((0, top, image.width, bottom)))


def _array_from_integers(values: Array) -> Array:
    """Samples of Pillow's 32-bit mode, which holds 16-bit images; larger values have no defined white."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            "the image holds integers of more than 16 bits",
            found=f"values {values.min()} to {values.max()}",
            expected="0 to 65535",
            remedy="scale it to 16 bits",
        )
    return values.astype(np.uint16, copy=False)


def _oriented(array: Array, orientation: int) -> Array:
    """Undo an EXIF orientation, 1..8; unknown values count as upright."""
    if orientation >= 5 and orientation <= 8:
        array = np.swapaxes(array, 0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _colour_rawmode(image: Image.Image) -> str:
    """Pillow's raw mode (sample layout) of a colour file, such as ``RGB;16B``; empty for other files."""
    tile = getattr(image, "tile", None)
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF") or not tile:
        return ""
    arguments = tile[0][3]
    rawmode = arguments if isinstance(arguments, str) else arguments[0]
    return rawmode if isinstance(rawmode, str) else ""


def _read_deep_colour(opened: Callable[[], Path | BinaryIO], name: str, rawmode: str) -> ImageRecord | None:
    """Read 16-bit colour at full precision, or return ``None`` for layouts that can only be read at 8 bits.

    Pillow keeps the high byte of each sample. With the opposite byte order it keeps the low byte, so two passes of its
    (hardened) decoder yield both.
    """
    swapped = _LOW_BYTES.get(rawmode)
    if swapped is None:
        logger.warning("%s has 16 bits per channel but is read at 8: layout %s is not handled", name, rawmode)
        return None
    low = _loaded(opened, swapped)
    if rawmode == "LA;16B":  # the swapped mode reads the four bytes of a pixel unchanged
        return _finished(low, _samples(low).view(">u2").astype(np.uint16), "LA;16")
    array = _samples(low, np.uint16)
    del low
    high = _loaded(opened)
    for rows, band in _bands(high):
        array[rows] |= band.astype(np.uint16) << 8
    return _finished(high, array, f"{high.mode};16")


def _loaded(opened: Callable[[], Path | BinaryIO], rawmode: str | None = None) -> Image.Image:
    """Decode the image, optionally with another raw mode than its own."""
    with Image.open(opened()) as image:
        if rawmode is not None:
            image.tile = [_with_rawmode(tile, rawmode) for tile in image.tile]
        image.load()
    return image


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    arguments = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    # A plain tuple up to Pillow 10, a named one since.
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)
