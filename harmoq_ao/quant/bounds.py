"""Search for the bounds of least squared quantization error, for a whole tensor or per output channel.

Both searches run on the same engine. Candidate bounds are shrunken versions of the extremes::

    lo = pivot - a * (pivot - min),  hi = pivot + b * (max - pivot)

with `a` and `b` on a geometric grid that is refined around the best pair; the pivot is the mean, or zero if symmetric.
The extremes themselves (``a = b = 1``) are among the candidates, so the result is never worse than min/max bounds.
The error is that of the actual quantizer, rounding included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, affine_form, snap_bounds, step_size

BINS = 4096
"""Bins of the histogram that stands for a tensor."""

CHUNK_VALUES = 1 << 20
"""Errors of at most about this many (row, candidate, value) triples are held at a time (4 MiB)."""


@dataclass(frozen=True)
class SearchGrid:
    """Resolution of the search.

    Args:
        smallest: Smallest share of the way from the pivot to an extreme.
        coarse: Shares on the first grid, per side.
        fine: Shares on each later grid, per side, odd: the best so far is the middle one.
        rounds: Number of later grids, each spanning one cell of the one before to either side.
    """

    smallest: float
    coarse: int
    fine: int
    rounds: int


TWO_SIDED = SearchGrid(smallest=1 / 64, coarse=18, fine=7, rounds=3)
ONE_SIDED = SearchGrid(smallest=1 / 64, coarse=72, fine=9, rounds=2)


def search_tensor_bounds(
    sample: Tensor,
    spec: QuantizerSpec,
    *,
    extremes: tuple[Tensor, Tensor] | None = None,
    bins: int = BINS,
) -> tuple[Tensor, Tensor]:
    """Bounds ``(lo, hi)``, 0-dimensional, of least mean squared error over `sample`.

    Args:
        sample: Values of any shape, finite.
        spec: Bits and scheme.
        extremes: Exact minimum and maximum to start the search from; those of the sample by default.
        bins: Bins of the histogram that stands for the sample, each represented by the mean of its values.

    Raises:
        CalibrationError: The sample is empty.
    """
    values = sample.detach().float().flatten()
    if values.numel() == 0:
        raise CalibrationError("Bounds were asked for an empty sample", remedy="run calibration data first")
    centres, counts = _condensed(values, bins)
    return search_histogram_bounds(centres, counts, spec, extremes=extremes or torch.aminmax(values))


def search_histogram_bounds(
    centres: Tensor,
    counts: Tensor,
    spec: QuantizerSpec,
    *,
    extremes: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Bounds ``(lo, hi)``, 0-dimensional, of least squared error over a histogram.

    Args:
        centres: One representative value per bin, `[bins]`.
        counts: Values per bin, `[bins]`.
        spec: Bits and scheme.
        extremes: Minimum and maximum to start the search from.
    """
    filled = counts > 0
    points, weights = centres[filled].float()[None], counts[filled].float()[None]
    lo, hi = (bound.to(points).reshape(1) for bound in extremes)
    lower, upper = _minimise(points, weights / weights.sum(), lo, hi, spec)
    return lower[0], upper[0]


def weight_bounds(
    rows: Tensor, spec: QuantizerSpec, importance: Tensor | None = None, *, minmax: bool = False
) -> tuple[Tensor, Tensor]:
    """Bounds `[m, 1]` of the rows of a weight: symmetric; where zero is a level, with zero at the middle code.

    Args:
        rows: Weight `[m, K]`.
        spec: Its quantizer.
        importance: Second moment of the inputs `[K]` or `[K, K]`, see `search_channel_bounds`.
        minmax: Take the largest magnitudes; at 8 bits the largest positive value may then lose half a step, since
            codes are -128 to 127.
    """
    if minmax:
        hi = rows.abs().amax(1, keepdim=True)
        lo = -hi
    else:
        lo, hi = search_channel_bounds(rows, replace(spec, scheme=Scheme.SYMMETRIC), importance)
    if spec.scheme is Scheme.INTEGER_ZERO_POINT:  # signed codes store weights
        step, middle = (hi - lo) / spec.qmax, spec.levels // 2
        lo, hi = -middle * step, (middle - 1) * step
    return lo, hi


