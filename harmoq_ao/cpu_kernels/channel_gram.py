"""Channel attention's products, which contract over the pixels of an image, with what its norms need.

``gram[b, h, i, j] = sum_t q[t, h, i] * k[t, h, j]`` over the tokens of image ``b``, in float32 or over codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels import library
from harmoq_ao.quant import integer_reference


class Operand(NamedTuple):
    """Columns of a matrix whose rows are tokens.

    Attributes:
        matrix: `[images * tokens, columns]` float32 or bfloat16; the row stride may exceed the columns.
        first: First of `heads * head_dim` columns.
    """

    matrix: Tensor
    first: int


class Quantizer(NamedTuple):
    """``code = clamp(round(x * (factor / length) + offset), 0, 2**bits - 1)``, a length for each channel of an image.

    Attributes:
        squares: `[images, heads * head_dim]` float32 means of a channel's squares over the tokens, dense rows.
        eps: Smallest length, ``length = max(sqrt(squares * tokens), eps)``.
        factor: Reciprocal of the step.
        offset: What is added then.
        bits: Width of a code, 1 to 8.
    """

    squares: Tensor
    eps: float
    factor: float
    offset: float
    bits: int


class Gram(NamedTuple):
    """Sums over the tokens of each image: float32, or int64 over codes.

    Attributes:
        gram: `[images, heads, head_dim, head_dim]` of products.
        q: `[images, heads, head_dim]` of squares of q, or of its codes.
        k: `[images, heads, head_dim]` of squares of k, or of its codes.
    """

    gram: Tensor
    q: Tensor
    k: Tensor


def channel_gram(q: Operand, k: Operand, heads: int, head_dim: int, images: int) -> Gram:
    """Products and squares in float32, on the CPU of this machine; the same for any number of threads.

    Args:
        q: Left operand.
        k: Right operand, of as many tokens.
        heads: Heads, whose columns follow one another.
        head_dim: Columns of a head.
        images: Images of the batch, of as many tokens each.

    Raises:
        RuntimeError: The operands do not fit each other, or there are no CPU kernels.
    """
    return Gram(*library.required().channel_gram(*q, *k, heads, head_dim, images))


def channel_gram_codes(
    q: Operand, k: Operand, heads: int, head_dim: int, images: int, q_codes: Quantizer, k_codes: Quantizer
) -> Gram:
    """Products and sums of codes, exact for any number of tokens; arguments and errors as :func:`channel_gram`."""
    return Gram(*library.required().channel_gram_codes(*q, *k, heads, head_dim, images, *q_codes, *k_codes))


def channel_gram_reference(q: Operand, k: Operand, heads: int, head_dim: int, images: int) -> Gram:
    """What :func:`channel_gram` computes, in plain torch."""
    left, right = (_by_head(x, heads, head_dim, images) for x in (q, k))
    return Gram(left.mT @ right, left.square().sum(-2), right.square().sum(-2))


def channel_gram_codes_reference(
    q: Operand, k: Operand, heads: int, head_dim: int, images: int, q_codes: Quantizer, k_codes: Quantizer
) -> Gram:
    """What :func:`channel_gram_codes` computes, in plain torch integers."""
    left, right = (_codes(*operand, heads, head_dim, images) for operand in ((q, q_codes), (k, k_codes)))
    return Gram(left.mT @ right, left.sum(-2), right.sum(-2))


def _codes(x: Operand, codes: Quantizer, heads: int, head_dim: int, images: int) -> Tensor:
    """`[images, heads, tokens, head_dim]` int64."""
    values = _by_head(x, heads, head_dim, images)
    lengths = (codes.squares * values.shape[2]).sqrt().clamp_min(codes.eps).reshape(images, heads, 1, head_dim)
    # a plain number would be multiplied with the lengths' reciprocals
    reciprocal = torch.tensor(codes.factor) / lengths
    return integer_reference.quantize_codes(values, reciprocal, codes.offset, codes.bits).long()


def _by_head(x: Operand, heads: int, head_dim: int, images: int) -> Tensor:
    """`[images, heads, tokens, head_dim]` float32."""
    columns = x.matrix[:, x.first : x.first + heads * head_dim].float()
    return columns.reshape(images, -1, heads, head_dim).transpose(1, 2)


def register_fakes(namespace: str) -> None:
    """Tell torch the shapes of this file's operators in the namespace of an instruction set."""

    def sums(q: Tensor, heads: int, dim: int, images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        products = q.new_empty(images, heads, dim, dim, dtype=dtype)
        shape = (images, heads, dim)
        return products, q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)

    @torch.library.register_fake(f"{namespace}::channel_gram", allow_override=True)
    def _(
        q: Tensor, q_col: int, k: Tensor, k_col: int, heads: int, head_dim: int, images: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sums(q, heads, head_dim, images, torch.float32)

    @torch.library.register_fake(f"{namespace}::channel_gram_codes", allow_override=True)
    def _(
        q: Tensor,
        q_col: int,
        k: Tensor,
        k_col: int,
        heads: int,
        head_dim: int,
        images: int,
        q_squares: Tensor,
        q_eps: float,
        q_factor: float,
        q_offset: float,
        q_bits: int,
        k_squares: Tensor,
        k_eps: float,
        k_factor: float,
        k_offset: float,
        k_bits: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sums(q, heads, head_dim, images, torch.int64)
