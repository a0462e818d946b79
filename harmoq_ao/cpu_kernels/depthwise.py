"""Depthwise convolution of images whose pixels are rows of a matrix: no image is ever laid out channel by channel.

``y[t, c] = act(sum_d x[t + d, col + c] * weight[d, c] + bias[c])`` over a square window with zeros around the image,
stride 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common.elementwise import Unary, unary
from harmoq_ao.cpu_kernels import library

LEAKY_SLOPE = 0.01


def depthwise_weight(weight: Tensor) -> Tensor:
    """`[C, 1, k, k]` of a `Conv2d` to `[k * k, C]` float32, contiguous."""
    return weight.detach().float().flatten(1).t().contiguous()


def depthwise_reference(
    x: Tensor,
    col: int,
    channels: int,
    images: int,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: Unary | None,
    out: torch.dtype,
) -> Tensor:
    """What :func:`depthwise` computes, in plain torch."""
    side = round(weight.shape[0] ** 0.5)
    image = x[:, col : col + channels].float().reshape(images, height, width, channels).permute(0, 3, 1, 2)
    taps = weight.t().reshape(channels, 1, side, side)
    y = F.conv2d(image, taps, bias, padding=side // 2, groups=channels).permute(0, 2, 3, 1).reshape(-1, channels)
    return (y if activation is None else unary(activation, y, LEAKY_SLOPE)).to(out)


def depthwise(
    x: Tensor,
    col: int,
    channels: int,
    images: int,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Unary | None = None,
    out: torch.dtype = torch.float32,
) -> Tensor:
    """Convolve each channel with its own window, on the CPU of this machine.

    Args:
        x: `[images * height * width, columns]` float32 or bfloat16, pixels row by row; the row stride may exceed the
            columns.
        col: First column that is convolved.
        channels: How many.
        images: Images of the batch.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        weight: `[k * k, channels]` float32 with odd ``k`` (:func:`depthwise_weight`).
        bias: `[channels]` float32, or None.
        activation: What follows, or None; a leaky ReLU has the slope 0.01.
        out: float32 or bfloat16.

    Returns:
        `[images * height * width, channels]` of type ``out``.

    Raises:
        RuntimeError: The arguments do not fit each other, or there are no CPU kernels.
    """
    kind = -1 if activation is None else int(activation)
    return library.required().depthwise(x, col, channels, images, height, width, weight, bias, kind, out)


def register_fakes(namespace: str) -> None:
    """Tell torch the shape of this file's operator in the namespace of an instruction set."""

    @torch.library.register_fake(f"{namespace}::depthwise", allow_override=True)
    def _(
        x: Tensor,
        col: int,
        channels: int,
        images: int,
        height: int,
        width: int,
        weight: Tensor,
        bias: Tensor | None,
        activation: int,
        out: torch.dtype,
    ) -> Tensor:
        return x.new_empty(x.shape[0], channels, dtype=out)
