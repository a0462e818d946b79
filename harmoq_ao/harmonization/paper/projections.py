"""H, the operator that selects the structure in a residual: edge filters in space, or a subspace of channels.

A *spatial filter* acts on the grid of tokens, channel by channel, so it commutes with a linear layer. It is evaluated
where its whole support lies on the grid; nothing is padded. Each is scaled so that uncorrelated tokens keep their mean
square. A *channel projection* is a matrix `[k, K]` with orthonormal rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError

Projection = Literal["laplacian", "sobel", "dct", "learned", "random", "identity"]
Subspace = int | Literal["adaptive"]

PROJECTIONS: tuple[str, ...] = get_args(Projection)
"""Every name of H: three filters in space, two subspaces of channels, and the identity."""

ENERGY_SHARE = 0.99
"""Share of the variance that an adaptive subspace holds."""

DCT_SIDE = 8
"""Side of the blocks of the DCT filter, where the grid is large enough."""

_REDUCTIONS = (1, 2, 4, 8)
_PADDINGS = (1, 2, 4, 7, 8, 12, 14, 16, 24, 32, 64)
_SMALLEST_SIDE = 3


# --- the grid ---------------------------------------------------------------------------------------------------------


class TokenGrid(NamedTuple):
    """Spatial arrangement of an operand's tokens: a batch of grids (images or windows) of `height` x `width`."""

    batch: int
    height: int
    width: int


def find_grid(x: Tensor, image: tuple[int, int, int]) -> TokenGrid | None:
    """The grid of the tokens of `x`, or None if it cannot be determined.

    It knows `[B, H, W, K]`, `[B, H*W, K]`, `[B*H*W, K]` and windows `[n, h*w, K]`, where the grid is that of the
    image, of a reduction of it by 2, 4 or 8, or of one padded to whole windows. Where several shapes of window are
    possible, the one whose vertical neighbours differ least is taken.

    Args:
        x: Input of a linear layer, channels last.
        image: Batch size, height and width of the model's input.
    """
    batch = image[0]
    sides = list(dict.fromkeys(_grid_sides(image[1], image[2])))
    if x.dim() == 4:
        return TokenGrid(*x.shape[:3]) if x.shape[0] == batch and tuple(x.shape[1:3]) in sides else None
    if x.dim() not in (2, 3):
        return None
    whole = x.shape[0] == batch if x.dim() == 3 else True
    length = x.shape[1] if x.dim() == 3 else x.shape[0] // batch
    for height, width in sides:
        if whole and height * width == length and x[..., 0].numel() == batch * length:
            return _usable(TokenGrid(batch, height, width))
    return _window_grid(x, batch, sides) if x.dim() == 3 else None


