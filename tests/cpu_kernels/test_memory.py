"""Matrices of tokens: their shape, where their rows begin, and that their memory comes back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.memory import token_rows

pytestmark = pytest.mark.skipif(not library.status().available, reason="the C++ kernels cannot be built here")
LINE = 64  # bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 20000])
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 60, 180, 513])
def test_rows_begin_with_a_cache_line(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = token_rows(rows, columns, dtype)
    assert x.shape == (rows, columns)
    assert x.dtype == dtype
    assert x.stride(1) == 1
    assert x.data_ptr() % LINE == 0
    if columns * x.element_size() >= LINE:
        assert x.stride(0) * x.element_size() % LINE == 0
    assert columns <= x.stride(0) < columns + LINE // x.element_size()
    x.fill_(1)  # all of it is there
    assert float(x[-1].float().sum()) == columns


def test_memory_comes_back() -> None:
    size = 4099, 131  # nobody else's
    first = token_rows(*size, torch.float32)
    place = first.data_ptr()
    view = first[5:]
    del first
    other = token_rows(*size, torch.float32)
    assert other.data_ptr() != place  # a view keeps it
    del view
    assert token_rows(*size, torch.float32).data_ptr() == place


def test_matrices_do_not_share_memory() -> None:
    def filled(number: int) -> bool:
        made = [token_rows(3000 + number, 64, torch.float32).fill_(number + i) for i in range(4)]
        return all(bool((x == number + i).all()) for i, x in enumerate(made))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(filled, range(0, 80, 4)))
