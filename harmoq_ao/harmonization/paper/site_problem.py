"""The optimization problem of one site: its operands on a sample, and the moves that Algorithm 1 may make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harmoq_ao.harmonization.paper.contraction import Contraction, Operand
from harmoq_ao.harmonization.paper.projections import SPATIAL_FILTERS, Projection, TokenGrid, find_grid
from harmoq_ao.harmonization.paper.src import ResidualStatistics, SRCSettings
from harmoq_ao.harmonization.weights import owns_bias, set_weight
from harmoq_ao.quant.bounds import search_tensor_bounds, weight_bounds
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.joint_scale import power_scale
from harmoq_ao.quant.quantizer import Granularity, snap_bounds
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.prepared import PreparedLinear, PreparedMatmul

_VALUES_PER_ROW = 1024
"""A sample of a product of activations holds at most this many numbers per row asked for, on each side."""


class SiteProblem(ABC):
    """One site with its inputs and its target.

    A state of the site is a :class:`Contraction`; the methods propose others and leave the
    site itself alone until :meth:`commit`.

    Attributes:
        site: The prepared site.
        initial: The site as it is.
        can_scale: Whether a joint scale is defined: both operands quantized, contracted length fixed.
        can_calibrate: Whether there is a weight that SRC may change.
        corrects_bias: Whether the mean error can be taken up by a bias that belongs to this site alone.
    """

    can_calibrate = False
    corrects_bias = False

    def __init__(self, site: PreparedSite, initial: Contraction, can_scale: bool) -> None:
        self.site = site
        self.initial = initial
        self.can_scale = can_scale and all(
            q is not None and q.active for q in (site.act_quantizer, site.weight_quantizer)
        )

    @property
    def signal(self) -> float:
        """Mean square of the target about the mean of each column."""
        target = self.initial.target
        return float((target - target.mean((0, 1))).square().mean(dtype=torch.float64))

    def rescaled(self, state: Contraction, exponent: float | None) -> Contraction:
        """Another joint scale, ``Rx^a / Rw^(1 - a)`` per channel, with ranges searched anew for it.

        Args:
            state: The start; ranges are clipped to its bounds.
            exponent: a; 0.5 is equation (6). None keeps the scale and only searches the ranges.
        """
        scale = state.left.scale
        if exponent is not None:
            scale = power_scale(*self._ranges(state), exponent)
        inverse = None if scale is None else (1.0 / scale)[:, None]
        left = replace(state.left, scale=scale)
        left = self._with_bounds(left, None)
        right = self._with_bounds(replace(state.right, scale=inverse), left.scaled())
        return replace(state, left=left, right=right)

    def usable_projection(self, projection: Projection) -> Projection:
        """The projection that SRC can apply here: without a grid of tokens a spatial filter becomes the identity."""
        return projection

    def calibrated(self, state: Contraction, settings: SRCSettings) -> Contraction:
        """SRC of the weight for the input as `state` quantizes it; a product of activations stays as it is."""
        return state

    @abstractmethod
    def _ranges(self, state: Contraction) -> tuple[Tensor, Tensor]:
        """Clipped range of every channel of the left and of the right operand, `[K]` each, unscaled."""

    @abstractmethod
    def commit(self, state: Contraction) -> None:
        """Write `state` into the site."""

    def _with_bounds(self, operand: Operand, partner: Tensor | None) -> Operand:
        """Ranges of least error; those of a weight's rows weigh channels by the partner's mean squares."""
        if operand.bounds is None or operand.spec is None:
            return operand
        if operand.spec.granularity is Granularity.PER_CHANNEL:
            importance = None if partner is None else partner.square().mean((0, 1))
            lo, hi = snap_bounds(*weight_bounds(operand.scaled()[0].T, operand.spec, importance), operand.spec)
            return replace(operand, bounds=(lo.T, hi.T))
        return replace(operand, bounds=search_tensor_bounds(operand.scaled(), operand.spec))

    def _commit_bounds(self, state: Contraction) -> None:
        for quantizer, operand in ((self.site.act_quantizer, state.left), (self.site.weight_quantizer, state.right)):
            if quantizer is not None and operand.bounds is not None:
                weight = quantizer.spec.granularity is Granularity.PER_CHANNEL
                quantizer.set_bounds(*(b.T if weight else b for b in operand.bounds))
        self.site.set_joint_scale(state.left.scale)


class LinearProblem(SiteProblem):
    """A linear layer: rows of its input times the transposed weight.

    Args:
        site: The site.
        given: Its input in the quantized network, `[..., K]`.
        wanted: Its input in the float network, same shape.
        reference: The site in the float network.
        image: Batch size, height and width of the model's input.
        rows: Rows in the sample.
        seed: Of the sample.
        inherited: Share of the deviation already in the input that the output is to make up for. The mean of the
            output is always to be that of the float network.
        own_parameters: Whether no other site shares weight or bias, so that they may be changed.
    """

    def __init__(
        self,
        site: PreparedLinear,
        given: Tensor,
        wanted: Tensor,
        reference: PreparedLinear,
        image: tuple[int, int, int],
        *,
        rows: int,
        seed: int,
        inherited: float = 1.0,
        own_parameters: bool = True,
    ) -> None:
        self.given, wanted = given.flatten(0, -2), wanted.flatten(0, -2)
        self.wanted = self.given.lerp(wanted, inherited)
        self.grid: TokenGrid | None = find_grid(given, image)
        self.can_calibrate = own_parameters
        self.corrects_bias = own_parameters and owns_bias(site)
        self._linear, self._reference = site, reference
        chosen = sample_indices(len(self.given), rows, seed).to(given.device)
        self._wanted_output = self.wanted[chosen] @ reference.weight.T
        self._wanted_output += reference.weight @ (wanted - self.wanted).mean(0)
        if site.bias is not None and reference.bias is not None:
            self._wanted_output += reference.bias - site.bias
        scale, shift = (None if v is None else v.detach() for v in (site.joint_scale, site.joint_shift))
        left = replace(_operand(site.act_quantizer, self.given[chosen][None], scale), shift=shift)
        inverse = None if scale is None else (1.0 / scale)[:, None]
        right = _operand(site.weight_quantizer, site.weight.detach().T[None], inverse, transposed=True)
        super().__init__(site, Contraction(left, right, self._target(site.weight, shift)), can_scale=True)

    def usable_projection(self, projection: Projection) -> Projection:
        return "identity" if projection in SPATIAL_FILTERS and self.grid is None else projection

    def calibrated(self, state: Contraction, settings: SRCSettings) -> Contraction:
        statistics = ResidualStatistics(settings)
        whole = replace(state.left, values=self.given)
        statistics.update(whole.unscaled(whole.rounded()), self.wanted, self.grid)
        weight = self._reference.weight + statistics.solve(self._reference.weight).delta
        right = self._with_bounds(replace(state.right, values=weight.T[None]), state.left.scaled())
        return replace(state, right=right, target=self._target(weight, state.left.shift))

    def commit(self, state: Contraction) -> None:
        """Set ranges, joint scale, weight, and the bias where the mean is free."""
        self._commit_bounds(state)
        bias = None
        if state.free_mean:
            error = (state.left.rounded() @ state.right.rounded() - state.target)[0].double().mean(0)
            bias = (self._linear.bias.detach() - error).to(self._linear.bias)
        if bias is not None or state.right.values is not self.initial.right.values:
            set_weight(self._linear, state.right.values[0].T, bias)

    def _target(self, weight: Tensor, shift: Tensor | None) -> Tensor:
        """Target of the product, `[1, R, m]`: the layer adds its bias and gives back the joint shift."""
        constant = 0.0 if shift is None else weight.detach() @ shift
        return (self._wanted_output - constant)[None]

    def _ranges(self, state: Contraction) -> tuple[Tensor, Tensor]:
        extremes = replace(state.left, values=torch.stack((self.given.amin(0), self.given.amax(0)))[None])
        return _width(_clipped(extremes), -2), _width(_clipped(state.right), -1)


class MatmulProblem(SiteProblem):
    """A product of two activations, on a sample of its groups, rows and columns.

    Args:
        site: The site.
        given: Sampled operands in the quantized network, `[G, M, K]` and `[G, K, N]`.
        wanted: The same of the float network.
        inherited: Share of the deviation already in the operands that the output is to make up for.
    """

    def __init__(
        self,
        site: PreparedMatmul,
        given: tuple[Tensor, Tensor],
        wanted: tuple[Tensor, Tensor],
        *,
        inherited: float = 1.0,
    ) -> None:
        scale = None if site.joint_scale is None else site.joint_scale.detach()
        left = _operand(site.act_quantizer, given[0], scale)
        right = _operand(site.weight_quantizer, given[1], None if scale is None else (1.0 / scale)[:, None])
        fixed = site.site.role == "query-key" and site.site.shape[0] > 0
        target = (given[0] @ given[1]).lerp(wanted[0] @ wanted[1], inherited)
        super().__init__(site, Contraction(left, right, target), can_scale=fixed)

    def commit(self, state: Contraction) -> None:
        """Set ranges and joint scale."""
        self._commit_bounds(state)

    def _ranges(self, state: Contraction) -> tuple[Tensor, Tensor]:
        left, right = _clipped(state.left), _clipped(state.right)
        return _width(left.flatten(0, 1), -2), _width(right.transpose(0, 1).flatten(1), -1)


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatmulSample:
    """A sample of groups, rows and columns of a product ``[..., M, K] x [..., K, N]``.

    Args:
        batch: Common batch shape of the operands.
        groups: Flat indices into it.
        rows: Indices into M.
        columns: Indices into N.
    """

    batch: tuple[int, ...]
    groups: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def plan(cls, left: Tensor, right: Tensor, rows: int, seed: int) -> MatmulSample:
        """A seeded sample of about `rows` rows, from several groups, of bounded size."""
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        count, (height, inner), width = batch.numel(), left.shape[-2:], right.shape[-1]
        groups = min(count, max(4, rows // height))
        room = max(1, rows * _VALUES_PER_ROW // groups)
        some_rows = min(height, max(1, rows // groups), max(1, room // inner))
        some_columns = min(width, max(1, room // max(inner, some_rows)))
        return cls(
            tuple(batch),
            sample_indices(count, groups, seed),
            sample_indices(height, some_rows, seed + 1),
            sample_indices(width, some_columns, seed + 2),
        )

    def take(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The sample of both operands, `[G, M, K]` and `[G, K, N]`, copied."""
        device = left.device
        some_left = self._groups(left).index_select(-2, self.rows.to(device))
        return some_left, self._groups(right).index_select(-1, self.columns.to(device))

    def _groups(self, operand: Tensor) -> Tensor:
        whole = operand.detach().expand(*self.batch, *operand.shape[-2:])
        if not self.batch:
            return whole[None]
        return whole[torch.unravel_index(self.groups.to(operand.device), self.batch)]


def sample_indices(length: int, count: int, seed: int) -> Tensor:
    """At most `count` of ``0 .. length - 1``, drawn without replacement, in order."""
    if count >= length:
        return torch.arange(length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].sort().values


# --- operands ---------------------------------------------------------------------------------------------------------


def _operand(
    quantizer: HarmoqFakeQuantize | None, values: Tensor, scale: Tensor | None, *, transposed: bool = False
) -> Operand:
    if quantizer is None or not quantizer.active:
        return Operand(values, scale=scale)
    if quantizer.spec.dynamic:
        return Operand(values, quantizer.spec, scale=scale)
    lo, hi = (bound.detach().T.clone() if transposed else bound.detach().clone() for bound in quantizer.bounds())
    return Operand(values, quantizer.spec, (lo, hi), scale)


def _clipped(operand: Operand) -> Tensor:
    """Values clipped to the quantizer's range, unscaled."""
    if operand.bounds is None:
        return operand.values
    clipped = torch.minimum(torch.maximum(operand.scaled(), operand.bounds[0]), operand.bounds[1])
    return operand.unscaled(clipped)


def _width(values: Tensor, axis: int) -> Tensor:
    return (values.amax(axis) - values.amin(axis)).reshape(-1)
