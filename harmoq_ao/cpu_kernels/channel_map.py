"""Attention maps of channels, from the sums over pixels of :mod:`channel_gram`.

A map is made for the product that follows, token by token: ``y[t] = v[t] @ matrix``, where `matrix` `[C, C]` holds the
transposed maps of all heads on its diagonal, and ``+ offset`` where maps and values are codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.channel_gram import Gram
from harmoq_ao.quant.integer_reference import Affine, product_from_sums, quantize_codes, static_qparams
from harmoq_ao.quant.relative_maps import relative_rows, renormalized


@dataclass(frozen=True, eq=False)
class MapQuantizers:
    """Static quantizers (0-d) of both products of an attention.

    Attributes:
        query: Of normalized queries.
        key: Of normalized keys.
        map: Of the map, or of a map relative to its rows' largest entries.
        value: Of the values.
        relative: Whether the map is relative (`quant.relative_maps`).
        numbers: Of queries, keys, map and values each reciprocal, offset, step and lower bound. Read from the tensors
            once, since a recorded run reads none.
    """

    query: Affine
    key: Affine
    map: Affine
    value: Affine
    relative: bool = False
    numbers: tuple[tuple[float, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        acts = self.query, self.key, self.map, self.value
        numbers = tuple(tuple(map(float, (*static_qparams(a), a.step, a.lower))) for a in acts)
        object.__setattr__(self, "numbers", numbers)


def channel_map(gram: Gram, eps: tuple[float, float], factor: Tensor) -> Tensor:
    """``softmax(gram / (|q| |k|) * factor)`` on the diagonal.

    Args:
        gram: Products, and squares of queries and keys, in float32.
        eps: Smallest lengths of queries and keys.
        factor: `[heads]` float32, of the scores.

    Returns:
        `[images * C, C]` float32.

    Raises:
        RuntimeError: The operands do not fit each other, or there are no CPU kernels.
    """
    matrix: Tensor = library.required().channel_map(*gram, *eps, factor)
    return matrix


def channel_map_codes(gram: Gram, tokens: int, factor: Tensor, quantizers: MapQuantizers) -> tuple[Tensor, Tensor]:
    """Maps of codes, rounded, times the step of the values.

    Args:
        gram: Products and sums of codes, int64.
        tokens: Pixels of an image.
        factor: `[heads]` float32, of the scores.
        quantizers: Of both products.

    Returns:
        `[images * C, C]` float32, for the codes of the values, and `[images, C]`, what their lower bound adds.

    Raises:
        RuntimeError: The operands do not fit each other, or there are no CPU kernels.
    """
    query, key, of_map, value = quantizers.numbers
    matrix, added = library.required().channel_map_codes(
        *gram, tokens, query[2:], key[2:], factor, of_map, quantizers.map.bits, value[2:], quantizers.relative
    )
    return matrix, added


def channel_map_reference(gram: Gram, eps: tuple[float, float], factor: Tensor) -> Tensor:
    """What :func:`channel_map` computes, in plain torch."""
    q, k = (squares.sqrt().clamp_min(e) for squares, e in zip(gram[1:], eps, strict=True))
    scores = gram.gram / q.unsqueeze(-1) / k.unsqueeze(-2)
    return _on_diagonal(torch.softmax(scores * factor[:, None, None], -1))


def channel_map_codes_reference(
    gram: Gram, tokens: int, factor: Tensor, quantizers: MapQuantizers
) -> tuple[Tensor, Tensor]:
    """What :func:`channel_map_codes` computes, in plain torch."""
    act, value = quantizers.map, quantizers.value
    sums = gram.gram, gram.q.unsqueeze(-1), gram.k.unsqueeze(-2)
    scores = product_from_sums(*sums, tokens, quantizers.query, quantizers.key)
    weights = torch.softmax(scores * factor[:, None, None], -1)
    codes = quantize_codes(relative_rows(weights) if quantizers.relative else weights, *static_qparams(act), act.bits)
    rounded = codes.float() * act.step + act.lower
    if quantizers.relative:
        rounded = renormalized(rounded, weights, rounded.sum(-1, keepdim=True))
    return _on_diagonal(rounded * value.step), (rounded.sum(-1) * value.lower).flatten(1)


def _on_diagonal(maps: Tensor) -> Tensor:
    """`[images, heads, D, D]` to `[images * C, C]`, transposed."""
    return torch.stack([torch.block_diag(*image.mT) for image in maps]).flatten(0, 1)


def register_fakes(namespace: str) -> None:
    """Tell torch the shapes of this file's operators in the namespace of an instruction set."""

    def shapes(gram: Tensor) -> tuple[Tensor, Tensor]:
        images, heads, dim, _ = gram.shape
        matrix = gram.new_empty(images * heads * dim, heads * dim, dtype=torch.float32)
        return matrix, matrix.new_empty(images, heads * dim)

    @torch.library.register_fake(f"{namespace}::channel_map", allow_override=True)
    def _(gram: Tensor, q: Tensor, k: Tensor, q_eps: float, k_eps: float, factor: Tensor) -> Tensor:
        return shapes(gram)[0]

    @torch.library.register_fake(f"{namespace}::channel_map_codes", allow_override=True)
    def _(
        gram: Tensor,
        q: Tensor,
        k: Tensor,
        tokens: int,
        left: list[float],
        right: list[float],
        factor: Tensor,
        of_map: list[float],
        bits: int,
        value: list[float],
        relative: bool,
    ) -> tuple[Tensor, Tensor]:
        return shapes(gram)
