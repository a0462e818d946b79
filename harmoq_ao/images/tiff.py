"""TIFF files whose samples Pillow does not hold, such as colour in floats: read by tifffile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from harmoq_ao.common.errors import ImageError
from harmoq_ao.images.records import Array

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF and of a BigTIFF, in both byte orders."""
_ORIENTATION_TAG = 274
_AXES = ("YX", "YXS", "SYX")
_SAMPLES = {"MINISBLACK": (1, 2), "RGB": (3, 4)}
_HIGHEST_BYTES = 8  # of a sample


def is_tiff(source: Path | BinaryIO) -> bool:
    """Whether a file begins as a TIFF."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(4) in SIGNATURES
    return source.read(4) in SIGNATURES


def tiff_size(source: Path | BinaryIO) -> tuple[tuple[int, int], int]:
    """Height and width as stored, and the EXIF orientation, from the first page's directory.

    Raises:
        ImageError: The layout is not handled, or the directory is corrupt.
    """
    with _first_page(source) as page:
        return _stored_size(page), _orientation(page)


def read_tiff(source: Path | BinaryIO, max_pixels: int) -> tuple[Array, int]:
    """The samples `[H, W]` or `[H, W, C]` of the first page in their own type, alpha last, and the orientation.

    Colour that is multiplied by alpha is divided by it.

    Args:
        source: The file.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        ImageError: The layout or the compression is not handled, or the file is corrupt.
    """
    with _first_page(source) as page:
        height, width = _stored_size(page)
        if height * width > max_pixels:
            raise ImageError(
                "the image is too large", found=f"{width}x{height} pixels", expected=f"at most {max_pixels} pixels"
            )
        array: Array = page.asarray()
        if page.axes == "SYX":
            array = np.moveaxis(array, 0, -1)
        if [extra.name for extra in page.extrasamples] == ["ASSOCALPHA"]:
            array = _divided_by_alpha(array)
        return array, _orientation(page)


def _divided_by_alpha(array: Array) -> Array:
    if array.dtype.kind != "f":
        raise ImageError(
            "the TIFF's colour is multiplied by its alpha channel",
            found=f"samples of type {array.dtype}",
            expected="unassociated alpha, or floats",
            remedy="save it with unassociated (straight) alpha",
        )
    alpha = array[..., -1:]
    colour = np.divide(array[..., :-1], alpha, out=np.zeros_like(array[..., :-1]), where=alpha > 0)
    return np.concatenate([colour.clip(max=1.0), alpha], axis=-1)


@contextmanager
def _first_page(source: Path | BinaryIO) -> Iterator[Any]:
    import tifffile

    try:
        with tifffile.TiffFile(source) as file:
            page = file.pages[0]
            _check_layout(page)
            yield page
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # tifffile fails in every way there is on a corrupt directory
        raise ImageError(
            "the TIFF cannot be decoded",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="a complete file, not compressed or by deflate",
            remedy="save it anew as TIFF without compression, or as PNG",
        ) from error


def _check_layout(page: Any) -> None:
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if (
        page.axes not in _AXES
        or page.samplesperpixel not in _SAMPLES.get(photometric, ())
        or page.dtype is None
        or page.dtype.itemsize > _HIGHEST_BYTES
        or 0 in page.shape
    ):
        raise ImageError(
            "the TIFF's layout is not handled",
            found=f"{photometric}, axes {page.axes}, {page.samplesperpixel} samples of type {page.dtype}",
            expected="gray or RGB, with or without alpha",
            remedy="save it as RGB of 8 or 16 bits, or of floats in 0..1",
        )


def _stored_size(page: Any) -> tuple[int, int]:
    return int(page.imagelength), int(page.imagewidth)


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else 1
