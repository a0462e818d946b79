"""Steps that torch's own kernels compute: float linears and convolutions, means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common.elementwise import Unary
from harmoq_ao.gpu_programs.kernels import Producer
from harmoq_ao.programs.materialize import to_matrix
from harmoq_ao.triton_kernels import convolution


class Contraction(Producer):
    """A contraction in floats, whose weights and bias take in what happens to each channel behind it.

    Args:
        weight: Output channels first.
        bias: Of each output channel, or None.
        first: First column that it reads.

    Attributes:
        out_dtype: Of the result.
        ours: Whether our kernel computes it, which takes some columns of a matrix and adds a residual.
        activation: The function behind it and its slope, or None.
        kernel: Height and width of that kernel's.
    """

    takes_norm = False
    out_dtype: torch.dtype = torch.float32
    ours = False
    activation: tuple[Unary, float] | None = None
    kernel: tuple[int, ...] = (1, 1)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        super().__init__(len(weight))
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.first, self.columns = first, weight.shape[1]

    def fold(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Multiply its result, then add: a number for each channel."""
        if scale is not None:
            self.weight = self.weight * scale.float().reshape(-1, *[1] * (self.weight.dim() - 1))
            self.bias = None if self.bias is None else self.bias * scale.float()
        if shift is not None:
            self.bias = shift.float() if self.bias is None else self.bias + shift.float()

    def prepare(self, dtype: torch.dtype) -> None:
        """Bring the weights into the form that they are used in, once all is folded into them.

        Args:
            dtype: Of the operand.
        """
        weight = self.weight.to(dtype)
        if self.ours:
            self.kernel = tuple(weight.shape[2:])
            self.weight = convolution.pack(weight)
        else:
            self.weight = weight.to(memory_format=torch.channels_last)
            self.bias = None if self.bias is None else self.bias.to(dtype)

    def convolved(self, x: Tensor, size: tuple[int, int, int], residual: tuple[Tensor, ...]) -> Tensor:
        """The kernel for a convolution of `[images * H * W, C]`."""
        added = residual[0].contiguous() if self.adds else None
        columns = x[:, self.first : self.first + self.columns]
        function = () if self.activation is None else self.activation
        operands = (self.weight, self.bias, size, self.kernel, added, self.out_dtype, *function)
        return convolution.convolution(columns, *operands)


class FloatLinear(Contraction):
    """``x @ weight + bias`` of some columns; a convolution of one tap."""

    ours = True

    def __init__(self, weight: Tensor, bias: Tensor | None, first: int, out_dtype: torch.dtype) -> None:
        super().__init__(weight.t()[:, :, None, None], bias, first)
        self.out_dtype = out_dtype

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        """`[rows, N]`."""
        return self.convolved(x, (1, 1, len(x)), residual)


class Convolution(Contraction):
    """A convolution of tokens as they lie in memory, channels last; arguments as in `programs/convolution.py`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], shape: tuple[int, ...], exact: bool
    ) -> None:
        super().__init__(weight, bias, 0)
        self.ours = convolution.takes(weight, geometry)
        self.geometry, self.shape = geometry, shape

    def forward(self, matrix: Tensor, *residual: Tensor) -> Tensor:
        """`[pixels, N]`."""
        images, _, height, width = self.shape
        if self.ours:
            return self.convolved(matrix, (images, height, width), residual)
        x = matrix.contiguous().view(images, height, width, -1).permute(0, 3, 1, 2)
        y = torch.ops.aten.convolution.default(x, self.weight, self.bias, *self.geometry)
        return to_matrix(y).to(self.out_dtype)


class Depthwise(Contraction):
    """A depthwise convolution of some columns of a matrix; arguments as in `programs/convolution.py`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, first: int, images: int, height: int, width: int) -> None:
        super().__init__(weight, bias, first)
        self.size = (images, height, width)

    def forward(self, matrix: Tensor) -> Tensor:
        """`[pixels, C]`."""
        channels = len(self.weight)
        x = matrix[:, self.first : self.first + channels].unflatten(0, self.size).permute(0, 3, 1, 2)
        y = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[2] // 2, groups=channels)
        return to_matrix(y).to(self.out_dtype)


class Means(nn.Module):
    """Means over the rows of each image, `[images, width]`."""

    def __init__(self, first: int, width: int, images: int) -> None:
        super().__init__()
        self.first, self.width, self.images = first, width, images

    def forward(self, matrix: Tensor) -> Tensor:
        """`[images, width]`."""
        columns = matrix[:, self.first : self.first + self.width]
        return columns.unflatten(0, (self.images, -1)).mean(1)