def _grid_sides(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Sides a feature map may have, likeliest first."""
    for reduction in _REDUCTIONS:
        reduced = (math.ceil(height / reduction), math.ceil(width / reduction))
        for multiple in _PADDINGS:
            yield tuple(math.ceil(side / multiple) * multiple for side in reduced)  # type: ignore[misc]


def _window_grid(x: Tensor, batch: int, sides: list[tuple[int, int]]) -> TokenGrid | None:
    count, length, _ = x.shape
    shapes = {
        (h, length // h)
        for height, width in sides
        if count * length == batch * height * width
        for h in range(_SMALLEST_SIDE, length // _SMALLEST_SIDE + 1)
        if length % h == 0 and height % h == 0 and width % (length // h) == 0
    }
    if not shapes:
        return None
    window = min(sorted(shapes), key=lambda shape: _roughness(x, shape[1]))
    return TokenGrid(count, *window)


def _roughness(x: Tensor, lag: int) -> float:
    """Mean squared difference of tokens `lag` apart, over at most 64 windows."""
    some = x[:: max(1, len(x) // 64)]
    return float((some[:, lag:] - some[:, :-lag]).square().mean())


def _usable(grid: TokenGrid) -> TokenGrid | None:
    return grid if min(grid.height, grid.width) >= _SMALLEST_SIDE else None


# --- in space ---------------------------------------------------------------------------------------------------------


def laplacian(tokens: Tensor) -> Tensor:
    """3x3 Laplacian (four neighbours minus four times the middle, over ``sqrt(20)``).

    Args:
        tokens: `[N, H, W, K]`, H and W at least 3.

    Returns:
        `[N * (H - 2) * (W - 2), K]`.
    """
    middle = tokens[:, 1:-1, 1:-1]
    around = tokens[:, :-2, 1:-1] + tokens[:, 2:, 1:-1] + tokens[:, 1:-1, :-2] + tokens[:, 1:-1, 2:]
    return ((around - 4 * middle) / math.sqrt(20)).flatten(0, 2)


def sobel(tokens: Tensor) -> Tensor:
    """3x3 Sobel filters, horizontal and vertical, one after the other, over ``sqrt(12)``.

    Args:
        tokens: `[N, H, W, K]`, H and W at least 3.

    Returns:
        `[2 * N * (H - 2) * (W - 2), K]`.
    """
    smooth_rows = tokens[:, :-2] + 2 * tokens[:, 1:-1] + tokens[:, 2:]
    smooth_columns = tokens[:, :, :-2] + 2 * tokens[:, :, 1:-1] + tokens[:, :, 2:]
    horizontal = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
    vertical = smooth_columns[:, 2:] - smooth_columns[:, :-2]
    return torch.cat((horizontal, vertical)).flatten(0, 2) / math.sqrt(12)


def dct(tokens: Tensor) -> Tensor:
    """High-frequency coefficients of the orthonormal 2-D DCT of blocks of 8x8 (of 4x4 or 3x3 on smaller grids).

    Coefficient ``(u, v)`` of a block of side n counts as high where ``u + v >= n / 2``. Incomplete blocks at the right
    and the bottom are left out.

    Args:
        tokens: `[N, H, W, K]`, H and W at least 3.

    Returns:
        One row for each high coefficient of each block, `[rows, K]`.
    """
    count, height, width, channels = tokens.shape
    side = next(s for s in (DCT_SIDE, 4, _SMALLEST_SIDE) if s <= min(height, width))
    down, across = height // side, width // side
    whole = tokens[:, : down * side, : across * side]
    blocks = whole.reshape(count, down, side, across, side, channels).transpose(2, 3)
    basis = _dct_basis(side).to(tokens)
    coefficients = torch.einsum("ui,vj,nabijk->nabuvk", basis, basis, blocks)
    order = torch.arange(side, device=tokens.device)
    return coefficients[:, :, :, order[:, None] + order >= side / 2].flatten(0, -2)


def _dct_basis(side: int) -> Tensor:
    """Orthonormal DCT-II, one basis vector per row, float64 `[side, side]`."""
    index = torch.arange(side, dtype=torch.float64)
    basis = torch.cos(math.pi / side * (index + 0.5) * index[:, None]) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


SPATIAL_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"laplacian": laplacian, "sobel": sobel, "dct": dct}
"""Filters on a grid of tokens `[N, H, W, K]` by name; each returns rows `[rows, K]` and takes a constant to zero."""


def filtered(name: str, x: Tensor, grid: TokenGrid) -> Tensor:
    """A spatial filter on tokens that lie on `grid`: `x` `[..., K]` to rows `[rows, K]`.

    Raises:
        ConfigError: No such filter.
    """
    if name not in SPATIAL_FILTERS:
        raise ConfigError("Unknown spatial filter", found=repr(name), expected=", ".join(SPATIAL_FILTERS))
    return SPATIAL_FILTERS[name](x.reshape(*grid, x.shape[-1]))


# --- in channels ------------------------------------------------------------------------------------------------------


def learned_basis(covariance: Tensor, subspace: Subspace = "adaptive") -> Tensor:
    """The leading eigenvectors of a covariance, `[k, K]`, orthonormal rows.

    Args:
        covariance: `[K, K]`, symmetric and positive semidefinite.
        subspace: k, at most K counts; ``"adaptive"`` takes as many as hold :data:`ENERGY_SHARE` of the variance.
    """
    values, vectors = torch.linalg.eigh(covariance)
    size = subspace_size(values.flip(0), subspace)
    basis = vectors.flip(1)[:, :size].T
    largest = basis.abs().argmax(1, keepdim=True)
    return basis * basis.gather(1, largest).sign()  # the sign of an eigenvector is arbitrary: fix it


def random_basis(channels: int, subspace: int, seed: int = 0) -> Tensor:
    """Orthonormal rows that span a random subspace, `[min(k, K), K]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(channels, min(subspace, channels), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].T


def subspace_size(variances: Tensor, subspace: Subspace) -> int:
    """Number of dimensions k, from 1 to K.

    Args:
        variances: Variance along each direction, largest first, `[K]`.
        subspace: k itself, or ``"adaptive"``: the fewest that hold :data:`ENERGY_SHARE` of the total.
    """
    if subspace != "adaptive":
        return min(subspace, len(variances))
    held = variances.clamp_min(0).cumsum(0)
    return min(int((held < ENERGY_SHARE * held[-1]).sum()) + 1, len(variances))


def channel_basis(name: str, covariance: Tensor, subspace: Subspace, seed: int = 0) -> Tensor | None:
    """The channel projection of that name, `[k, K]` like `covariance`, or None where all channels are kept.

    A random subspace has the size that an adaptive learned one would have.

    Args:
        name: ``learned`` or ``random``; anything else keeps all channels.
        covariance: Of the channels, `[K, K]`.
        subspace: Size of the subspace.
        seed: Of the random one.
    """
    if name == "learned":
        return learned_basis(covariance, subspace)
    if name != "random":
        return None
    if subspace == "adaptive":
        subspace = subspace_size(torch.linalg.eigvalsh(covariance).flip(0), subspace)
    return random_basis(len(covariance), subspace, seed).to(covariance)


def check_projection(name: str, subspace: Subspace) -> None:
    """Raise ConfigError unless `name` is a known projection and `subspace` a size."""
    if name not in PROJECTIONS:
        raise ConfigError("Unknown projection", found=repr(name), expected=", ".join(PROJECTIONS))
    if subspace != "adaptive" and (type(subspace) is not int or subspace < 1):
        raise ConfigError("Bad size of a subspace", found=repr(subspace), expected="1 or more, or 'adaptive'")
