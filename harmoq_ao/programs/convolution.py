"""Convolutions of tokens as they lie in memory, channels last, and means over an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.cpu_kernels.column_means import column_means
from harmoq_ao.cpu_kernels.depthwise import depthwise, depthwise_weight
from harmoq_ao.programs.materialize import to_matrix


def _plain(geometry: tuple[Any, ...]) -> bool:
    stride, _, dilation, transposed, *_ = geometry
    return all(n == 1 for n in (*stride, *dilation)) and not transposed


def is_pointwise(weight: Tensor, geometry: tuple[Any, ...]) -> bool:
    """Whether a convolution treats every pixel by itself."""
    return _plain(geometry) and weight.shape[2:] == (1, 1) and geometry[-1] == 1 and not any(geometry[1])


def is_depthwise(weight: Tensor, geometry: tuple[Any, ...]) -> bool:
    """Whether a convolution treats every channel by itself, in place, with a square kernel."""
    groups, (_, one, height, width) = geometry[-1], weight.shape
    same = height == width and height % 2 == 1 and all(p == height // 2 for p in geometry[1])
    return _plain(geometry) and groups == len(weight) > 1 and one == 1 and same


class Convolution(nn.Module):
    """A convolution by torch (oneDNN).

    Args:
        weight: `[N, C, k, k]`.
        bias: `[N]`, or None.
        geometry: Stride, padding, dilation, transposed, output padding, groups.
        shape: Of its input, `[B, C, H, W]`.
        exact: In float32; else operands and result are bfloat16.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], shape: tuple[int, ...], exact: bool
    ) -> None:
        super().__init__()
        dtype = torch.float32 if exact else torch.bfloat16
        self.weight = nn.Parameter(weight.to(dtype, memory_format=torch.channels_last), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.geometry, self.shape = geometry, shape

    def forward(self, matrix: Tensor) -> Tensor:
        images, _, height, width = self.shape
        x = matrix.to(self.weight.dtype).contiguous().view(images, height, width, -1).permute(0, 3, 1, 2)
        return to_matrix(torch.ops.aten.convolution.default(x, self.weight, self.bias, *self.geometry))


class Depthwise(nn.Module):
    """A depthwise convolution of some columns of a matrix; arguments as in :func:`depthwise`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, first: int, images: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(depthwise_weight(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.first, self.size = first, (images, height, width)
        self.out_dtype = torch.float32

    def forward(self, matrix: Tensor) -> Tensor:
        channels = self.weight.shape[1]
        return depthwise(matrix, self.first, channels, *self.size, self.weight, self.bias, out=self.out_dtype)


class ColumnMeans(nn.Module):
    """Means over the rows of each image, `[images, width]`."""

    def __init__(self, first: int, width: int, images: int) -> None:
        super().__init__()
        self.first, self.width, self.images = first, width, images

    def forward(self, matrix: Tensor) -> Tensor:
        return column_means(matrix, self.first, self.width, self.images)
