"""Products over the pixels of an image against plain torch: float32 within rounding, codes exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.cpu_kernels import channel_gram, library
from harmoq_ao.cpu_kernels.channel_gram import Operand, Quantizer
from tests.strategies import SEEDS, bit_widths

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 600), st.integers(1, 4), st.integers(1, 50))
TYPES = st.sampled_from((torch.float32, torch.bfloat16))


def operand(generator: torch.Generator, rows: int, columns: int, first: int, dtype: torch.dtype) -> Operand:
    """Columns beside the operand's hold NaN."""
    matrix = torch.full((rows, first + columns + 3), float("nan"))
    matrix[:, first : first + columns] = torch.randn(rows, columns, generator=generator)
    return Operand(matrix.to(dtype)[:, :-1], first)


@given(SEEDS, SIZES, st.integers(0, 5), TYPES, TYPES)
@settings(max_examples=40, deadline=None)
def test_products_and_squares(
    seed: int, size: tuple[int, int, int, int], first: int, left: torch.dtype, right: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, tokens, heads, dim = size
    q = operand(generator, images * tokens, heads * dim, first, left)
    k = operand(generator, images * tokens, heads * dim, 1, right)
    got = channel_gram.channel_gram(q, k, heads, dim, images)
    want = channel_gram.channel_gram_reference(q, k, heads, dim, images)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * tokens**0.5)


@given(SEEDS, SIZES, bit_widths(), bit_widths(), TYPES)
@settings(max_examples=40, deadline=None)
def test_codes_are_exact(
    seed: int, size: tuple[int, int, int, int], q_bits: int, k_bits: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, tokens, heads, dim = size
    q, k = (operand(generator, images * tokens, heads * dim, first, dtype) for first in (0, 2))
    codes = [
        # columns of a wider matrix; smallest lengths that some channels fall short of
        Quantizer(
            torch.rand(images, heads * dim + 2, generator=generator)[:, 1:-1], tokens**0.5 / 2, step, top / 2, bits
        )
        for bits in (q_bits, k_bits)
        for top in [float((1 << bits) - 1)]
        for step in [tokens**0.5 * top / 6]
    ]
    got = channel_gram.channel_gram_codes(q, k, heads, dim, images, *codes)
    want = channel_gram.channel_gram_codes_reference(q, k, heads, dim, images, *codes)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sums_beyond_what_int32_and_float32_hold() -> None:
    tokens, largest = 70_000, Quantizer(torch.ones(1, 3), 1e-12, 1.0, 1e9, 8)
    x = Operand(torch.zeros(tokens, 3), 0)
    got = channel_gram.channel_gram_codes(x, x, 1, 3, 1, largest, largest)
    assert (got.gram == 255 * 255 * tokens).all()
    assert (got.q == 255 * tokens).all()
    assert (got.k == 255 * tokens).all()


def test_any_number_of_threads_gives_the_same() -> None:
    x, threads = Operand(torch.randn(9001, 24), 0), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = channel_gram.channel_gram(x, x, 3, 8, 1)
        torch.set_num_threads(2)
        two = channel_gram.channel_gram(x, x, 3, 8, 1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_shapes_are_known_without_running() -> None:
    channel_gram.register_fakes(library.kernels().name)
    with FakeTensorMode():
        x, codes = Operand(torch.empty(12, 10), 0), Quantizer(torch.empty(2, 10), 1e-12, 1.0, 0.0, 8)
        floats = channel_gram.channel_gram(x, x, 2, 5, 2)
        integers = channel_gram.channel_gram_codes(x, x, 2, 5, 2, codes, codes)
    for sums, dtype in ((floats, torch.float32), (integers, torch.int64)):
        assert [(tuple(s.shape), s.dtype) for s in sums] == [
            ((2, 2, 5, 5), dtype),
            ((2, 2, 5), dtype),
            ((2, 2, 5), dtype),
        ]


X = torch.ones(12, 10)


@pytest.mark.parametrize(
    "arguments",
    [
        (X.double(), 0, X, 0, 2, 5, 1),
        (X, 0, X[0], 0, 2, 5, 1),
        (X, 1, X, 0, 2, 5, 1),
        (X, -1, X, 0, 1, 5, 1),
        (X, 0, X, 0, 3, 5, 1),
        (X, 0, X, 0, 2, 0, 1),
        (X, 0, X[:6], 0, 2, 5, 1),
        (X, 0, X, 0, 2, 5, 5),
        (X, 0, X, 0, 2, 5, 0),
    ],
)
def test_operands_that_do_not_fit_are_refused(arguments: tuple[Tensor | int, ...]) -> None:
    with pytest.raises(RuntimeError, match="channel_gram"):
        library.kernels().channel_gram(*arguments)


@pytest.mark.parametrize(
    "codes",
    [
        Quantizer(torch.ones(1, 9), 1e-12, 1.0, 0.0, 8),
        Quantizer(torch.ones(1, 10).double(), 1e-12, 1.0, 0.0, 8),
        Quantizer(torch.ones(10, 1).t(), 1e-12, 1.0, 0.0, 9),
        Quantizer(torch.ones(1, 20)[:, ::2], 1e-12, 1.0, 0.0, 8),
    ],
)
def test_quantizers_that_do_not_fit_are_refused(codes: Quantizer) -> None:
    x = Operand(X, 0)
    with pytest.raises(RuntimeError, match="channel_gram_codes"):
        channel_gram.channel_gram_codes(x, x, 2, 5, 1, codes, codes)
