"""PSNR and SSIM by the super-resolution protocol, against formulas written out here."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from harmoq_ao.common.errors import InputError
from harmoq_ao.images.metrics import (
    Score,
    ScoreTable,
    bicubic_batch,
    bicubic_upscale,
    crop_to_multiple,
    psnr_y,
    rgb_to_y,
    score,
    score_all,
    ssim_y,
    to_uint8,
)

Image8 = npt.NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Image8:
    """A smooth RGB picture with some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 5 + c) + np.cos(columns / (4 + c)) for c in range(3)], axis=-1)
    image: Image8 = np.clip(127 + 50 * waves + rng.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)
    return image


def as_tensor(image: Image8) -> torch.Tensor:
    return torch.from_numpy(image).movedim(-1, 0).float() / 255


def reference_ssim(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Wang et al. 2004 as published: an 11x11 Gaussian window moved over the valid positions only."""
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2

    def mean(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = np.einsum("ijkl,kl->ij", sliding_window_view(x, (11, 11)), window)
        return result

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


@pytest.mark.parametrize(
    ("rgb", "luma"),
    [((0, 0, 0), 16.0), ((255, 255, 255), 235.0), ((255, 0, 0), 81.481), ((0, 255, 0), 144.553), ((0, 0, 255), 40.966)],
)
def test_luma_of_primaries(rgb: tuple[int, int, int], luma: float) -> None:
    image = np.array(rgb, dtype=np.uint8).reshape(1, 1, 3)
    result = rgb_to_y(image)
    assert result.dtype == np.float64
    assert result == pytest.approx(luma, abs=1e-9)
    assert rgb_to_y(as_tensor(image)) == pytest.approx(luma, abs=1e-9)
    assert rgb_to_y(image.astype(np.float64)) == pytest.approx(luma, abs=1e-9)


def test_luma_of_gray_equals_luma_of_the_same_picture_in_rgb() -> None:
    gray = picture(9, 7)[:, :, 0]
    expanded = rgb_to_y(np.repeat(gray[:, :, None], 3, axis=2))
    for form in (gray, gray[:, :, None], as_tensor(gray[:, :, None]), as_tensor(gray[:, :, None])[None]):
        np.testing.assert_allclose(rgb_to_y(form), expanded, rtol=0, atol=1e-9)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_to_uint8_inverts_the_division_by_255(height: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(as_tensor(codes)), codes)
    np.testing.assert_array_equal(to_uint8(as_tensor(codes)[None]), codes[None])


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 7.0, math.inf])
    assert to_uint8(values.reshape(1, 1, -1)).ravel().tolist() == [0, 0, 1, 254, 255, 255]


def test_psnr_is_the_formula_inside_the_border() -> None:
    hr, sr = picture(40, 30, 0), picture(40, 30, 1)
    error = ((rgb_to_y(hr) - rgb_to_y(sr))[3:-3, 3:-3] ** 2).mean()
    assert psnr_y(sr, hr, 3) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    assert psnr_y(as_tensor(sr), as_tensor(hr)[None], 3) == psnr_y(sr, hr, 3)


def test_border_is_left_out() -> None:
    hr = picture(30, 30)
    sr = hr.copy()
    sr[:2] = 0
    assert psnr_y(sr, hr, 2) == math.inf
    assert psnr_y(sr, hr, 1) < 40
    assert ssim_y(sr, hr, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(("height", "width", "border"), [(11, 11, 0), (24, 31, 2), (40, 17, 3)])
def test_ssim_is_the_published_one(height: int, width: int, border: int) -> None:
    hr, sr = picture(height, width, 0), picture(height, width, 1)
    inner = slice(border, height - border), slice(border, width - border)
    expected = reference_ssim(rgb_to_y(sr)[inner], rgb_to_y(hr)[inner])
    assert ssim_y(sr, hr, border) == pytest.approx(expected, abs=1e-9)


def test_score_crops_the_reference_from_the_top_left() -> None:
    hr = picture(43, 38)
    sr = hr[:42, :36]
    result = score(sr, hr, 3)
    assert result.psnr == math.inf
    assert result.ssim == pytest.approx(1.0)
    np.testing.assert_array_equal(crop_to_multiple(hr, 3), sr)


def test_score_table_averages_the_decibels() -> None:
    hr = picture(30, 30)
    items = [(name, picture(30, 30, seed), hr) for name, seed in (("a", 1), ("b", 2))]
    table = score_all(iter(items), 2)
    assert list(table.scores) == ["a", "b"]
    assert table.mean.psnr == pytest.approx(sum(s.psnr for s in table.scores.values()) / 2)
    assert table.mean.ssim == pytest.approx(sum(s.ssim for s in table.scores.values()) / 2)
    assert table.scores["a"] == score(items[0][1], hr, 2)
    assert isinstance(table.mean, Score)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bicubic_keeps_constants(scale: int) -> None:
    flat = np.full((5, 4, 3), 77, np.uint8)
    assert (bicubic_upscale(flat, scale) == 77).all()
    assert bicubic_upscale(flat, scale).shape == (5 * scale, 4 * scale, 3)
    assert bicubic_upscale(flat[:, :, 0], scale).shape == (5 * scale, 4 * scale)


def test_bicubic_weights_are_keys_with_a_half() -> None:
    impulse = np.zeros((9, 9), np.uint8)
    impulse[:, 4] = 200
    row = bicubic_upscale(impulse, 2)[9].astype(float)
    # Keys' kernel at distances 1.75, 1.25, 0.75, 0.25 of the two phases of a factor of two.
    kernel = [(-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2) if d > 1 else (1.5 * d**3 - 2.5 * d**2 + 1) for d in (0.25, 0.75)]
    assert row[8] == row[9] == round(200 * kernel[0])
    assert row[7] == row[10] == round(200 * kernel[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_of_a_batch_is_that_of_each_image(channels: int) -> None:
    codes = [picture(7, 9, seed)[..., :channels] for seed in range(2)]
    batch = torch.stack([torch.from_numpy(c.copy()).movedim(-1, 0) for c in codes]).float() / 255
    upscaled = bicubic_batch(batch, 3)
    assert upscaled.shape == (2, channels, 21, 27)
    assert upscaled.dtype == torch.float32
    for found, image in zip(to_uint8(upscaled), codes, strict=True):
        assert np.array_equal(found.squeeze(), bicubic_upscale(image.squeeze(), 3))
    rounded = bicubic_batch((batch + 0.4 / 255).clamp(0, 1), 3)
    assert torch.equal(rounded, upscaled), "images are rounded to 8 bits first"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: psnr_y(a, a[:-1], 0), "differ in size. Found: 20x20 and 19x20"),
        (lambda a: psnr_y(a, a, 10), "leaves nothing to measure. Found: 20x20 pixels and a border of 10"),
        (lambda a: psnr_y(a, a, -1), "border of -1"),
        (lambda a: ssim_y(a, a, 5), "too small for SSIM. Found: 10x10 pixels after cropping a border of 5. Expected"),
        (lambda a: psnr_y(a.astype(np.float32), a, 0), "8-bit images. Found: an array of dtype float32"),
        (lambda a: psnr_y(a.astype(np.uint16), a, 0), "dtype uint16"),
        (lambda a: rgb_to_y(a.astype(np.uint16)), "Luma needs 8-bit pixels. Found: dtype uint16"),
        (lambda a: rgb_to_y(np.zeros((4, 4, 4), np.uint8)), "not one gray or RGB image. Found: shape [4, 4, 4]"),
        (lambda a: rgb_to_y(torch.zeros(2, 3, 4, 4)), "measure the images of a batch one by one"),
        (lambda a: to_uint8(torch.full((3, 2, 2), math.nan)), "Found: NaN"),
        (lambda a: to_uint8(torch.zeros(3, 2, 2, dtype=torch.uint8)), "Found: torch.uint8 of shape [3, 2, 2]"),
        (lambda a: to_uint8(torch.zeros(2, 2)), "of shape [2, 2]"),
        (lambda a: bicubic_upscale(a.astype(np.float32), 2), "needs an 8-bit image. Found: dtype float32"),
        (lambda a: bicubic_upscale(a[:0], 2), "shape [0, 20, 3]"),
        (lambda a: bicubic_upscale(a, 0), "not an upscaling factor. Found: 0"),
        (lambda a: bicubic_batch(torch.zeros(3, 4, 4), 2), "needs a batch of images. Found: shape [3, 4, 4]"),
        (lambda a: bicubic_batch(torch.zeros(1, 2, 4, 4), 2), "Found: shape [1, 2, 4, 4]"),
        (lambda a: bicubic_batch(torch.zeros(1, 3, 4, 4), 0), "not an upscaling factor. Found: 0"),
        (lambda a: score_all([("x", a, a), ("x", a, a)], 2), "Two images have the same name. Found: x"),
        (lambda a: ScoreTable().mean, "no scores to average"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as caught:
        call(picture(20, 20))
    assert message in str(caught.value)
