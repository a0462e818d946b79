"""H: what the filters compute, where the tokens lie, and which subspace a channel projection keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.paper.projections import (
    PROJECTIONS,
    SPATIAL_FILTERS,
    TokenGrid,
    channel_basis,
    check_projection,
    dct,
    filtered,
    find_grid,
    laplacian,
    learned_basis,
    random_basis,
    sobel,
    subspace_size,
)
from tests.strategies import SEEDS

SIDES = st.integers(3, 19)


def grid_tokens(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """White noise on a grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)


def smooth_image(height: int, width: int, channels: int = 4, seed: int = 0) -> Tensor:
    """A random image `[height, width, channels]` whose neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, max(2, height // 6), max(2, width // 6), generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0)


def into_windows(image: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, K]` to `[B * windows, height * width, K]`."""
    batch, rows, columns, channels = image.shape
    cut = image.reshape(batch, rows // height, height, columns // width, width, channels)
    return cut.transpose(2, 3).reshape(-1, height * width, channels)


# --- filters ----------------------------------------------------------------------------------------------------------


def convolved(tokens: Tensor, kernel: list[list[float]]) -> Tensor:
    """Valid cross-correlation, channel by channel, as rows."""
    images = tokens.permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    result = F.conv2d(images, torch.tensor(kernel, dtype=tokens.dtype)[None, None])
    shape = (tokens.shape[0], tokens.shape[3], *result.shape[2:])
    return result.reshape(shape).permute(0, 2, 3, 1).flatten(0, 2)


@given(batch=st.integers(1, 3), height=SIDES, width=SIDES, seed=SEEDS)
def test_laplacian_and_sobel_are_convolutions_without_padding(batch: int, height: int, width: int, seed: int) -> None:
    tokens = grid_tokens(batch, height, width, seed=seed)
    kernel = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(laplacian(tokens), convolved(tokens, kernel) / math.sqrt(20))
    horizontal = [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]
    vertical = [[row[i] for row in horizontal] for i in range(3)]
    both = torch.cat((convolved(tokens, horizontal), convolved(tokens, vertical)))
    torch.testing.assert_close(sobel(tokens), both / math.sqrt(12))


@given(height=SIDES, width=SIDES, seed=SEEDS)
def test_dct_keeps_the_high_coefficients_of_whole_blocks(height: int, width: int, seed: int) -> None:
    tokens = grid_tokens(2, height, width, 2, seed)
    side = 8 if min(height, width) >= 8 else 4 if min(height, width) >= 4 else 3
    expected = []
    for image in tokens.numpy():
        for top in range(0, height - side + 1, side):
            for left in range(0, width - side + 1, side):
                block = image[top : top + side, left : left + side]
                coefficients = scipy.fft.dctn(block, axes=(0, 1), norm="ortho")
                expected += [coefficients[u, v] for u in range(side) for v in range(side) if u + v >= side / 2]
    torch.testing.assert_close(dct(tokens), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("name", SPATIAL_FILTERS)
def test_filters_take_a_constant_to_zero_and_commute_with_a_linear_layer(name: str) -> None:
    tokens, weight = grid_tokens(2, 11, 9, 5), grid_tokens(1, 1, 7, 5)[0, 0]
    grid = TokenGrid(2, 11, 9)
    constant = torch.ones(2, 99, 5, dtype=torch.float64) * torch.arange(5.0)
    assert float(filtered(name, constant, grid).abs().max()) < 1e-12
    flat = tokens.flatten(1, 2)
    torch.testing.assert_close(filtered(name, flat @ weight.T, grid), filtered(name, flat, grid) @ weight.T)


@pytest.mark.parametrize("name", SPATIAL_FILTERS)
def test_filters_keep_the_mean_square_of_white_noise(name: str) -> None:
    tokens = grid_tokens(4, 64, 64, 4)
    ratio = float(filtered(name, tokens, TokenGrid(4, 64, 64)).square().mean() / tokens.square().mean())
    assert ratio == pytest.approx(1.0, abs=0.03)


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(ConfigError, match="laplacian, sobel, dct"):
        filtered("prewitt", torch.ones(1, 9, 2), TokenGrid(1, 3, 3))


# --- grids ------------------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 3), height=st.integers(6, 40), width=st.integers(6, 40), reduction=st.sampled_from([1, 2]))
def test_feature_maps_lie_on_the_grid_of_the_image(batch: int, height: int, width: int, reduction: int) -> None:
    rows, columns = math.ceil(height / reduction), math.ceil(width / reduction)
    image, grid = (batch, height, width), TokenGrid(batch, rows, columns)
    assert find_grid(torch.zeros(*grid, 5), image) == grid
    tokens = find_grid(torch.zeros(batch, rows * columns, 5), image)
    assert tokens is not None
    assert tokens.height * tokens.width == rows * columns
    assert tokens == grid or reduction == 2  # another grid of the image may have as many tokens
    flat = find_grid(torch.zeros(batch * rows * columns, 5), image)
    assert flat == tokens


@pytest.mark.parametrize("window", [(8, 8), (4, 16), (16, 4), (8, 32), (32, 8), (6, 8)])
def test_the_shape_of_windows_is_told_by_their_neighbours(window: tuple[int, int]) -> None:
    side = 48 if window == (6, 8) else 64
    image = torch.stack([smooth_image(side, side, seed=s) for s in range(2)])
    found = find_grid(into_windows(image, *window), (2, side, side))
    assert found == TokenGrid(2 * side * side // math.prod(window), *window)


def test_windows_of_a_padded_image_are_found() -> None:
    padded = smooth_image(40, 56)[None]
    assert find_grid(into_windows(padded, 8, 8), (1, 37, 50)) == TokenGrid(35, 8, 8)


@pytest.mark.parametrize(
    "shape", [(2, 7, 5), (2, 3, 16, 16, 5), (5, 16, 16, 4), (16, 4), (2, 2, 5), (3, 256, 4)], ids=str
)
def test_what_is_no_grid_is_left_alone(shape: tuple[int, ...]) -> None:
    assert find_grid(torch.randn(shape), (2, 16, 16)) is None


def test_a_grid_too_small_for_a_filter_is_none() -> None:
    assert find_grid(torch.randn(1, 10, 3), (1, 2, 5)) is None


# --- channels ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 12), seed=SEEDS)
def test_the_learned_basis_holds_the_most_variance(size: int, seed: int) -> None:
    rows = grid_tokens(1, 1, 60, 8, seed)[0, 0] * torch.logspace(0, 2, 8, dtype=torch.float64)
    covariance = rows.T @ rows / 60
    basis = learned_basis(covariance, size)
    kept = min(size, 8)
    assert basis.shape == (kept, 8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(kept, dtype=torch.float64))
    held = torch.trace(basis @ covariance @ basis.T)
    largest = np.linalg.svd(rows.numpy(), compute_uv=False)[:kept] ** 2 / 60
    assert float(held) == pytest.approx(float(largest.sum()))
    other = random_basis(8, size, seed % 1000)
    assert float(torch.trace(other @ covariance @ other.T)) <= float(held) * (1 + 1e-9)


def test_an_adaptive_subspace_is_the_smallest_that_holds_the_share() -> None:
    assert subspace_size(torch.tensor([97.0, 1.5, 1.0, 0.5]), "adaptive") == 3
    assert subspace_size(torch.tensor([99.0, 1.0, 0.0]), "adaptive") == 1
    assert subspace_size(torch.zeros(4), "adaptive") == 1
    assert subspace_size(torch.ones(200), "adaptive") == 198
    assert subspace_size(torch.ones(100), 64) == 64
    assert subspace_size(torch.ones(100), 128) == 100


@given(channels=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 1000))
def test_a_random_basis_is_orthonormal_and_repeatable(channels: int, size: int, seed: int) -> None:
    before = torch.random.get_rng_state()
    basis = random_basis(channels, size, seed)
    assert torch.equal(basis, random_basis(channels, size, seed))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(basis @ basis.T, torch.eye(min(size, channels), dtype=torch.float64))
    if channels > 1:
        assert not torch.allclose(basis, random_basis(channels, size, seed + 1))


def test_a_random_subspace_has_the_size_of_the_learned_one() -> None:
    covariance = torch.diag(torch.tensor([50.0, 30.0, 19.5, 0.5], dtype=torch.float64))
    assert channel_basis("learned", covariance, "adaptive").shape == (3, 4)
    assert channel_basis("random", covariance, "adaptive").shape == (3, 4)
    assert channel_basis("laplacian", covariance, "adaptive") is None


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_projection_passes_the_check(name: str) -> None:
    check_projection(name, "adaptive")


@pytest.mark.parametrize(("name", "subspace"), [("prewitt", 64), ("learned", 0), ("learned", "all"), ("learned", True)])
def test_anything_else_does_not(name: str, subspace: int) -> None:
    with pytest.raises(ConfigError):
        check_projection(name, subspace)
