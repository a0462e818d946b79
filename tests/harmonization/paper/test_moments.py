"""Running moments: equal to the plain ones during the warm-up, exponential afterwards, exact far from zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.harmonization.paper.moments import PairedMoments
from tests.strategies import SEEDS


def pair(rows: int, seed: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Correlated rows `[rows, 5]` and `[rows, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 5, generator=generator, dtype=torch.float64) + offset
    mix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    d = z @ mix + torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return z.to(dtype), d.to(dtype)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=SEEDS, offset=st.sampled_from([0.0, 3.0, -50.0])
)
def test_the_warm_up_averages_all_rows_alike(sizes: list[int], seed: int, offset: float) -> None:
    z, d = pair(sum(sizes), seed, offset)
    moments = PairedMoments()
    for part_z, part_d in zip(z.split(sizes), d.split(sizes), strict=True):
        moments.update(part_z, part_d)
    assert moments.samples == len(sizes)
    joint = np.concatenate((z.numpy(), d.numpy()), axis=1)
    covariance = torch.from_numpy(np.cov(joint.T, bias=True))
    torch.testing.assert_close(moments.zz(), covariance[:5, :5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.dz(), covariance[5:, :5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.zz(centred=False), z.T @ z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.dz(centred=False), d.T @ z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((moments.mean_z, moments.mean_d), (z.mean(0), d.mean(0)))


@given(count=st.integers(3, 12), momentum=st.floats(0.0, 0.95), warm_up=st.integers(1, 4), seed=SEEDS)
def test_after_the_warm_up_old_samples_fade(count: int, momentum: float, warm_up: int, seed: int) -> None:
    """The weights of the samples, written out."""
    samples = [pair(7, seed + index, offset=2.0 * index) for index in range(count)]
    moments = PairedMoments(momentum, warm_up)
    weights: list[float] = []
    for index, (z, d) in enumerate(samples):
        moments.update(z, d)
        share = 1.0 / (index + 1) if index < warm_up else 1.0 - momentum
        weights = [w * (1.0 - share) for w in weights] + [share]
    mean_z = sum(w * z.mean(0) for w, (z, _) in zip(weights, samples, strict=True))
    second = sum(w * d.T @ z / len(z) for w, (z, d) in zip(weights, samples, strict=True))
    torch.testing.assert_close(moments.mean_z, mean_z)
    torch.testing.assert_close(moments.dz(centred=False), second)


def test_a_large_mean_costs_no_digits() -> None:
    """In float32, with a mean ten thousand times the spread, the naive difference of moments keeps no digit."""
    z, d = pair(20000, 0, offset=1e4, dtype=torch.float32)
    moments = PairedMoments()
    for part_z, part_d in zip(z.split(5000), d.split(5000), strict=True):
        moments.update(part_z, part_d)
    exact = torch.cov(z.double().T, correction=0)
    torch.testing.assert_close(moments.zz(), exact, rtol=1e-4, atol=1e-4)


def test_leading_axes_are_rows() -> None:
    z, d = pair(24, 1)
    flat, shaped = PairedMoments(), PairedMoments()
    flat.update(z, d)
    shaped.update(z.reshape(2, 3, 4, 5), d.reshape(2, 3, 4, 3))
    assert torch.equal(flat.zz(), shaped.zz())


def test_rows_must_pair_up_and_keep_their_width() -> None:
    moments = PairedMoments()
    with pytest.raises(InputError, match="4 and 5"):
        moments.update(torch.ones(4, 2), torch.ones(5, 2))
    moments.update(torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(InputError, match="another width"):
        moments.update(torch.ones(4, 3), torch.ones(4, 3))


def test_nothing_seen_is_an_error() -> None:
    moments = PairedMoments()
    moments.update(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(CalibrationError, match="before any data"):
        moments.zz()


@pytest.mark.parametrize(("momentum", "warm_up"), [(1.0, 200), (-0.1, 200), (0.9, 0), (0.9, 1.5)])
def test_settings_are_checked(momentum: float, warm_up: int) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        PairedMoments(momentum, warm_up)
