"""Image files that are damaged, lie about themselves, or are rare."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import tifffile
from hypothesis import strategies as st
from PIL import Image

from harmoq_ao.images import IMAGE_SUFFIXES
from tests.fuzz.damage import FileCase, any_of, damaged, flipped, noise

_FORMATS = {
    "PNG": (".png", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "JPEG": (".jpg", ("L", "RGB", "CMYK")),
    "TIFF": (".tif", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")),
    "WEBP": (".webp", ("RGB", "RGBA")),
    "BMP": (".bmp", ("1", "L", "P", "RGB")),
    "GIF": (".gif", ("L", "P")),
    "PPM": (".ppm", ("L", "RGB")),
    "TGA": (".tga", ("L", "P", "RGB", "RGBA")),
    **({"JPEG2000": (".jp2", ("L", "RGB", "RGBA"))} if ".jp2" in IMAGE_SUFFIXES else {}),
}
_ORIENTATION = 0x0112
_ROWS = (b"\0" + bytes(33)) * 9  # of a black RGB image of 11x9


@cache
def encoded(name: str, mode: str, seed: int = 0, **options: Any) -> bytes:
    """A small valid file."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (9, 11), np.uint16))
    elif mode == "F":
        picture = Image.fromarray(rng.random((9, 11), np.float32))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, name, **options)
    return buffer.getvalue()


