"""A streaming PNG writer (ISO/IEC 15948) for 8 and 16 bits: Pillow writes neither row by row nor 16-bit colour."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from harmoq_ao.images.records import Array

Bytes = npt.NDArray[np.uint8]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def write_png(
    file: BinaryIO, strips: Iterable[Array], shape: tuple[int, int, int], depth: int, icc_profile: bytes | None
) -> None:
    """Write an image strip by strip.

    Args:
        file: Open for writing.
        strips: `[h, W, C]` of uint8 or uint16, from top to bottom; each is consumed before the next is requested.
        shape: Height, width and channels of the whole image: gray, gray with alpha, RGB or RGBA.
        depth: 8 or 16 bits.
        icc_profile: A colour profile to embed.
    """
    height, width, channels = shape
    file.write(_SIGNATURE)
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0))
    if icc_profile is not None:
        _write_chunk(file, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    # What libpng uses for filtered rows.
    compressor = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED)
    pixel = channels * depth // 8
    above = np.zeros(width * pixel, np.uint8)
    for strip in strips:
        rows = strip.astype(">u2" if depth == 16 else np.uint8, order="C").view(np.uint8).reshape(len(strip), -1)
        _write_data(file, compressor.compress(filtered(rows, above, pixel).data))
        above = rows[-1]
    _write_data(file, compressor.flush())
    _write_chunk(file, b"IEND", b"")


def filtered(rows: Bytes, above: Bytes, pixel: int) -> Bytes:
    """Filter each row by the minimum-sum-of-absolute-differences heuristic, as libpng does.

    Args:
        rows: `[h, n]`, the bytes of consecutive rows.
        above: `[n]`, the preceding row; zeros at the top of the image.
        pixel: Bytes per pixel.

    Returns:
        `[h, 1 + n]`: each row after the number of its filter.
    """
    best = np.zeros((len(rows), 1 + rows.shape[1]), np.uint8)
    best[:, 1:] = rows
    least = _magnitude(rows)
    for kind, predicted in enumerate(_predictions(rows, above, pixel), start=1):
        candidate = rows - predicted
        magnitude = _magnitude(candidate)
        better = magnitude < least
        least[better] = magnitude[better]
        best[better, 0] = kind
        best[better, 1:] = candidate[better]
    return best


def _magnitude(values: Bytes) -> npt.NDArray[np.int64]:
    """Sum of the absolute values of each row's bytes, read as signed numbers."""
    magnitude: npt.NDArray[np.int64] = np.minimum(values, np.negative(values)).sum(axis=1, dtype=np.int64)
    return magnitude


def _predictions(rows: Bytes, above: Bytes, pixel: int) -> Iterator[Bytes]:
    """Predictions of filters 1 to 4 (Sub, Up, Average, Paeth) for each byte."""
    left = np.zeros_like(rows)
    left[:, pixel:] = rows[:, :-pixel]
    up = np.concatenate([above[None], rows[:-1]])
    yield left
    yield up
    yield (left & up) + ((left ^ up) >> 1)  # the mean, rounded down, within 8 bits
    corner = np.zeros_like(rows)
    corner[:, pixel:] = up[:, :-pixel]
    yield _paeth(left, up, corner)


def _paeth(left: Bytes, up: Bytes, corner: Bytes) -> Bytes:
    """The neighbour nearest to left + up - corner; ties go to left, then up."""
    to_left = up.astype(np.int16) - corner
    to_up = left.astype(np.int16) - corner
    to_corner = np.abs(to_left + to_up)
    np.abs(to_left, out=to_left)
    np.abs(to_up, out=to_up)
    nearest: Bytes = np.where(to_up <= to_corner, up, corner)
    np.copyto(nearest, left, where=(to_left <= to_up) & (to_left <= to_corner))
    return nearest


def _write_data(file: BinaryIO, data: bytes) -> None:
    if data:
        _write_chunk(file, b"IDAT", data)


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