def search_channel_bounds(
    weight: Tensor, spec: QuantizerSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bounds per row of a weight that minimise ``sum_j importance_j (Q(w_ij) - w_ij)**2``.

    With the second moments of the input channels as importance this is the expected squared output error of
    uncorrelated channels.

    Args:
        weight: `[m, d]`, finite; further axes are flattened into d.
        spec: Bits and scheme.
        importance: Non-negative, `[d]`; None for all ones.

    Returns:
        ``(lo, hi)``, each `[m, 1]`.
    """
    rows = weight.detach().float().flatten(1)
    weights = torch.ones_like(rows[:1]) if importance is None else importance.detach().to(rows).reshape(1, -1)
    lo, hi = rows.amin(1), rows.amax(1)
    candidates = ONE_SIDED.coarse if spec.scheme is Scheme.SYMMETRIC else TWO_SIDED.coarse**2
    height = max(1, CHUNK_VALUES // (candidates * rows.shape[1]))
    parts = [
        _minimise(r, weights, chunk_lo, chunk_hi, spec)
        for r, chunk_lo, chunk_hi in zip(rows.split(height), lo.split(height), hi.split(height), strict=True)
    ]
    return torch.cat([p[0] for p in parts])[:, None], torch.cat([p[1] for p in parts])[:, None]


def quantization_error(points: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, spec: QuantizerSpec) -> Tensor:
    """Weighted squared error of each row of points under each candidate.

    Args:
        points: `[n, p]`.
        weights: `[n, p]` or `[1, p]`.
        lo: Candidates' lower bounds, `[n, c]`, on the scheme of `spec`.
        hi: Upper bounds, `[n, c]`.

    Returns:
        `[n, c]`.
    """
    lo, hi = lo[..., None], hi[..., None]
    factor, offset = affine_form(lo, hi, spec.bits)
    error = (points[:, None, :] * factor).add_(offset).round_().clamp_(0, spec.qmax)
    error.mul_(step_size(lo, hi, spec.bits)).add_(lo).sub_(points[:, None, :]).square_()
    return (error @ weights.to(error)[..., None])[..., 0]


def _condensed(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Histogram between the extremes: mean of the values in each bin `[bins]`, and counts `[bins]`, float64."""
    if values.numel() <= bins:
        return values, torch.ones_like(values)
    lo, hi = torch.aminmax(values)
    index = ((values - lo) * (bins / (hi - lo).clamp_min(1e-30))).long().clamp_(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).double()
    sums = torch.bincount(index, weights=values.double(), minlength=bins)
    return (sums / counts.clamp_min(1)).float(), counts


def _minimise(points: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """Best bounds per row: `points` `[n, p]`, `weights` `[n | 1, p]`, extremes `[n]`; returns `[n]`, `[n]`.

    A float lower bound is also searched among those with an integer zero point: where many values are exactly zero
    (masks, ReLU), the error is least when zero is a level, in a valley too narrow for a grid to meet by chance.
    """
    best = _search(points, weights, lo, hi, spec)
    if spec.scheme is Scheme.ASYMMETRIC:
        with_zero = _search(points, weights, lo, hi, replace(spec, scheme=Scheme.INTEGER_ZERO_POINT))
        best = torch.where(with_zero[2] < best[2], with_zero, best)
    return best[0], best[1]


def _search(points: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, spec: QuantizerSpec) -> Tensor:
    """Lower bounds, upper bounds and errors of the best candidates on the scheme of `spec`, `[3, n]`."""
    if spec.scheme is Scheme.SYMMETRIC:
        grid, pivot = ONE_SIDED, torch.zeros_like(hi)
        hi = torch.maximum(lo.abs(), hi.abs())
        lo = -hi
    else:
        grid, pivot = TWO_SIDED, (points * weights).sum(1) / weights.sum(1).clamp_min(1e-30)
        pivot = torch.minimum(torch.maximum(pivot, lo), hi)
    ratio = grid.smallest ** (1 / (grid.coarse - 1))
    shares = ratio ** torch.arange(grid.coarse, dtype=torch.float32, device=points.device)
    best = _Best(torch.ones_like(lo), torch.ones_like(hi), torch.full_like(lo, torch.inf))
    for _ in range(grid.rounds + 1):
        _try_shares(best, shares, points, weights, (lo, hi, pivot), spec)
        half = grid.fine // 2
        ratio = ratio ** (1 / half)
        shares = ratio ** torch.arange(-half, half + 1, dtype=torch.float32, device=points.device)
    lower, upper = _candidates(best.lower[:, None], best.upper[:, None], (lo, hi, pivot), spec)
    return torch.stack((lower[:, 0], upper[:, 0], best.error))


@dataclass
class _Best:
    """Per row: shares of the best bounds so far, and their error, each `[n]`."""

    lower: Tensor
    upper: Tensor
    error: Tensor


def _try_shares(
    best: _Best,
    shares: Tensor,
    points: Tensor,
    weights: Tensor,
    frame: tuple[Tensor, Tensor, Tensor],
    spec: QuantizerSpec,
) -> None:
    """Evaluate `shares` times the best shares: both sides at once if symmetric, else every pair. Keep the best."""
    upper = (best.upper[:, None] * shares).clamp_max(1.0)
    lower = upper
    if spec.scheme is not Scheme.SYMMETRIC:
        lower = (best.lower[:, None] * shares).clamp_max(1.0)
        sides = len(shares)
        lower, upper = lower.repeat_interleave(sides, 1), upper.repeat(1, sides)
    lo, hi = _candidates(lower, upper, frame, spec)
    width = max(1, CHUNK_VALUES // points.numel())
    error = torch.cat(
        [
            quantization_error(points, weights, a, b, spec)
            for a, b in zip(lo.split(width, 1), hi.split(width, 1), strict=True)
        ],
        dim=1,
    )
    least, index = error.min(1, keepdim=True)
    better = least[:, 0] < best.error
    best.lower = torch.where(better, lower.gather(1, index)[:, 0], best.lower)
    best.upper = torch.where(better, upper.gather(1, index)[:, 0], best.upper)
    best.error = torch.where(better, least[:, 0], best.error)


def _candidates(
    lower: Tensor, upper: Tensor, frame: tuple[Tensor, Tensor, Tensor], spec: QuantizerSpec
) -> tuple[Tensor, Tensor]:
    """Bounds `[n, c]` for shares `[n, c]`, on the scheme of `spec`. A share of one gives the extreme exactly."""
    lo, hi, pivot = (bound[:, None] for bound in frame)
    low = torch.where(lower < 1.0, pivot - lower * (pivot - lo), lo)
    high = torch.where(upper < 1.0, pivot + upper * (hi - pivot), hi)
    return snap_bounds(low, high, spec)
