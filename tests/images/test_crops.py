"""Calibration crops are deterministic, equal to crops of the downscaled image, and bounded in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from harmoq_ao.common.errors import CalibrationError, ConfigError, ImageError
from harmoq_ao.images import CalibrationCrops

Array = np.ndarray[Any, Any]


def picture(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


class Counting:
    """Images made when asked for, and a record of what was asked."""

    def __init__(self, count: int, side: int = 40) -> None:
        self.count, self.side = count, side
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Array:
        self.asked.append(index)
        return np.full((self.side, self.side, 3), index, np.uint8)


def windows(image: Array, size: int) -> Array:
    """All crops of an image, `[N, size, size, 3]`."""
    view: Any = np.lib.stride_tricks.sliding_window_view(image, (size, size, 3))  # `[H', W', 1, size, size, 3]`
    crops: Array = view.reshape(-1, size, size, 3)
    return crops


def test_crops_come_from_the_images_and_load_in_batches() -> None:
    image = picture(20, 17)
    crops = CalibrationCrops([image], size=12, count=10, seed=3)
    known = {window.tobytes() for window in windows(image, 12)}
    seen = set()
    for crop in crops:
        assert crop.shape == (3, 12, 12)
        assert crop.dtype == torch.float32
        seen.add((crop * 255).round().to(torch.uint8).movedim(0, -1).numpy().tobytes())
    assert seen <= known
    assert len(seen) > 5
    batches = list(DataLoader(crops, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), torch.stack(list(crops)))


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_same_seed_same_crops_in_any_order(seed: int, images: int, count: int) -> None:
    sources = [picture(18 + index, 25 - index, index) for index in range(images)]
    first = list(CalibrationCrops(sources, 8, count, seed=seed))
    again = CalibrationCrops(sources, 8, count, seed=seed)
    order = np.random.default_rng(seed).permutation(count)
    assert all(torch.equal(again[int(index)], first[int(index)]) for index in order)


def test_another_seed_other_crops() -> None:
    sources = [picture(64, 64, index) for index in range(3)]
    one, two = (torch.stack(list(CalibrationCrops(sources, 16, 6, seed=seed))) for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("images", "count"), [(3, 12), (5, 12), (12, 12), (20, 12)])
def test_images_get_equal_shares_and_are_decoded_once(images: int, count: int) -> None:
    source = Counting(images)
    crops = CalibrationCrops(source, 8, count)
    used = [round(float(crop[0, 0, 0]) * 255) for crop in crops]
    assert len(source.asked) == len(set(source.asked)) == min(images, count)
    shares = [used.count(index) for index in set(used)]
    assert max(shares) - min(shares) <= 1
    assert source.asked != sorted(source.asked) or images < 4


@given(st.sampled_from([2, 3, 4]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_downscaled_crop_is_a_crop_of_the_downscaled_image(scale: int, more_h: int, more_w: int, seed: int) -> None:
    size = 9
    image = picture(size * scale + more_h * scale + seed % scale, size * scale + more_w * scale, seed)
    height, width = image.shape[0] // scale, image.shape[1] // scale
    whole = Image.fromarray(image[: height * scale, : width * scale])
    small = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC))
    known = {window.tobytes() for window in windows(small, size)}
    for crop in CalibrationCrops([image], size, 4, downscale=scale, seed=seed):
        assert (crop * 255).round().to(torch.uint8).movedim(0, -1).numpy().tobytes() in known


@pytest.mark.parametrize(("height", "width", "downscale"), [(1, 1, 1), (5, 30, 1), (30, 5, 2), (3, 3, 4)])
def test_small_images_are_mirrored(height: int, width: int, downscale: int) -> None:
    image = picture(height, width)
    crops = list(CalibrationCrops([image], 16, 2, downscale=downscale))
    assert all(crop.shape == (3, 16, 16) and torch.isfinite(crop).all() for crop in crops)
    if downscale == 1:
        expected = np.pad(image, ((0, 16 - height), (0, max(0, 16 - width)), (0, 0)), mode="symmetric")
        known = {window.tobytes() for window in windows(expected, 16)}
        assert (crops[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy().tobytes() in known


def test_memory_does_not_grow_with_crops_or_images() -> None:
    def peak(images: int, count: int) -> int:
        crops = CalibrationCrops(Counting(images, side=400), 16, count, downscale=2)
        tracemalloc.start()
        try:
            for _ in crops:
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1, 1)  # first use fills caches
    assert peak(40, 40) < 1.2 * peak(2, 2)


@pytest.mark.parametrize("option", ["size", "count", "downscale"])
def test_bad_options_are_named(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"The {option} of calibration crops is out of range. Found: 0"):
        CalibrationCrops([picture(9, 9)], **{option: 0})


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(CalibrationError, match=r"nothing to calibrate on. Found: 0 images. Expected: at least one"):
        CalibrationCrops([])


def test_index_outside() -> None:
    with pytest.raises(IndexError, match=r"crop 4 of 4"):
        CalibrationCrops([picture(9, 9)], 8, 4)[4]


def test_bad_image_is_named_when_reached(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"text")
    crops = CalibrationCrops([tmp_path / "bad.png"], 8, 1)
    with pytest.raises(ImageError, match=r"bad.png is not an image"):
        crops[0]
