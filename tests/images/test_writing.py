"""Writing images in the form of their source, whole and as their rows come: the same file, or none."""

from __future__ import annotations

import logging
import math
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harmoq_ao.common.errors import InputError, OutputError
from harmoq_ao.images import (
    image_from_array,
    image_size,
    load_image,
    png,
    save_image,
    save_rows,
    skimage_photographs,
    writing,
)
from tests.pictures import HEIGHT, WIDTH, codes, doubled, unit


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip_keeps_every_bit(tmp_path: Path, channels: int, depth: int, suffix: str) -> None:
    source = image_from_array(codes(channels, depth))
    path = tmp_path / f"a{suffix}"
    save_image(path, source.pixels, like=source)
    record = load_image(path)
    assert record.bit_depth == depth
    # The one form that few readers of TIFF take is written as RGBA.
    assert record.grayscale == (channels < 3 and (suffix, depth, channels) != (".tif", 16, 2))
    assert torch.equal(record.pixels, source.pixels)
    assert (record.alpha is None) == (channels in (1, 3))
    if record.alpha is not None and source.alpha is not None:
        assert torch.equal(record.alpha, source.alpha)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", [8, 16])
def test_files_are_what_other_readers_expect(tmp_path: Path, channels: int, depth: int) -> None:
    array = codes(channels, depth)
    source = image_from_array(array)
    save_image(tmp_path / "a.tif", source.pixels, like=source)
    np.testing.assert_array_equal(np.atleast_3d(tifffile.imread(tmp_path / "a.tif")), array)
    save_image(tmp_path / "a.png", source.pixels, like=source)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        # Pillow reads 16-bit colour as its high bytes.
        expected = array if depth == 8 or channels == 1 else array >> 8
        np.testing.assert_array_equal(np.atleast_3d(np.asarray(image)), expected)


def test_alpha_is_split_off_and_upscaled_back_on(tmp_path: Path) -> None:
    array = codes(4)
    array[:, :, 3] = np.linspace(0, 255, WIDTH).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    record = load_image(tmp_path / "a.png")
    assert record.alpha is not None
    assert torch.equal(record.alpha, unit(array[:, :, 3:]))
    assert torch.equal(record.pixels, unit(array[:, :, :3]))
    save_image(tmp_path / "b.png", doubled(record), like=record)
    with Image.open(tmp_path / "b.png") as written:
        assert written.mode == "RGBA"
        result = np.asarray(written)
    expected = Image.fromarray(array[:, :, 3]).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)
    assert np.abs(result[:, :, 3].astype(int) - np.asarray(expected)).max() <= 1
    np.testing.assert_array_equal(result[::2, ::2, :3], array[:, :, :3])


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_profile_is_kept(tmp_path: Path, depth: int, suffix: str) -> None:
    record = replace(image_from_array(codes(3, depth)), icc_profile=b"profile " * 20)
    save_image(tmp_path / f"a{suffix}", record.pixels, like=record)
    assert load_image(tmp_path / f"a{suffix}").icc_profile == record.icc_profile


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
def test_formats_that_hold_less_say_so(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    like = image_from_array(np.maximum(codes(4, 16), 1 << 15))  # WebP drops the colour where alpha is 0
    flat = torch.full((1, 3, 8, 8), 0.5)
    with caplog.at_level(logging.WARNING):
        save_image(tmp_path / f"a{suffix}", flat, like=like)
    record = load_image(tmp_path / f"a{suffix}")
    assert (record.pixels - 0.5).abs().max() < 0.01
    assert "8 bits per channel" in caplog.text
    assert ("no transparency" in caplog.text) == (suffix != ".webp") == (record.alpha is None)


def test_saving_without_a_source_and_out_of_range(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 1, 3).expand(3, 1, 3))
    assert load_image(tmp_path / "a.png").to_uint8()[0, :, 0].tolist() == [0, 128, 255]
    save_image(tmp_path / "b.png", torch.rand(1, 2, 2))
    assert load_image(tmp_path / "b.png").grayscale


@pytest.mark.parametrize(("suffix", "depth"), [(".png", 8), (".png", 16), (".tif", 8), (".tif", 16), (".jpg", 8)])
def test_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str, depth: int) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    like = image_from_array(codes(3, depth, (99, 99)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OutputError, match=r"could not be written.*free some space"):
            save_image(path, like.pixels, like=like)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"old"}


