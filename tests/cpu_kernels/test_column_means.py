"""Means over images against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.column_means import column_means, column_means_reference, register_fakes
from tests.strategies import SEEDS

pytestmark = pytest.mark.skipif(not library.status().available, reason="the C++ kernels cannot be built here")
TYPES = st.sampled_from((torch.float32, torch.bfloat16))


def matrix(seed: int, rows: int, columns: int, first: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns beside those that are wanted hold NaN, and rows are further apart than they are long."""
    whole = torch.full((rows, first + columns + 3), float("nan"))
    whole[:, first : first + columns] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 1
    return whole.to(dtype)[:, :-1]


@given(SEEDS, st.integers(1, 3), st.integers(1, 700), st.integers(1, 70), st.integers(0, 5), TYPES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_means(
    seed: int, images: int, tokens: int, columns: int, first: int, dtype: torch.dtype, squares: bool
) -> None:
    x = matrix(seed, images * tokens, columns, first, dtype)
    got = column_means(x, first, columns, images, squares)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, column_means_reference(x, first, columns, images, squares), rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_is_of_no_consequence(threads: None) -> None:
    x = matrix(1, 2 * 9001, 48, 2, torch.float32)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(column_means(x, 2, 48, 2))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], column_means_reference(x, 2, 48, 2), rtol=1e-5, atol=1e-5)


def test_many_tokens_lose_nothing() -> None:
    """One float32 sum of so many ones and a half would be off by more."""
    x = torch.full((1 << 21, 1), 1.5)
    x[0] = 2.0**15
    want = column_means_reference(x, 0, 1, 1)
    torch.testing.assert_close(column_means(x, 0, 1, 1), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("first", "columns", "images"), [(0, 9, 1), (-1, 2, 1), (3, 6, 1), (0, 8, 3), (0, 8, 0), (0, 8, -2)]
)
def test_arguments_that_do_not_fit(first: int, columns: int, images: int) -> None:
    with pytest.raises(RuntimeError):
        column_means(torch.zeros(10, 8), first, columns, images)


def test_other_types_and_layouts() -> None:
    with pytest.raises(RuntimeError):
        column_means(torch.zeros(10, 8).double(), 0, 8, 1)
    with pytest.raises(RuntimeError):
        column_means(torch.zeros(8, 10).t(), 0, 8, 1)


def test_shape_without_values() -> None:
    register_fakes(library.kernels().name)
    with FakeTensorMode():
        got = column_means(torch.empty(12, 8, dtype=torch.bfloat16), 1, 5, 3)
    assert got.shape == (3, 5)
    assert got.dtype == torch.float32
