"""Mutations of image files."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.registry import FileCase, Registry, add_damage, flipped

IMAGES: Registry[FileCase] = Registry()

_FORMATS = {
    "PNG": (".png", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "JPEG": (".jpg", ("L", "RGB", "CMYK")),
    "TIFF": (".tif", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")),
    "WEBP": (".webp", ("RGB", "RGBA")),
    "BMP": (".bmp", ("1", "L", "P", "RGB")),
    "GIF": (".gif", ("L", "P")),
    "PPM": (".ppm", ("L", "RGB")),
}
_KINDS = tuple((name, mode) for name, (_, modes) in _FORMATS.items() for mode in modes)


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


def _any(rng: Random) -> tuple[bytes, str]:
    name, mode = rng.choice(_KINDS)
    return encoded(name, mode, rng.randrange(4)), _FORMATS[name][0]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its right check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG that declares what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


add_damage(IMAGES, _any, header=64, most=3)


@IMAGES.add
def flipped_chunk_with_right_sums(rng: Random) -> FileCase:
    data = encoded("PNG", rng.choice(("L", "P", "RGBA", "RGB")))
    chunks, at = data[:8], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        chunks += chunk(kind, flipped(body, rng, 2) if body and rng.random() < 0.5 else body)
        at += length + 12
    return FileCase(chunks, ".png")


@IMAGES.add
def inserted_or_removed_bytes(rng: Random) -> FileCase:
    data, suffix = _any(rng)
    at = rng.randrange(len(data))
    return FileCase(data[:at] + rng.randbytes(rng.randrange(20)) + data[at + rng.randrange(20) :], suffix)


@IMAGES.add
def wrong_suffix(rng: Random) -> FileCase:
    return FileCase(_any(rng)[0], rng.choice([suffix for suffix, _ in _FORMATS.values()] + ["", ".txt", ".exe"]))


@IMAGES.add
def no_image(rng: Random) -> FileCase:
    starts = (
        b"",
        b"<html>",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"GIF89a",
        b"P6 ",
        b"RIFF",
    )
    return FileCase(rng.choice(starts) + rng.randbytes(rng.randrange(200)), ".png")


@IMAGES.add
def giant_declared_size(rng: Random) -> FileCase:
    sides = (40_000, 100_000, 2**31 - 1, 2**32 - 1)
    return FileCase(png(rng.choice(sides), rng.choice(sides)), ".png")


@IMAGES.add
def giant_declared_size_of_other_formats(rng: Random) -> FileCase:
    size = rng.choice((60_000, 65_535))
    if rng.random() < 0.5:
        return FileCase(b"P6 %d %d 255\n" % (size, size), ".ppm")
    return FileCase(b"GIF89a" + struct.pack("<HH", size, size) + encoded("GIF", "P")[10:], ".gif")


@IMAGES.add
def zero_size(rng: Random) -> FileCase:
    width, height = rng.choice(((0, 0), (0, 7), (7, 0)))
    return FileCase(png(width, height) if rng.random() < 0.5 else b"P5 %d %d 255\n" % (width, height), ".png")


@IMAGES.add
def odd_depth_and_colour(rng: Random) -> FileCase:
    data = rng.randbytes(rng.randrange(4000))
    return FileCase(png(9, 11, depth=rng.choice((0, 1, 2, 4, 8, 16, 32)), colour=rng.randrange(8), data=data), ".png")


@IMAGES.add
def sixteen_bit_colour_without_all_its_data(rng: Random) -> FileCase:
    rows = (b"\0" + rng.randbytes(11 * 6)) * rng.randrange(10)
    return FileCase(png(11, 9, depth=16, data=rows), ".png")


@IMAGES.add
def corrupt_colour_profile(rng: Random) -> FileCase:
    name, mode = rng.choice((("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "RGB"), ("WEBP", "RGB")))
    return FileCase(encoded(name, mode, icc_profile=rng.randbytes(rng.randrange(1, 300))), _FORMATS[name][0])


@IMAGES.add
def broken_compressed_profile(rng: Random) -> FileCase:
    body = chunk(rng.choice((b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"tRNS")), b"name\0\0" + rng.randbytes(30))
    rows = (b"\0" + bytes(33)) * 9
    return FileCase(png(11, 9, data=rows, extra=body), ".png")


@IMAGES.add
def compressed_text_bomb(rng: Random) -> FileCase:
    body = chunk(rng.choice((b"iCCP", b"zTXt")), b"name\0\0" + zlib.compress(bytes(3 << 20)))
    return FileCase(png(11, 9, data=(b"\0" + bytes(33)) * 9, extra=body), ".png")


@IMAGES.add
def rotated_by_exif(rng: Random) -> FileCase:
    exif = Image.Exif()
    exif[0x0112] = rng.choice((*range(10), 255, 65535))
    name = rng.choice(("JPEG", "PNG", "TIFF", "WEBP"))
    return FileCase(encoded(name, "RGB", exif=exif.tobytes()), _FORMATS[name][0])


@IMAGES.add
def orientation_of_another_type(rng: Random) -> FileCase:
    exif = Image.Exif()
    exif[0x0112] = 6
    tag = b"\x01\x12" if b"MM" in exif.tobytes()[:8] else b"\x12\x01"
    kind = struct.pack("<H" if tag[0] == 0x12 else ">H", rng.choice((2, 5, 7, 10, 11, 12, 99)))
    data = exif.tobytes()
    at = data.index(tag)
    data = data[: at + 2] + kind + data[at + 4 :]
    return FileCase(encoded("JPEG", "RGB", exif=data), ".jpg")


@IMAGES.add
def broken_exif(rng: Random) -> FileCase:
    exif = Image.Exif()
    exif[0x0112] = 6
    name = rng.choice(("JPEG", "PNG", "WEBP"))
    return FileCase(encoded(name, "RGB", exif=b"Exif\0\0" + flipped(exif.tobytes()[6:], rng)), _FORMATS[name][0])


@IMAGES.add
def animated(rng: Random) -> FileCase:
    frames = [Image.new("P", (8, 8), rng.randrange(256)) for _ in range(3)]
    name = rng.choice(("GIF", "PNG", "WEBP", "TIFF"))
    buffer = io.BytesIO()
    frames = frames if name in ("GIF", "PNG") else [frame.convert("RGB") for frame in frames]
    frames[0].save(buffer, name, save_all=True, append_images=frames[1:])
    data = buffer.getvalue()
    return FileCase(flipped(data, rng) if rng.random() < 0.7 else data, _FORMATS[name][0])


@IMAGES.add
def values_without_a_range(rng: Random) -> FileCase:
    values = rng.choice((float("nan"), float("inf"), -1.0, 1e30))
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), values, np.float32)).save(buffer, "TIFF")
    return FileCase(buffer.getvalue(), ".tif")


@IMAGES.add
def flipped_tiff_directory(rng: Random) -> FileCase:
    data = encoded("TIFF", rng.choice(("RGB", "L", "P", "I;16")))
    return FileCase(data[:8] + flipped(data[8:200], rng, 4) + data[200:], ".tif")
