"""Memory of matrices of tokens that is kept between calls."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.cpu_kernels import library


def token_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix `[rows, columns]`, not initialised, whose rows begin with a cache line unless they are shorter than one.

    Its memory goes back to a pool with the tensor: the system gives fresh memory page by page, which takes longer than
    many a kernel. The pool keeps no more than was in use at one time.

    Args:
        rows: Number of tokens.
        columns: Of each.
        dtype: float32, bfloat16 or uint8.
    """
    namespace = library.kernels()
    assert namespace is not None
    made: Tensor = namespace.token_rows(rows, columns, dtype)
    return made
