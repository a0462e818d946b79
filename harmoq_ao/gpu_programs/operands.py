"""Operands of the kernels, made ready once per model: programs for several sizes share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.triton_kernels import attention_operands as attention_kernels
from harmoq_ao.triton_kernels import operands as kernels


@dataclass(frozen=True, eq=False)
class Site:
    """A quantized linear.

    Attributes:
        operands: Its codes, scales and range.
        codes: Its packed weight codes, the tensor of the model: whose memory tells sites apart.
        bits: Width of a weight code.
    """

    operands: LinearOperands
    codes: Tensor
    bits: int

    @property
    def key(self) -> int:
        """What tells it from other sites."""
        return self.codes.data_ptr()

    @property
    def packing(self) -> tuple[LinearOperands, Tensor, int]:
        """As `pack_attention` takes it."""
        return self.operands, self.codes, self.bits


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A norm over the channels of a token.

    Attributes:
        weight: `[C]` float32, or None.
        bias: Likewise.
        eps: Added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def behind(self, width: int) -> Any:
        """The norm as kernels take it behind an operation."""
        weight = torch.ones(width) if self.weight is None else self.weight.float()
        bias = torch.zeros(width) if self.bias is None else self.bias.float()
        return kernels.Norm(weight.contiguous(), bias.contiguous(), self.eps)


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """An attention between its linears; see `pack_attention`.

    Attributes:
        heads: Number of heads.
        head_dim: Channels of a head.
        scale: `[heads]` float32 factor of the scores.
        bias: `[heads, N, M]`, or None.
        cosine: Whether queries and keys are normalised.
        scale_after: Whether the product is scaled, not the queries.
        matmuls: Quantizers of both products, or None.
        apart: What is added to scores between regions.
        products: What tells the sites of both products from others: where their first ranges lie.
    """

    heads: int
    head_dim: int
    scale: Tensor
    bias: Tensor | None
    cosine: bool
    scale_after: bool
    matmuls: attention_kernels.MatmulQuantizers | None
    apart: int = attention_kernels.APART
    products: tuple[int, ...] = ()


class Packed(nn.Module):
    """Tensors of a dataclass of the kernels, which move with the module."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        self.value = _mapped(self.value, fn)
        return super()._apply(fn, recurse)


class Table(nn.Module):
    """One tensor that modules share: a module moves it once for all of them."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor: Tensor
        self.register_buffer("tensor", tensor, persistent=False)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _mapped(getattr(value, f.name), fn) for f in dataclasses.fields(value)}
        )
    return value


class Operands:
    """What the programs of one model share: weights by site, and by the norm that is folded into them.

    Args:
        floats: Leave linears in bfloat16, unrounded, in the same kernels; for comparison.
    """

    def __init__(self, floats: bool = False) -> None:
        self.floats = floats
        self._kept: dict[Hashable, list[tuple[tuple[Tensor | None, ...], Packed]]] = {}

    def linear(self, site: Site, norm: LayerNorm | None = None) -> Packed:
        """A linear behind a norm or none.

        Raises:
            KernelError: The kernels do not take it.
        """

        def make() -> Any:
            packed = (kernels.from_floats if self.floats else kernels.from_operands)(*site.packing)
            return packed if norm is None else kernels.with_norm(packed, norm.weight, norm.bias)

        return self._shared(("linear", site.key), (site.operands.bias, *_of(norm)), make)

    def attention(
        self, spec: AttentionSpec, sites: tuple[Site, Site] | None = None, norm: LayerNorm | None = None
    ) -> Packed:
        """An attention, with the linears in front and behind or without.

        Raises:
            KernelError: The kernels do not take it.
        """
        qkv, proj = (None, None) if sites is None else (site.packing for site in sites)

        def make() -> Any:
            packed = attention_kernels.pack_attention(
                qkv, proj, spec.heads, spec.head_dim, spec.scale,
                bias=spec.bias, cosine=spec.cosine, scale_after=spec.scale_after, matmuls=spec.matmuls,
                floats=self.floats, apart=spec.apart,
            )  # fmt: skip
            return packed if norm is None else attention_kernels.with_norm(packed, norm.weight, norm.bias)

        keys = () if sites is None else tuple(site.key for site in sites)
        numbers = (spec.heads, spec.head_dim, spec.cosine, spec.scale_after, spec.apart)
        bounds = () if spec.matmuls is None else _bounds(spec.matmuls)
        biases = () if sites is None else tuple(site.operands.bias for site in sites)
        return self._shared(("attention", keys, numbers), (spec.scale, spec.bias, *biases, *bounds, *_of(norm)), make)

    def _shared(self, key: Hashable, tensors: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Packed:
        """The operands that were made from these tensors before, or new ones."""
        for known, packed in self._kept.setdefault(key, []):
            if len(known) == len(tensors) and all(map(_equal, known, tensors)):
                return packed
        packed = Packed(make())
        self._kept[key].append((tensors, packed))
        return packed


def _of(norm: LayerNorm | None) -> tuple[Tensor | None, ...]:
    return () if norm is None else (norm.weight, norm.bias, torch.tensor(norm.eps))


def _bounds(matmuls: Any) -> tuple[Tensor | None, ...]:
    parts = (matmuls.q, matmuls.k, matmuls.attention, matmuls.v)
    scales = (part.joint_scale for part in parts)
    widths = torch.tensor([*(part.bits for part in parts), int(matmuls.relative)])
    return *(t for part in parts if part.act for t in (part.act.step, part.act.lower)), *scales, widths


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)
