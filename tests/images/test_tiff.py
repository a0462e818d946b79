"""TIFF files that Pillow does not know: colour in floats above all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, UnidentifiedImageError

from harmoq_ao.common.errors import ImageError
from harmoq_ao.images import image_size, load_image, save_image

PIXELS = np.random.default_rng(0).random((9, 13, 4), np.float32)
STRAIGHT = {"photometric": "rgb", "extrasamples": ["unassalpha"]}


def written(path: Path, array: Any, **options: Any) -> Path:
    tifffile.imwrite(path, array, **options)
    with pytest.raises(UnidentifiedImageError):
        Image.open(path)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {"photometric": "rgb"}),
        (3, {"photometric": "rgb", "planarconfig": "separate"}),
        (3, {"photometric": "rgb", "bigtiff": True, "byteorder": ">"}),
        (3, {"photometric": "rgb", "compression": "zlib", "tile": (16, 16)}),
        (4, STRAIGHT),
    ],
)
def test_colour_in_floats(tmp_path: Path, dtype: str, channels: int, options: dict[str, Any]) -> None:
    array = PIXELS[:, :, :channels].astype(dtype)
    planes = options.get("planarconfig") == "separate"
    path = written(tmp_path / "a.tif", np.moveaxis(array, -1, 0) if planes else array, **options)
    record = load_image(path)
    assert image_size(path) == record.size == (9, 13)
    expected = torch.from_numpy(array.astype(np.float32)).movedim(-1, 0)
    assert torch.equal(record.pixels, expected[:3])
    assert (record.alpha is None) == (channels == 3)
    save_image(tmp_path / "b.tif", record.pixels, like=record)
    again = load_image(tmp_path / "b.tif")
    assert again.bit_depth == 16
    assert (again.pixels - expected[:3]).abs().max() < 1e-5


def test_gray_with_alpha_at_sixteen_bits(tmp_path: Path) -> None:
    codes = np.arange(2 * 9 * 13, dtype=np.uint16).reshape(9, 13, 2) * 100
    path = written(tmp_path / "a.tif", codes, photometric="minisblack", extrasamples=["unassalpha"])
    record = load_image(path)
    assert record.grayscale
    np.testing.assert_array_equal(record.codes, codes)


def test_colour_multiplied_by_alpha(tmp_path: Path) -> None:
    straight = PIXELS.copy()
    straight[0, 0, 3] = 0.0
    multiplied = np.concatenate([straight[:, :, :3] * straight[:, :, 3:], straight[:, :, 3:]], -1)
    options: Any = {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    record = load_image(written(tmp_path / "a.tif", multiplied, **options))
    straight[0, 0, :3] = 0.0
    np.testing.assert_allclose(record.codes, straight, atol=1e-6)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation(tmp_path: Path, orientation: int) -> None:
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    tag = [(274, "H", 1, orientation, True)]
    path = written(tmp_path / "a.tif", PIXELS[:, :, :3], photometric="rgb", extratags=tag)
    record = load_image(path)
    assert image_size(path) == record.size
    np.testing.assert_array_equal(record.codes, np.rot90(PIXELS[:, :, :3], turns))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (PIXELS[:, :, :3] * 300, {"photometric": "rgb"}, "no known range. Found: floats from"),
        (np.full((4, 4, 3), np.nan, np.float32), {"photometric": "rgb"}, "no known range"),
        (PIXELS[:, :, 0].astype(np.float64), {"photometric": "miniswhite"}, "layout is not handled. Found: MINISWHITE"),
        (PIXELS.astype(np.complex64)[:, :, 0], {}, "no known range|layout is not handled"),
    ],
)
def test_what_has_no_meaning_as_an_image(tmp_path: Path, array: Any, options: Any, message: str) -> None:
    path = written(tmp_path / "a.tif", array, **options)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_a_large_one_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.tif", PIXELS[:, :, :3], photometric="rgb")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"too large. Found: 13x9 pixels. Expected: at most 116"):
        load_image(path, max_pixels=116)


def test_damage_never_escapes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", PIXELS[:, :, :3], photometric="rgb", compression="zlib")
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for attempt in range(200):
        broken = bytearray(data)
        if attempt % 2:
            broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else:
            del broken[int(rng.integers(8, len(data))) :]
        path.write_bytes(broken)
        for read in (load_image, image_size):
            try:
                read(path)
            except ImageError:
                refused += 1
    assert refused >= 50
