"""Maps of channels against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.cpu_kernels import channel_map, library
from harmoq_ao.cpu_kernels.channel_gram import Gram
from harmoq_ao.cpu_kernels.channel_map import MapQuantizers
from harmoq_ao.quant.integer_reference import Affine
from tests.strategies import SEEDS, bit_widths

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))


def affine(lower: float, upper: float, bits: int) -> Affine:
    return Affine(torch.tensor((upper - lower) / ((1 << bits) - 1)), torch.tensor(lower), bits)


def quantizers(bits: int, relative: bool) -> MapQuantizers:
    ranges = affine(-0.2, 0.15, bits), affine(-0.1, 0.2, bits), affine(0.0, 1.0, bits), affine(-1.0, 2.0, bits)
    return MapQuantizers(*ranges, relative)


def sums_of_codes(seed: int, size: tuple[int, int, int], bits: int, tokens: int) -> Gram:
    generator, (images, heads, dim) = torch.Generator().manual_seed(seed), size
    q, k = torch.randint(1 << bits, (2, images, heads, tokens, dim), generator=generator)
    return Gram(q.mT @ k, q.sum(-2), k.sum(-2))


@given(SEEDS, SIZES, st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_maps_of_floats(seed: int, size: tuple[int, int, int], tokens: int) -> None:
    generator, (images, heads, dim) = torch.Generator().manual_seed(seed), size
    q, k = torch.randn(2, images, heads, tokens, dim, generator=generator)
    q[..., 0] = 0  # no length
    gram = Gram(q.mT @ k, q.square().sum(-2), k.square().sum(-2))
    factor = torch.rand(heads, generator=generator) * 5
    got = channel_map.channel_map(gram, (1e-12, 1e-6), factor)
    want = channel_map.channel_map_reference(gram, (1e-12, 1e-6), factor)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@given(SEEDS, SIZES, st.integers(1, 60), bit_widths(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_maps_of_codes(seed: int, size: tuple[int, int, int], tokens: int, bits: int, relative: bool) -> None:
    gram, both = sums_of_codes(seed, size, bits, tokens), quantizers(bits, relative)
    factor = torch.linspace(2.0, 9.0, size[1]) / tokens
    got = channel_map.channel_map_codes(gram, tokens, factor, both)
    want = channel_map.channel_map_codes_reference(gram, tokens, factor, both)
    # Exponentials differ by an ulp or two, so that an entry at a tie may be a step away; all others are the same. With
    # it, a relative row's sum and its other entries move by less.
    step = float(both.map.step)
    assert (got[0] - want[0]).abs().max() <= 1.001 * step * float(both.value.step)
    assert (got[1] - want[1]).abs().max() <= 1.001 * step * abs(float(both.value.lower))
    ties = ((got[0] - want[0]).abs() > 1e-5).any(0).sum()  # columns of the matrix are rows of maps
    assert ties <= 1 + 0.01 * want[0].shape[1]


def test_rows_of_a_relative_map_sum_to_one() -> None:
    both = quantizers(2, True)
    matrix, _ = channel_map.channel_map_codes(sums_of_codes(3, (2, 3, 9), 2, 50), 50, torch.ones(3), both)
    rows = matrix.reshape(2, 27, 27).sum(1) / both.value.step
    torch.testing.assert_close(rows, torch.ones(2, 27))


def test_shapes_are_known_without_running() -> None:
    channel_map.register_fakes(library.kernels().name)
    both = quantizers(4, False)
    assert both.numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        floats = Gram(torch.empty(2, 3, 5, 5), torch.empty(2, 3, 5), torch.empty(2, 3, 5))
        codes = Gram(*(x.long() for x in floats))
        matrix = channel_map.channel_map(floats, (1e-12, 1e-12), torch.empty(3))
        pair = channel_map.channel_map_codes(codes, 7, torch.empty(3), both)
    assert [(tuple(x.shape), x.dtype) for x in (matrix, *pair)] == [
        ((30, 15), torch.float32),
        ((30, 15), torch.float32),
        ((2, 15), torch.float32),
    ]


G, S, F = torch.ones(1, 2, 5, 5), torch.ones(1, 2, 5), torch.ones(2)


@pytest.mark.parametrize(
    "arguments",
    [
        (G[..., :4], S, S, 1e-12, 1e-12, F),
        (G, S[..., :4], S, 1e-12, 1e-12, F),
        (G, S, S[0], 1e-12, 1e-12, F),
        (G, S, S, 1e-12, 1e-12, torch.ones(3)),
        (G.double(), S, S, 1e-12, 1e-12, F),
        (G.mT, S, S, 1e-12, 1e-12, F),
        (G, S, S, 1e-12, 1e-12, F.long()),
    ],
)
def test_operands_that_do_not_fit_are_refused(arguments: tuple[Tensor | float, ...]) -> None:
    with pytest.raises(RuntimeError, match="channel_map"):
        library.kernels().channel_map(*arguments)


def test_bits_that_there_are_not_are_refused() -> None:
    codes = [x.long() for x in (G, S, S)]
    with pytest.raises(RuntimeError, match="1 to 8 bits"):
        library.kernels().channel_map_codes(
            *codes, 7, [1.0, 0.0], [1.0, 0.0], F, [1.0, 0.0, 1.0, 0.0], 9, [1.0, 0.0], False
        )
