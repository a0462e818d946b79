"""Reading every kind of image as RGB; refusing what is no image."""

from __future__ import annotations

import logging
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from harmoq_ao.common.errors import ImageError
from harmoq_ao.images import image_from_array, image_from_pillow, image_size, load_image, save_image
from tests.pictures import HEIGHT, WIDTH, codes, doubled, png_bytes, unit


def test_rgb(tmp_path: Path) -> None:
    array = codes(3)
    Image.fromarray(array).save(tmp_path / "a.png")
    record = load_image(tmp_path / "a.png")
    torch.testing.assert_close(record.pixels, unit(array), rtol=0, atol=0)
    assert (record.alpha, record.grayscale, record.bit_depth, record.mode) == (None, False, 8, "RGB")
    assert record.size == image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)
    assert record.path == tmp_path / "a.png"
    np.testing.assert_array_equal(record.to_uint8(), array)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grayscale_stays_grayscale(tmp_path: Path, mode: str) -> None:
    gray = codes(1)[:, :, 0]
    image = Image.fromarray(codes(1, 16)[:, :, 0]) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "a.png")
    record = load_image(tmp_path / "a.png")
    assert record.grayscale
    assert record.pixels.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(record.pixels[0], record.pixels[2])
    save_image(tmp_path / "b.png", doubled(record), like=record)
    again = load_image(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert written.mode == {"L": "L", "1": "L", "LA": "LA", "I;16": "I;16"}[mode]
    torch.testing.assert_close(again.pixels, doubled(record), rtol=0, atol=1e-5)
    assert again.bit_depth == (16 if mode == "I;16" else 8)


def test_sixteen_bit_gray_is_read_at_full_precision(tmp_path: Path) -> None:
    array = codes(1, 16)
    Image.fromarray(array[:, :, 0]).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png").pixels[:1], unit(array))
    # Pillow's 32-bit mode is how it holds 16 bits of some formats.
    record = image_from_pillow(Image.fromarray(array[:, :, 0].astype(np.int32)))
    assert torch.equal(record.pixels[:1], unit(array))
    assert record.bit_depth == 16


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_colour_of_other_writers(tmp_path: Path, compression: Any, channels: int, order: Any) -> None:
    array = codes(channels, 16)
    extra = ["unassalpha"] if channels == 4 else None
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, array, photometric="rgb", extrasamples=extra, byteorder=order, compression=compression, rowsperstrip=4
    )
    record = load_image(path)
    assert record.bit_depth == 16
    assert record.mode == f"{'RGB' if channels == 3 else 'RGBA'};16"
    assert torch.equal(record.pixels, unit(array[:, :, :3]))
    assert (record.alpha is None) == (channels == 3)


def test_sixteen_bit_colour_that_cannot_be_read_deep_is_read_at_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    array = codes(3, 16)
    source = image_from_array(array)
    save_image(tmp_path / "a.png", source.pixels, like=source)
    monkeypatch.setattr("harmoq_ao.images.reading._LOW_BYTES", {})
    with caplog.at_level(logging.WARNING):
        record = load_image(tmp_path / "a.png")
    assert record.bit_depth == 8
    np.testing.assert_array_equal(record.to_uint8(), array >> 8)
    assert "16 bits per channel but is read at 8: layout RGB;16B is not handled" in caplog.text


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(codes(3)).quantize(16)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=3)
    colours = np.asarray(image.convert("RGB"))
    opaque, clear = load_image(tmp_path / "opaque.png"), load_image(tmp_path / "clear.png")
    assert opaque.mode == clear.mode == "P"
    assert opaque.alpha is None
    np.testing.assert_array_equal(opaque.to_uint8(), colours)
    assert clear.alpha is not None
    np.testing.assert_array_equal(clear.alpha[0].numpy() == 0, np.asarray(image) == 3)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_rare_modes_become_rgb(mode: str) -> None:
    flat = Image.new("RGBA", (4, 3), (200, 100, 50, 255))
    through = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    image = flat.convert("RGB").convert(through).convert(mode)
    record = image_from_pillow(image)
    assert record.mode == mode
    expected = [124, 124, 124] if mode == "La" else [200, 100, 50]
    assert np.abs(record.to_uint8().astype(int) - expected).max() <= (25 if mode == "PA" else 2)
    assert (record.alpha is not None) == (mode in ("PA", "La", "RGBa"))


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_transparent_colour_of_an_opaque_mode(tmp_path: Path, mode: str, colour: Any) -> None:
    image = Image.new(mode, (4, 3), colour)
    image.putpixel((0, 0), 255 if mode == "L" else (255, 255, 255))
    image.save(tmp_path / "a.png", transparency=colour)
    record = load_image(tmp_path / "a.png")
    assert record.alpha is not None
    assert record.alpha.sum() == 1
    assert record.alpha[0, 0, 0] == 1
    assert record.grayscale == (mode == "L")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif: Any = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = orientation
    image = Image.fromarray(codes(3))
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as stored:
        turned = ImageOps.exif_transpose(stored)
        assert turned is not None
        upright = np.asarray(turned.convert("RGB"))
    record = load_image(path)
    np.testing.assert_array_equal(record.to_uint8(), upright)
    assert image_size(path) == record.size == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))
    save_image(tmp_path / "b.png", record.pixels, like=record)
    np.testing.assert_array_equal(load_image(tmp_path / "b.png").to_uint8(), upright)