def _saved(name: str, mode: str = "RGB", **options: Any) -> FileCase:
    return FileCase(encoded(name, mode, **options), _FORMATS[name][0])


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its right check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> FileCase:
    """A PNG that declares what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return FileCase(b"\x89PNG\r\n\x1a\n" + body, ".png")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += length + 12


def _flipped_within_chunks(mode: str) -> st.SearchStrategy[FileCase]:
    """Flipped bytes below check sums that are right."""
    parts = [
        st.tuples(st.just(kind), st.just(body) | flipped(body, 2) if body else st.just(body))
        for kind, body in _chunks(encoded("PNG", mode))
    ]
    return st.tuples(*parts).map(
        lambda chunks: FileCase(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks), ".png")
    )


def _spliced(file: FileCase, at: float, inserted: bytes, removed: int) -> FileCase:
    place = int(at * len(file.data))
    return FileCase(file.data[:place] + inserted + file.data[place + removed :], file.suffix)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif.tobytes()


def _orientation_of_type(kind: int) -> FileCase:
    data = _exif(6)
    little = b"MM" not in data[:8]
    order = "<" if little else ">"
    at = data.index(struct.pack(order + "H", _ORIENTATION)) + 2
    return _saved("JPEG", exif=data[:at] + struct.pack(order + "H", kind) + data[at + 2 :])


@cache
def _animation(name: str) -> bytes:
    frames = [Image.new("P", (8, 8), colour) for colour in (7, 99, 200)]
    frames = frames if name in ("GIF", "PNG") else [frame.convert("RGB") for frame in frames]
    buffer = io.BytesIO()
    frames[0].save(buffer, name, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _animated(name: str) -> st.SearchStrategy[FileCase]:
    data = _animation(name)
    return (st.just(data) | flipped(data)).map(lambda changed: FileCase(changed, _FORMATS[name][0]))


def _floats(value: float) -> FileCase:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.float32)).save(buffer, "TIFF")
    return FileCase(buffer.getvalue(), ".tif")


@cache
def _float_colour(options: tuple[tuple[str, Any], ...]) -> FileCase:
    """A TIFF that Pillow does not know."""
    buffer = io.BytesIO()
    samples = np.random.default_rng(0).random((9, 11, 3), np.float32)
    tifffile.imwrite(buffer, samples, photometric="rgb", **dict(options))
    return FileCase(buffer.getvalue(), ".tif")


def _flipped_directory(mode: str) -> st.SearchStrategy[FileCase]:
    data = encoded("TIFF", mode)
    return flipped(data[8:200], 4).map(lambda changed: FileCase(data[:8] + changed + data[200:], ".tif"))


INTACT = st.builds(
    lambda kind, seed: _saved(*kind, seed=seed),
    any_of(*((name, mode) for name, (_, modes) in _FORMATS.items() for mode in modes)),
    st.integers(0, 3),
)
_STARTS = (b"", b"\x89PNG\r\n\x1a\n", b"P6 ", *b"<html> \xff\xd8\xff\xe0 II*\0 MM\0* BM GIF89a RIFF".split(b" "))
_SIDES = any_of(40_000, 100_000, 2**31 - 1, 2**32 - 1)
_SUFFIXES = (*(suffix for suffix, _ in _FORMATS.values()), "", ".txt", ".exe")
_PROFILED = any_of(("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB"), ("WEBP", "RGB"))

IMAGES: st.SearchStrategy[FileCase] = st.one_of(
    damaged(INTACT, header=64, most=3),
    any_of("L", "P", "RGBA", "RGB").flatmap(_flipped_within_chunks),
    st.builds(_spliced, INTACT, st.floats(0, 1, exclude_max=True), noise(0, 19), st.integers(0, 19)),
    st.builds(lambda file, suffix: FileCase(file.data, suffix), INTACT, any_of(*_SUFFIXES)),
    st.builds(lambda start, rest: FileCase(start + rest, ".png"), any_of(*_STARTS), noise(0, 200)),
    # Sizes that files declare: giant, in several formats, and none.
    st.builds(png, _SIDES, _SIDES),
    st.builds(lambda side: FileCase(b"P6 %d %d 255\n" % (side, side), ".ppm"), any_of(60_000, 65_535)),
    st.builds(
        lambda side: FileCase(b"GIF89a" + struct.pack("<HH", side, side) + encoded("GIF", "P")[10:], ".gif"),
        any_of(60_000, 65_535),
    ),
    st.builds(lambda size: png(*size), any_of((0, 0), (0, 7), (7, 0))),
    st.builds(lambda size: FileCase(b"P5 %d %d 255\n" % size, ".png"), any_of((0, 0), (0, 7), (7, 0))),
    # Depths and colours that do not exist, and 16-bit colour without all its data.
    st.builds(
        lambda depth, colour, data: png(11, 9, depth=depth, colour=colour, data=data),
        any_of(0, 1, 2, 4, 8, 16, 32),
        st.integers(0, 7),
        noise(0, 1000),
    ),
    st.builds(lambda row, rows: png(11, 9, depth=16, data=(b"\0" + row) * rows), noise(66, 66), st.integers(0, 9)),
    # Colour profiles, compressed chunks, bombs among them.
    st.builds(lambda kind, profile: _saved(*kind, icc_profile=profile), _PROFILED, noise(1, 300)),
    st.builds(
        lambda kind, data: png(11, 9, data=_ROWS, extra=chunk(kind, b"name\0\0" + data)),
        any_of(b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"tRNS"),
        noise(30, 30),
    ),
    st.builds(
        lambda kind: png(11, 9, data=_ROWS, extra=chunk(kind, b"name\0\0" + zlib.compress(bytes(3 << 20)))),
        any_of(b"iCCP", b"zTXt"),
    ),
    # Orientations: all, of another type, and broken.
    st.builds(
        lambda name, orientation: _saved(name, exif=_exif(orientation)),
        any_of("JPEG", "PNG", "TIFF", "WEBP"),
        any_of(*range(10), 255, 65535),
    ),
    st.builds(_orientation_of_type, any_of(2, 5, 7, 10, 11, 12, 99)),
    st.builds(
        lambda name, data: _saved(name, exif=b"Exif\0\0" + data),
        any_of("JPEG", "PNG", "WEBP"),
        st.deferred(lambda: flipped(_exif(6)[6:])),
    ),
    any_of("GIF", "PNG", "WEBP", "TIFF").flatmap(_animated),
    st.builds(_floats, any_of(float("nan"), float("inf"), -1.0, 1e30)),
    any_of("RGB", "L", "P", "I;16").flatmap(_flipped_directory),
    damaged(any_of((), (("compression", "zlib"),), (("tile", (16, 16)),)).map(_float_colour), header=400, most=4),
)
