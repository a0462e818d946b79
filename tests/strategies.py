"""Hypothesis strategies shared by all tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.quantizer import QUANTIZED_BITS, Granularity, QuantizerSpec, Scheme

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("normal", "heavy", "one_sided", "offset", "sparse", "constant")


def bit_widths() -> st.SearchStrategy[int]:
    """Bit widths that quantize, 2 to 8."""
    return st.sampled_from(QUANTIZED_BITS)


def shapes(min_dims: int = 1, max_dims: int = 4, max_side: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of non-empty tensors."""
    return st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def float_tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...] | None = None,
    kinds: tuple[str, ...] = KINDS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Finite tensors of several distributions, with magnitudes from 1e-4 to 1e4.

    Hypothesis chooses shape, distribution, magnitude and seed; the values come from torch, so that large tensors are
    cheap to draw and to shrink.
    """
    size = draw(shapes() if shape is None else st.just(shape) if isinstance(shape, tuple) else shape)
    kind = draw(st.sampled_from(kinds))
    magnitude = 10.0 ** draw(st.integers(-4, 4))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    values = torch.randn(size, generator=generator)
    return (_shaped(values, kind, generator) * magnitude).to(dtype)


def _shaped(values: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "heavy":
        return values * (1.0 / torch.rand(values.shape, generator=generator).clamp_min(1e-3))
    if kind == "one_sided":
        return values.abs()
    if kind == "offset":
        return values + 8.0
    if kind == "sparse":
        return values * (torch.rand(values.shape, generator=generator) < 0.3)
    if kind == "constant":
        return torch.full_like(values, float(values.flatten()[0]))
    return values


@st.composite
def static_specs(draw: st.DrawFn, schemes: tuple[Scheme, ...] = tuple(Scheme)) -> QuantizerSpec:
    """Static per-tensor specs that quantize."""
    return QuantizerSpec(draw(bit_widths()), draw(st.sampled_from(schemes)))


@st.composite
def specs(draw: st.DrawFn) -> QuantizerSpec:
    """Any valid spec that quantizes."""
    granularity = draw(st.sampled_from(Granularity))
    dynamic = granularity is not Granularity.PER_CHANNEL and draw(st.booleans())
    return QuantizerSpec(draw(bit_widths()), draw(st.sampled_from(Scheme)), granularity, dynamic)


@st.composite
def weights(draw: st.DrawFn, max_rows: int = 12, max_columns: int = 24) -> Tensor:
    """Weights `[m, d]` whose columns and rows differ in magnitude."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    weight = draw(float_tensors((rows, columns), kinds=("normal", "heavy", "sparse")))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return weight * torch.exp(torch.randn(columns, generator=generator))


@st.composite
def joint_scales(draw: st.DrawFn, channels: int, limits: tuple[float, float] = (0.1, 10.0)) -> Tensor:
    """Positive vectors `[channels]` within `limits`, float32."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    low, high = (torch.tensor(limit).log() for limit in limits)
    return torch.exp(low + (high - low) * torch.rand(channels, generator=generator))