def test_output_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for name, error, message, pixels in (
        ("a.xyz", OutputError, r"Found: suffix '.xyz'. Expected: one of .png", torch.rand(3, 4, 4)),
        ("none/a.png", OutputError, r"could not be written. Found: FileNotFoundError", torch.rand(3, 4, 4)),
        ("a.png", OutputError, r"could not be written. Found: IsADirectoryError", torch.rand(3, 4, 4)),
        ("file/a.png", OutputError, r"could not be written. Found: NotADirectoryError", torch.rand(3, 4, 4)),
        ("a.webp", OutputError, "cannot be encoded", torch.rand(1, 1, 17_000)),
        ("b.png", InputError, r"Found: a batch of 2", torch.rand(2, 3, 4, 4)),
        ("b.png", InputError, r"1 NaN or infinite values of 12", torch.tensor([math.nan] + [0.0] * 11).view(3, 2, 2)),
    ):
        with pytest.raises(error, match=message):
            save_image(tmp_path / name, pixels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


# --- rows as they come ------------------------------------------------------------------------------------------------


def in_bands(image: torch.Tensor, heights: list[int]) -> Iterator[torch.Tensor]:
    """An image `[C, H, W]` cut at the given heights in turn."""
    top, turn = 0, 0
    while top < image.shape[-2]:
        height = heights[turn % len(heights)]
        yield image[None, :, top : top + height]
        top, turn = top + height, turn + 1


@given(
    suffix=st.sampled_from([".png", ".tif", ".jpg", ".webp", ".bmp"]),
    channels=st.sampled_from([1, 2, 3, 4]),
    depth=st.sampled_from([8, 16]),
    scale=st.sampled_from([1, 2, 3, 4]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    heights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    strip=st.sampled_from([1, 60, 1 << 18]),
    gray=st.booleans(),
    profile=st.sampled_from([None, b"profile" * 30]),
)
@settings(max_examples=100)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bands_make_the_same_file_as_the_whole(
    suffix: str,
    channels: int,
    depth: int,
    scale: int,
    size: tuple[int, int],
    heights: list[int],
    strip: int,
    gray: bool,
    profile: bytes | None,
) -> None:
    rng = np.random.default_rng(channels * 100 + depth + scale)
    dtype = np.uint8 if depth == 8 else np.uint16
    like = image_from_array(rng.integers(0, 2**depth, (*size, channels)).astype(dtype))
    like = replace(like, icc_profile=profile)
    height, width = size[0] * scale, size[1] * scale
    image = torch.from_numpy(rng.random((1 if gray else 3, height, width), np.float32)) * 1.2 - 0.1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        whole, bands = Path(folder) / f"whole{suffix}", Path(folder) / f"bands{suffix}"
        patch.setattr(writing, "_STRIP_PIXELS", strip)
        save_image(whole, image, like=like)
        save_rows(bands, in_bands(image, heights), (height, width), like=like)
        assert bands.read_bytes() == whole.read_bytes()
        one, other = load_image(whole), load_image(bands)
    np.testing.assert_array_equal(one.codes, other.codes)
    assert one.size == (height, width)
    if suffix == ".png":
        assert (one.bit_depth, one.codes.shape[2] % 2, one.icc_profile) == (depth, channels % 2, profile)
    if suffix in (".png", ".tif", ".webp", ".bmp") and (gray or channels > 2):  # without loss, and not made gray
        top = 2**one.bit_depth - 1
        torch.testing.assert_close(one.pixels, image.clamp(0, 1).expand(3, -1, -1), rtol=0, atol=0.51 / top)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("scale", [0.4, 1, 2, 3, 4])
def test_alpha_resized_in_strips_is_alpha_resized_at_once(
    tmp_path: Path, suffix: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the seams of strips, where a resize that forgot its neighbours would differ."""
    alpha = codes(4, 16, (40, 33))
    like = image_from_array(alpha)
    width, height = round(33 * scale), round(40 * scale)
    monkeypatch.setattr(writing, "_STRIP_PIXELS", 5 * width)
    save_image(tmp_path / f"a{suffix}", torch.rand(3, height, width), like=like)
    plane = Image.fromarray(alpha[:, :, 3].astype(np.float32) / np.float32(65535))
    at_once = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1) * 65535
    found = load_image(tmp_path / f"a{suffix}").codes[:, :, 3]
    assert np.abs(found - at_once).max() < 0.6
    if scale > 1:
        part = plane.crop((0, 0, 33, 4)).resize((width, 4 * int(scale)), Image.Resampling.BICUBIC)
        alone = np.asarray(part).clip(0, 1) * 65535
        assert np.abs(alone - at_once[: len(alone)]).max() > 100, "neighbours matter here"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_is_not_much_larger_than_pillows(tmp_path: Path, channels: int) -> None:
    picture = np.asarray(Image.open(skimage_photographs("evaluation")["astronaut"]).convert("RGBA"))[100:400]
    array = picture[:, :, [0, 1, 2, 0][:channels]]
    like = image_from_array(array)
    save_image(tmp_path / "ours.png", like.pixels, like=like)
    Image.fromarray(np.squeeze(array)).save(tmp_path / "pillow.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "ours.png")), np.squeeze(array))
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("ours", "pillow")]
    assert sizes[0] < 1.02 * sizes[1]


@given(
    seed=st.integers(0, 2**32 - 1),
    pixel=st.sampled_from([1, 2, 3, 4, 6, 8]),
    width=st.integers(1, 9),
    height=st.integers(1, 7),
)
def test_every_filter_predicts_what_the_format_says(seed: int, pixel: int, width: int, height: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (height + 1, width * pixel)).astype(np.uint8)
    above, rows = rows[0], rows[1:]
    for kind, predicted in enumerate(png._predictions(rows, above, pixel), start=1):
        for y in range(height):
            up_row = above if y == 0 else rows[y - 1]
            for x in range(width * pixel):
                a = int(rows[y, x - pixel]) if x >= pixel else 0
                b = int(up_row[x])
                c = int(up_row[x - pixel]) if x >= pixel else 0
                nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
                assert predicted[y, x] == (a, b, (a + b) // 2, nearest)[kind - 1]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("the model failed"), OSError("unplugged")])
@pytest.mark.parametrize("there", [True, False])
def test_rows_that_stop_coming_leave_what_was_there(
    tmp_path: Path, suffix: str, failure: BaseException, there: bool
) -> None:
    path = tmp_path / f"a{suffix}"
    if there:
        path.write_bytes(b"old")

    def failing() -> Iterator[torch.Tensor]:
        yield torch.rand(1, 3, 600, 600)
        raise failure

    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
        save_rows(path, failing(), (900, 600))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({path.name: b"old"} if there else {})


def test_the_file_grows_while_rows_come(tmp_path: Path) -> None:
    """PNG and TIFF are not collected."""
    sizes: list[int] = []

    def watched() -> Iterator[torch.Tensor]:
        for _ in range(6):
            yield torch.rand(3, 500, 700)
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    for suffix in (".png", ".tif"):
        sizes.clear()
        save_rows(tmp_path / f"a{suffix}", watched(), (3000, 700))
        assert sizes[2] > 500_000
        assert sizes[4] > sizes[2] + 500_000
        (tmp_path / f"a{suffix}").unlink()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([], "no rows to write"),
        ([(3, 4, 5)], "The image ends too early. Found: 4 rows. Expected: 8"),
        ([(3, 4, 5), (3, 5, 5)], "Found: shape [3, 5, 5] after 4 rows. Expected: [3, h, 5] with h of at most 4"),
        ([(3, 8, 5), (3, 1, 5)], "Found: shape [3, 1, 5] after 8 rows"),
        ([(3, 4, 5), (3, 4, 6)], "does not fit"),
        ([(3, 4, 5), (1, 4, 5)], "does not fit"),
        ([(2, 3, 4, 5)], "a batch of 2"),
        ([(4, 4, 5)], "wrong number of channels"),
    ],
)
def test_bands_that_make_no_image_are_named(
    tmp_path: Path, suffix: str, bands: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        save_rows(tmp_path / f"a{suffix}", (torch.rand(shape) for shape in bands), (8, 5))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "longest"), [(".jpg", 65_500), (".webp", 16_383)])
def test_images_too_long_for_a_format_are_refused_before_any_row_is_made(
    tmp_path: Path, suffix: str, longest: int
) -> None:
    def never() -> Iterator[torch.Tensor]:
        raise AssertionError("a row was asked for")
        yield

    for size in ((longest + 1, 2), (2, longest + 1)):
        with pytest.raises(OutputError, match=rf"cannot be encoded.*at most {longest}.*such as PNG"):
            save_rows(tmp_path / f"a{suffix}", never(), size)
    save_image(tmp_path / f"a{suffix}", torch.rand(1, 1, longest))
    assert image_size(tmp_path / f"a{suffix}") == (1, longest)


def test_what_pillow_cannot_encode_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError("encoder error -2")))
    with pytest.raises(OutputError, match=r"cannot be encoded. Found: 4x3 pixels: encoder error -2"):
        save_image(tmp_path / "a.jpg", torch.rand(3, 3, 4))
    assert not list(tmp_path.iterdir())
