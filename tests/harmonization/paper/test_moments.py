"""Moments of paired rows: equal to numpy's, and exact far from zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, InputError
from harmoq_ao.harmonization.paper.moments import PairedMoments
from tests.strategies import SEEDS


def pair(rows: int, seed: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Correlated rows `[rows, 5]` and `[rows, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 5, generator=generator, dtype=torch.float64) + offset
    mix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    d = z @ mix + torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return z.to(dtype), d.to(dtype)


@given(rows=st.integers(1, 200), seed=SEEDS, offset=st.sampled_from([0.0, 3.0, -50.0]))
def test_they_are_those_of_all_rows(rows: int, seed: int, offset: float) -> None:
    z, d = pair(rows, seed, offset)
    moments = PairedMoments(z, d)
    joint = np.concatenate((z.numpy(), d.numpy()), axis=1)
    covariance = torch.from_numpy(np.cov(joint.T, bias=True))
    torch.testing.assert_close(moments.zz(), covariance[:5, :5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.dz(), covariance[5:, :5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.zz(centred=False), z.T @ z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.dz(centred=False), d.T @ z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((moments.mean_z, moments.mean_d), (z.mean(0), d.mean(0)))


def test_a_large_mean_costs_no_digits() -> None:
    """In float32, with a mean ten thousand times the spread, the naive difference of moments keeps no digit."""
    z, d = pair(20000, 0, offset=1e4, dtype=torch.float32)
    exact = torch.cov(z.double().T, correction=0)
    torch.testing.assert_close(PairedMoments(z, d).zz(), exact, rtol=1e-4, atol=1e-4)


def test_leading_axes_are_rows() -> None:
    z, d = pair(24, 1)
    assert torch.equal(PairedMoments(z, d).zz(), PairedMoments(z.reshape(2, 3, 4, 5), d.reshape(2, 3, 4, 3)).zz())


def test_rows_must_be_there_and_pair_up() -> None:
    with pytest.raises(InputError, match="4 and 5"):
        PairedMoments(torch.ones(4, 2), torch.ones(5, 2))
    with pytest.raises(CalibrationError, match="no rows"):
        PairedMoments(torch.ones(0, 2), torch.ones(0, 2))
