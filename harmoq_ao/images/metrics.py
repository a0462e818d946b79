"""Fidelity of upscaled images by the super-resolution protocol: PSNR and SSIM of luma.

The protocol, the same for every number this project publishes: 8-bit rounded output, the Y channel of ITU-R BT.601
YCbCr (16..235), a border of `scale` pixels cropped on each side, the whole image, and the reference cropped from the
top left to a multiple of the scale. PSNR and SSIM themselves are scikit-image's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import metrics as skimage_metrics  # imports scipy on first use

from harmoq_ao.common.errors import InputError

ImageLike = npt.NDArray[np.generic] | torch.Tensor
"""An 8-bit array `[H, W, 3]` or `[H, W]`, or a float tensor `[3, H, W]`, `[1, H, W]` or `[1, C, H, W]` in 0..1."""

_BT601 = np.array([65.481, 128.553, 24.966]) / 255.0
_BT601_OFFSET = 16.0
_PEAK = 255.0
_SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
"""Side of the Gaussian window of SSIM in pixels, the minimum size of an image."""


@dataclass(frozen=True)
class Score:
    """Fidelity of one image, or the mean of several: ``psnr`` in dB (infinite for equal images), ``ssim`` at most 1."""

    psnr: float
    ssim: float


@dataclass
class ScoreTable:
    """Scores by image name, in the order they were measured."""

    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def mean(self) -> Score:
        """Arithmetic mean over the images (of the decibels, as the literature does).

        Raises:
            InputError: Nothing was measured.
        """
        if not self.scores:
            raise InputError(
                "There are no scores to average", found="0 scores", remedy="measure at least one pair of images"
            )
        values = list(self.scores.values())
        return Score(
            psnr=math.fsum(s.psnr for s in values) / len(values),
            ssim=math.fsum(s.ssim for s in values) / len(values),
        )


def to_uint8(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Round a float image to 8 bits, the way an image file would hold it.

    Args:
        tensor: `[C, H, W]` or `[B, C, H, W]`, floating, 0..1. Values outside are clamped, halves go to the even code.

    Returns:
        `[H, W, C]`, or `[B, H, W, C]` for a batch.

    Raises:
        InputError: The tensor is not floating, is not of rank 3 or 4, or holds NaN.
    """
    if not tensor.is_floating_point() or tensor.ndim not in (3, 4):
        raise InputError(
            "A tensor cannot be turned into an 8-bit image",
            found=f"{tensor.dtype} of shape {list(tensor.shape)}",
            expected="a floating tensor [C, H, W] or [B, C, H, W] with values in 0..1",
        )
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    if values.isnan().any():
        raise InputError(
            "A tensor cannot be turned into an 8-bit image",
            found="NaN",
            expected="numbers in 0..1",
            remedy="look for a division by zero or an overflow in the model that made it",
        )
    codes = (values.clamp(0.0, 1.0) * _PEAK).round().to(torch.uint8)
    array: npt.NDArray[np.uint8] = codes.movedim(-3, -1).contiguous().numpy()
    return array


def rgb_to_y(image: ImageLike) -> npt.NDArray[np.float64]:
    """Luma of ITU-R BT.601, limited range: ``Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255``, not rounded.

    Args:
        image: An array `[H, W, 3]` in 0..255 (8-bit or float), or a tensor `[3, H, W]` or `[1, 3, H, W]` in 0..1, which
            is rounded to 8 bits first. Grayscale, `[H, W]`, `[H, W, 1]` or `[1, H, W]`, counts as R = G = B, so gray
            0..255 becomes 16..235 and is measured like the same picture stored as RGB.

    Returns:
        `[H, W]`, 16..235.

    Raises:
        InputError: The shape is none of these, or an integer array is not 8-bit.
    """
    pixels = _as_pixels(image)
    if pixels.dtype.kind != "f" and pixels.dtype != np.uint8:
        raise InputError(
            "Luma needs 8-bit pixels",
            found=f"dtype {pixels.dtype}",
            expected="uint8, or float in 0..255",
            remedy="scale the image to 8 bits first",
        )
    luma: npt.NDArray[np.float64]
    if pixels.shape[2] == 1:
        luma = pixels[:, :, 0].astype(np.float64) * _BT601.sum() + _BT601_OFFSET
    else:
        luma = pixels.astype(np.float64) @ _BT601 + _BT601_OFFSET
    return luma


