"""Steps that torch's own kernels compute: float linears and convolutions, means, attention among channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.gpu_programs.kernels import Producer
from harmoq_ao.programs.heads import Heads
from harmoq_ao.programs.materialize import to_matrix
from harmoq_ao.triton_kernels import convolution


class FloatLinear(nn.Module):
    """``x @ weight + bias`` of some columns.

    Args:
        weight: `[K, N]`.
        bias: `[N]`, or None.
        first: First column.
        out_dtype: Of operands and result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, first: int, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight.t().to(out_dtype).contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(out_dtype), persistent=False)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, N]`."""
        columns = x[:, self.first : self.first + self.weight.shape[1]]
        return F.linear(columns.to(self.weight.dtype), self.weight, self.bias)


class Convolution(Producer):
    """A convolution of tokens as they lie in memory, channels last; arguments as in `programs/convolution.py`.

    Attributes:
        out_dtype: Of the result.
    """

    takes_norm = False
    out_dtype: torch.dtype = torch.float32

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], shape: tuple[int, ...], exact: bool
    ) -> None:
        super().__init__(len(weight))
        self.ours = convolution.takes(weight, geometry)
        kept = convolution.pack(weight) if self.ours else weight.to(memory_format=torch.channels_last)
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", kept, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.geometry, self.shape, self.kernel = geometry, shape, tuple(weight.shape[2:])

    def forward(self, matrix: Tensor, *residual: Tensor) -> Tensor:
        """`[pixels, N]`."""
        images, _, height, width = self.shape
        added = residual[0].contiguous() if self.adds else None
        if self.ours:
            size = (images, height, width)
            return convolution.convolution(
                matrix.contiguous(), self.weight, self.bias, size, self.kernel, added, self.out_dtype
            )
        x = matrix.contiguous().view(images, height, width, -1).permute(0, 3, 1, 2)
        weight, bias = (None if t is None else t.to(x.dtype) for t in (self.weight, self.bias))
        y = to_matrix(torch.ops.aten.convolution.default(x, weight, bias, *self.geometry))
        return (y if added is None else y + added).to(self.out_dtype)


class Depthwise(nn.Module):
    """A depthwise convolution of some columns of a matrix; arguments as in `programs/convolution.py`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, first: int, images: int, height: int, width: int
    ) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight.to(memory_format=torch.channels_last), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.first, self.size = first, (images, height, width)

    def forward(self, matrix: Tensor) -> Tensor:
        """`[pixels, C]`."""
        images, height, width = self.size
        channels = len(self.weight)
        columns = matrix[:, self.first : self.first + channels]
        x = columns.unflatten(0, (images, height, width)).permute(0, 3, 1, 2)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return to_matrix(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=channels))


class Means(nn.Module):
    """Means over the rows of each image, `[images, width]`."""

    def __init__(self, first: int, width: int, images: int) -> None:
        super().__init__()
        self.first, self.width, self.images = first, width, images

    def forward(self, matrix: Tensor) -> Tensor:
        """`[images, width]`."""
        columns = matrix[:, self.first : self.first + self.width]
        return columns.unflatten(0, (self.images, -1)).mean(1)


class ChannelAttention(nn.Module):
    """Attention among channels: scores are sums over the pixels of an image, of queries and keys of length one.

    Args:
        parts: Where queries, keys and values are.
        eps: Smallest lengths of queries and keys.
        factor: `[heads]`, of the scores.
    """

    def __init__(self, parts: tuple[Heads, Heads, Heads], eps: tuple[float, float], factor: Tensor) -> None:
        super().__init__()
        self.places = tuple((part.first, part.heads, part.width, len(part.rows)) for part in parts)
        self.eps = eps
        self.factor: Tensor
        self.register_buffer("factor", factor.reshape(-1, 1, 1), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[rows, heads * width]`."""
        matrices = (query, key, value)
        q, k, v = (self._heads(m, *place) for m, place in zip(matrices, self.places, strict=True))
        lengths = [
            torch.linalg.vector_norm(part, dim=2, dtype=torch.float32).clamp_min(eps)
            for part, eps in zip((q, k), self.eps, strict=True)
        ]
        gram = torch.matmul(q.transpose(2, 3), k)
        scores = gram / lengths[0].unsqueeze(3) / lengths[1].unsqueeze(2) * self.factor
        weights = torch.softmax(scores, -1).to(v.dtype)
        mixed = torch.matmul(v, weights.transpose(2, 3))
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    @staticmethod
    def _heads(matrix: Tensor, first: int, heads: int, width: int, images: int) -> Tensor:
        """`[images, heads, tokens, width]`."""
        columns = matrix[:, first : first + heads * width]
        return columns.reshape(images, -1, heads, width).transpose(1, 2)