def test_first_frame_of_an_animation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        record = load_image(tmp_path / "a.gif")
    assert (record.to_uint8() == (255, 0, 0)).all()
    assert "only the first is used" in caplog.text


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]), st.sampled_from([8, 16]))
def test_arrays_keep_their_codes(seed: int, channels: int, depth: int) -> None:
    dtype = np.uint8 if depth == 8 else np.uint16
    array = np.random.default_rng(seed).integers(0, 2**depth, (3, 2, channels)).astype(dtype)
    record = image_from_array(array)
    colours = 1 if channels < 3 else 3
    expected = unit(array[:, :, :colours]).expand(3, -1, -1)
    assert torch.equal(record.pixels, expected)
    assert record.grayscale == (colours == 1)
    assert (record.alpha is None) == (channels == colours)


PNG = png_bytes(Image.fromarray(codes(3, size=(30, 40))))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty. Found: 0 bytes. Expected: an image file. What to do: download or copy the file again"),
        (b"hello, this is text", "is not an image. Found: 19 bytes of no known image format"),
        (b"\x89PNG\r\n\x1a\n", "is not an image"),
        (PNG[:-900], "is corrupt or truncated. Found: OSError"),
        (PNG[:200] + bytes(200) + PNG[400:], "is corrupt or truncated"),
        (png_header(100_000, 100_000), "too large, or a decompression bomb"),
        (
            png_header(13_000, 13_900),
            "decompression bomb. Found: Image size (180700000 pixels) exceeds limit of 178956970",
        ),
        (b"P6 0 5 255\n", "not an image"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("depth", [8, 16])
def test_truncated_and_flipped_bytes_never_escape(tmp_path: Path, suffix: str, depth: int) -> None:
    like = image_from_array(codes(3, depth))
    path = tmp_path / f"a{suffix}"
    save_image(path, like.pixels, like=like)
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for attempt in range(30):
        broken = bytearray(data)
        if attempt % 2:
            broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else:
            del broken[int(rng.integers(len(data))) :]
        path.write_bytes(broken)
        try:
            load_image(path)
        except ImageError:
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize(("mode", "pixels"), [("RGB", (11, 90_000)), ("L", (11, 900_000)), ("LA", (11, 90_000))])
def test_more_pixels_than_the_file_can_hold(tmp_path: Path, mode: str, pixels: tuple[int, int]) -> None:
    """Where the compressed data end early, Pillow leaves the other pixels black."""
    data = bytearray(png_bytes(Image.new(mode, (11, 9))))
    data[16:24] = struct.pack(">II", *pixels)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=rf"a.png: the file contradicts itself. Found: 11x{pixels[1]} pixels in"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_the_densest_files_are_read(tmp_path: Path, suffix: str, mode: str) -> None:
    options: Any = {"compression": "tiff_lzw"} if suffix == "tif" else {"compress_level": 9}
    Image.new(mode, (4000, 4000)).save(tmp_path / f"a.{suffix}", **options)
    assert load_image(tmp_path / f"a.{suffix}").size == (4000, 4000)


def test_missing_file_folder_and_limit(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"does not exist. Found: no such file or folder. Expected: an image file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=r"is not a file. Found: a folder"):
        load_image(tmp_path)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"Found: 10x10 = 100 pixels. Expected: at most 99 pixels. What to do: cut it"):
        load_image(tmp_path / "a.png", max_pixels=99)
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"The size of .*b.png cannot be read. Found: Unidentified"):
        image_size(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.array([[70000, 1]], np.int32)), "integers of more than 16 bits. Found: values 1 to 70000"),
        (Image.fromarray(np.array([[2.5, 1]], np.float32)), "no known range. Found: floats from 1.0 to 2.5"),
        (Image.fromarray(np.array([[math.nan, 1]], np.float32)), "no known range"),
        (Image.new("LAB", (2, 2)), "colour model is not handled. Found: mode LAB"),
        (Image.new("RGB", (0, 2)), "has no pixels. Found: 0x2"),
        (np.zeros((2, 2, 5), np.uint8), "not an image. Found: shape [2, 2, 5]"),
        (np.zeros((0, 2, 3), np.uint8), "not an image. Found: shape [0, 2, 3]"),
        (np.zeros(4, np.uint8), "Found: shape [4]"),
        (np.zeros((2, 2), np.int64), "no known range. Found: dtype int64"),
        (np.full((2, 2), 255.0), "no known range. Found: floats from 255.0 to 255.0"),
    ],
)
def test_bad_pillow_images_and_arrays_are_named(image: Any, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        (image_from_pillow if isinstance(image, Image.Image) else image_from_array)(image)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_long_texts_and_profiles_of_a_png_are_read(tmp_path: Path, kind: str) -> None:
    before = PngImagePlugin.MAX_TEXT_CHUNK
    array, long = codes(3), bytes(3 * before)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", long.decode(), zip=True)
    Image.fromarray(array).save(tmp_path / "a.png", **({"pnginfo": info} if kind == "text" else {"icc_profile": long}))
    record = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(record.to_uint8(), array)
    assert (record.icc_profile or b"") == (long if kind == "profile" else b"")
    assert image_size(tmp_path / "a.png") == record.size
    assert before == PngImagePlugin.MAX_TEXT_CHUNK


def test_a_text_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * (80 << 20), zip=True)
    Image.fromarray(codes(3)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ImageError, match="corrupt"):
        load_image(tmp_path / "a.png")
