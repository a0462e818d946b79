"""Structural residual calibration (SRC): a change of the weight that compensates for the error of its input.

A linear layer ``y = W x`` receives ``z`` in place of ``x``; with ``d = z - x`` its output is off by ``W d``.
Equation (5) of HarmoQ, ``dW = -W E[d x^T] H^T (H E[x x^T] H^T + l I)^-1``, does not have the shape of W as printed.
It has two readings, both implemented here:

* H filters in space and commutes with W: ``min E||H(W d + dW z)||^2 + l ||dW||^2`` is a ridge regression on filtered
  features, ``dW = -W E[(Hd)(Hz)^T] (E[(Hz)(Hz)^T] + l I)^-1`` (:meth:`ResidualStatistics.solve` with a spatial filter);
* H projects the channels and ``dW = A H``: ``min E||W d + A H z||^2 + l ||A||^2`` gives
  ``A = -W E[d z^T] H^T (H E[z z^T] H^T + l I)^-1``, equation (5) with H put back on the right.

The regressor is what the layer will see, the quantized input ``z``, about its mean; the bias absorbs the means.
:meth:`SRCSettings.printed` gives the paper's form: on the float input ``x``, about zero, bias untouched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.paper.moments import MOMENTUM, WARM_UP, PairedMoments
from harmoq_ao.harmonization.paper.projections import (
    SPATIAL_FILTERS,
    Projection,
    Subspace,
    TokenGrid,
    channel_basis,
    check_projection,
    filtered,
)

STABILISER = 1e-6
"""Added to the diagonal before the Cholesky decomposition, relative to its mean."""

_LARGEST_STABILISER = 1e-1


@dataclass(frozen=True)
class SRCSettings:
    """Settings of structural residual calibration.

    Args:
        projection: H: ``laplacian``, ``sobel`` or ``dct`` in space, ``learned`` or ``random`` in channels, or
            ``identity``.
        edge_weight: Weight mu of a spatial filter F beside the plain residual: H stacks I on mu F, so that the error is
            ``|e|^2 + mu^2 |F e|^2``. Infinity leaves F alone, as in the paper.
        ridge: l, relative to the mean of the diagonal of the second moments it is added to.
        subspace: Size k of a channel projection; ``adaptive`` takes what holds 99 % of the variance.
        on_float: Regress on the float input x instead of the quantized input z.
        centred: Regress about the means and correct the bias; about zero otherwise.
        momentum: Of the running moments.
        warm_up: Samples that are averaged plainly.
        seed: Of a random projection.

    Raises:
        ConfigError: A value is outside its set.
    """

    projection: Projection = "laplacian"
    edge_weight: float = 1.0
    ridge: float = 1e-2
    subspace: Subspace = "adaptive"
    on_float: bool = False
    centred: bool = True
    momentum: float = MOMENTUM
    warm_up: int = WARM_UP
    seed: int = 0

    def __post_init__(self) -> None:
        check_projection(self.projection, self.subspace)
        if not self.edge_weight > 0:
            raise ConfigError("The weight of edges is out of range", found=self.edge_weight, expected="above 0")
        if not 0 <= self.ridge < math.inf:
            raise ConfigError("The ridge is out of range", found=self.ridge, expected="0 or more")
        PairedMoments(self.momentum, self.warm_up)

    @classmethod
    def printed(cls, projection: Projection = "laplacian", ridge: float = 1e-2) -> SRCSettings:
        """The regression as the paper prints it: on the float input, filter alone, about zero, no bias."""
        return cls(projection, math.inf, ridge, on_float=True, centred=False)


class Calibration(NamedTuple):
    """Result of SRC.

    Attributes:
        delta: Change of the weight, `[m, K]`.
        bias_shift: Change of the bias that keeps the mean of the output, `[m]`; zeros if not centred.
    """

    delta: Tensor
    bias_shift: Tensor


class ResidualStatistics:
    """The moments SRC needs of one layer's quantized input z and its deviation d from the float input.

    Args:
        settings: How the residual is calibrated.

    Attributes:
        filtered: Whether a spatial filter was applied; False where the grid of the tokens was not known.
    """

    def __init__(self, settings: SRCSettings) -> None:
        self.settings = settings
        self.filtered = False
        self._plain = PairedMoments(settings.momentum, settings.warm_up)
        self._edges = PairedMoments(settings.momentum, settings.warm_up)

    def update(self, z: Tensor, x: Tensor, grid: TokenGrid | None = None) -> None:
        """Add one sample.

        Args:
            z: What the layer is given, `[..., K]`, quantized, any joint scale multiplied back.
            x: What the float layer is given, same shape.
            grid: Where the tokens lie; without it a spatial filter is left out.

        Raises:
            InputError: The rows do not pair up.
        """
        d = z - x
        regressor = x if self.settings.on_float else z
        self._plain.update(regressor, d)
        name = self.settings.projection
        if name in SPATIAL_FILTERS and grid is not None:
            self.filtered = True
            self._edges.update(filtered(name, regressor, grid), filtered(name, d, grid))

    def solve(self, weight: Tensor) -> Calibration:
        """The calibration of a layer with this float weight `[m, K]`.

        Raises:
            CalibrationError: No data, or data that is not finite.
        """
        gram, cross = self._moments()
        W = weight.detach().to(gram)
        H = channel_basis(self.settings.projection, gram, self.settings.subspace, self.settings.seed)
        if H is None:
            delta = -ridge_regression(W @ cross, gram, self.settings.ridge)
        else:
            delta = -ridge_regression(W @ cross @ H.T, H @ gram @ H.T, self.settings.ridge) @ H
        shift = torch.zeros_like(W[:, 0])
        if self.settings.centred:
            shift = -(W @ self._plain.mean_d + delta @ self._plain.mean_z)
        return Calibration(delta.to(weight), shift.to(weight))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """``E[(Hz)(Hz)^T]`` and ``E[(Hd)(Hz)^T]``, both `[K, K]`. Filters take constants to zero: no centring there."""
        plain = self._plain.zz(centred=self.settings.centred), self._plain.dz(centred=self.settings.centred)
        if not self.filtered:
            return plain
        edges = self._edges.zz(centred=False), self._edges.dz(centred=False)
        if math.isinf(self.settings.edge_weight):
            return edges
        weight = self.settings.edge_weight**2
        return plain[0] + weight * edges[0], plain[1] + weight * edges[1]


def ridge_regression(cross: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """``cross (gram + l I)^-1`` by Cholesky, ``l = ridge * mean(diag(gram))``.

    A small multiple of the same mean stabilises the decomposition; where it fails, ten times as much is tried.

    Args:
        cross: `[m, k]`.
        gram: `[k, k]`, symmetric and positive semidefinite.
        ridge: Not negative.

    Returns:
        `[m, k]`; zeros where `gram` is zero.

    Raises:
        CalibrationError: The moments are not finite.
    """
    unit = gram.diagonal().mean()
    if not bool(torch.isfinite(unit) & torch.isfinite(cross).all()):
        raise CalibrationError(
            "The moments of a residual are not finite", remedy="check the images for NaN or infinity"
        )
    if float(unit) <= 0.0:
        return torch.zeros_like(cross)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    stabiliser = STABILISER
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + (ridge + stabiliser) * unit * eye)
        if not bool(failed):
            return torch.cholesky_solve(cross.T, factor).T
        if stabiliser >= _LARGEST_STABILISER:
            raise CalibrationError("The second moments of a layer's input are not positive semidefinite")
        stabiliser *= 10