def crop_to_multiple(image: npt.NDArray[np.generic], scale: int) -> npt.NDArray[np.generic]:
    """The top left part of an array `[H, W, ...]` whose height and width are multiples of ``scale``."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def psnr_y(sr: ImageLike, hr: ImageLike, border: int) -> float:
    """Peak signal-to-noise ratio of luma, ``10 log10(255^2 / MSE)`` in dB; infinite for equal images.

    Args:
        sr: The upscaled image, see `ImageLike`.
        hr: The reference, of the same size.
        border: Pixels left out on each side, by convention the scale.

    Raises:
        InputError: The sizes differ, the border leaves nothing, or an array is not 8-bit.
    """
    upscaled, reference = _luma_pair(sr, hr, border)
    error = float(skimage_metrics.mean_squared_error(reference, upscaled))
    return math.inf if error == 0.0 else 10.0 * math.log10(_PEAK**2 / error)


def ssim_y(sr: ImageLike, hr: ImageLike, border: int) -> float:
    """Structural similarity of luma (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, range 255.

    Equal to the MATLAB original: population covariance, and the mean over the positions where the whole window lies
    inside the image.

    Args:
        sr: The upscaled image, see `ImageLike`.
        hr: The reference, of the same size.
        border: Pixels left out on each side, by convention the scale.

    Raises:
        InputError: As in `psnr_y`, or fewer than 11 pixels are left in either direction.
    """
    upscaled, reference = _luma_pair(sr, hr, border)
    if min(upscaled.shape) < SSIM_WINDOW:
        raise InputError(
            "The image is too small for SSIM",
            found=f"{upscaled.shape[0]}x{upscaled.shape[1]} pixels after cropping a border of {border}",
            expected=f"at least {SSIM_WINDOW}x{SSIM_WINDOW}",
            remedy="leave this image out, or measure its PSNR only",
        )
    return float(
        skimage_metrics.structural_similarity(
            upscaled,
            reference,
            gaussian_weights=True,
            sigma=_SSIM_SIGMA,
            use_sample_covariance=False,
            data_range=_PEAK,
        )
    )


def score(sr: ImageLike, hr: ImageLike, scale: int) -> Score:
    """Both measures by the protocol: ``hr`` is cropped to a multiple of ``scale``, a border of ``scale`` left out.

    Raises:
        InputError: As in `psnr_y` and `ssim_y`.
    """
    reference = crop_to_multiple(_as_8bit(hr), scale)
    upscaled = _as_8bit(sr)
    return Score(psnr=psnr_y(upscaled, reference, scale), ssim=ssim_y(upscaled, reference, scale))


def score_all(items: Iterable[tuple[str, ImageLike, ImageLike]], scale: int) -> ScoreTable:
    """Score named images one by one; with a generator, one image is in memory at a time.

    Args:
        items: Triples of name, upscaled image and reference.
        scale: Upscaling factor, see `score`.

    Raises:
        InputError: As in `score`, or two images have the same name.
    """
    table = ScoreTable()
    for name, sr, hr in items:
        if name in table.scores:
            raise InputError("Two images have the same name", found=name, expected="one name per image")
        table.scores[name] = score(sr, hr, scale)
    return table


def bicubic_upscale(lr: npt.NDArray[np.uint8], scale: int) -> npt.NDArray[np.uint8]:
    """The bicubic baseline (Keys, a = -0.5), rounded to 8 bits, through Pillow.

    Equal to MATLAB's ``imresize`` within rounding, except at the image border, where Pillow renormalizes and MATLAB
    mirrors.

    Args:
        lr: `[H, W, 3]` or `[H, W]`.
        scale: Upscaling factor, at least 1.

    Returns:
        `[H * scale, W * scale, 3]` or `[H * scale, W * scale]`.

    Raises:
        InputError: The array is not an 8-bit image, or the scale is below 1.
    """
    if lr.dtype != np.uint8 or not (lr.ndim == 2 or (lr.ndim == 3 and lr.shape[2] == 3)) or 0 in lr.shape:
        raise InputError(
            "Bicubic upscaling needs an 8-bit image",
            found=f"dtype {lr.dtype}, shape {list(lr.shape)}",
            expected="uint8 of shape [H, W, 3] or [H, W], not empty",
        )
    if scale < 1:
        raise InputError("The scale is not an upscaling factor", found=scale, expected="an integer of at least 1")
    height, width = lr.shape[:2]
    upscaled = Image.fromarray(lr).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return np.asarray(upscaled)


def bicubic_batch(images: torch.Tensor, scale: int) -> torch.Tensor:
    """`bicubic_upscale` of a batch, with the signature of a model.

    Args:
        images: `[B, C, H, W]` in 0..1 with C of 1 or 3, rounded to 8 bits first.
        scale: Upscaling factor, at least 1.

    Returns:
        `[B, C, H * scale, W * scale]` in 0..1, float32 on the CPU, in steps of 1/255.

    Raises:
        InputError: The batch has another shape, or the scale is below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise InputError(
            "Bicubic upscaling needs a batch of images",
            found=f"shape {list(images.shape)}",
            expected="[B, C, H, W] with C of 1 or 3, not empty",
        )
    codes = to_uint8(images)
    grids = [bicubic_upscale(image[..., 0] if image.shape[2] == 1 else image, scale) for image in codes]
    upscaled = np.stack(grids).reshape(len(codes), *grids[0].shape[:2], codes.shape[3])
    return torch.from_numpy(upscaled).movedim(-1, 1).float() / _PEAK


def _as_pixels(image: ImageLike) -> npt.NDArray[np.generic]:
    """Any accepted image as `[H, W, 1]` or `[H, W, 3]`; tensors are rounded to 8 bits."""
    pixels: npt.NDArray[np.generic]
    if isinstance(image, torch.Tensor):
        pixels = to_uint8(image)
        if pixels.ndim == 4 and pixels.shape[0] == 1:
            pixels = pixels[0]
    else:
        pixels = image if image.ndim != 2 else image[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise InputError(
            "An array or tensor is not one gray or RGB image",
            found=f"shape {list(image.shape)}",
            expected="an array [H, W, 3] or [H, W], or a tensor [3, H, W], [1, H, W] or [1, C, H, W]",
            remedy="measure the images of a batch one by one, and drop the alpha channel",
        )
    return pixels


def _as_8bit(image: ImageLike) -> npt.NDArray[np.generic]:
    pixels = _as_pixels(image)
    if pixels.dtype != np.uint8:
        raise InputError(
            "PSNR and SSIM are measured on 8-bit images",
            found=f"an array of dtype {pixels.dtype}",
            expected="a uint8 array, or a float tensor in 0..1",
            remedy="round the array to uint8, or pass the tensor the model returned",
        )
    return pixels


def _luma_pair(sr: ImageLike, hr: ImageLike, border: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    upscaled, reference = rgb_to_y(_as_8bit(sr)), rgb_to_y(_as_8bit(hr))
    if upscaled.shape != reference.shape:
        raise InputError(
            "The upscaled image and its reference differ in size",
            found=f"{upscaled.shape[0]}x{upscaled.shape[1]} and {reference.shape[0]}x{reference.shape[1]}",
            expected="the same height and width",
            remedy="check that the scale is the model's, and crop the reference to a multiple of it",
        )
    if border < 0 or min(upscaled.shape) <= 2 * border:
        raise InputError(
            "The border leaves nothing to measure",
            found=f"{upscaled.shape[0]}x{upscaled.shape[1]} pixels and a border of {border}",
            expected="a border of at least 0 and less than half of either side",
        )
    inner = (slice(border, upscaled.shape[0] - border), slice(border, upscaled.shape[1] - border))
    return upscaled[inner], reference[inner]
