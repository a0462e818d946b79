"""CondiQuant: weights of lower condition number first, then ranges as 2DQuant learns them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.baselines.base import Baseline, Budget
from harmoq_ao.baselines.learning import distil_bounds
from harmoq_ao.baselines.two_dquant import RATE
from harmoq_ao.calibration.calibrate import calibrate
from harmoq_ao.common.progress import track
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.harmonization.weights import set_weight
from harmoq_ao.sites.base import quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear

STRENGTH = 0.03
"""Weight of the singular values' spread beside the output's error, for inputs of mean square 1.

On DAT-light x2 it takes the mean condition number from 937 to 35. Six held-out photographs at W4A4, with DOBI's ranges,
then come 44.64 dB near the float network, of 44.61 without, 44.57 at 0.1 and 44.02 at 0.3.
"""
STEPS = 100
"""Proximal gradient steps of each weight."""
MAX_IMAGES = 32
"""Images that the inputs of the layers are taken from."""


class CondiQuant(Baseline):
    """Proximal gradient descent on the condition numbers of weights, then :class:`TwoDQuant`.

    Source: Liu, Wang, Li, Chen, Guo, Li, Kong, Zhang: "CondiQuant: Condition number based low-bit quantization for
    image super-resolution", arXiv 2502.15478. The error ``W dx`` that quantized activations leave in the output is,
    relative to ``W x``, at most the condition number of `W` times the relative error of `x`. So each float layer takes
    gradient steps that keep its output and, after each, a proximal step that draws its singular values together; inputs
    that are nearly of deficient rank leave room for it. Ranges are then found as 2DQuant does, with the whole budget.

    Different here: the authors' code is not published; the penalty (squared deviations of the singular values from
    their mean), its strength, the number of steps and their length (the inverse of the largest curvature, so that no
    step raises :func:`objective`) are ours. :class:`TwoDQuant` says what differs in
    the second part; its targets are the network before conditioning. Convolutions stay as they are.
    """

    name = "condiquant"
    title = "CondiQuant"
    observer = "mse"
    learns = True

    def apply(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Condition the weights, calibrate, distil all ranges; with no steps, calibrate."""
        teacher = Teacher(prepared)
        if budget.steps > 0 and len(crops):
            condition_weights(prepared, crops, show_progress=budget.show_progress)
        calibrate(prepared, crops, show_progress=budget.show_progress)
        distil_bounds(prepared, crops, budget, method=self.name, rate=RATE, teacher=teacher)


def condition_weights(prepared: PreparedModel, crops: Sequence[Tensor], *, show_progress: bool | None = None) -> None:
    """Condition, in place, the weight of every linear layer whose input is quantized.

    Args:
        prepared: With the weights of the float network.
        crops: Images `[C, S, S]`, at least one.
        show_progress: Show a progress bar; by default where standard error is a terminal.
    """
    sites = [s for s in prepared.sites() if isinstance(s, PreparedLinear) and s.act_quantizer is not None]
    moments = input_moments(prepared, sites, crops[:MAX_IMAGES])
    owners = {id(site.weight): site for site in sites}  # two sites may share a weight
    for key, site in track(list(owners.items()), "Conditioning weights", show=show_progress):
        weight = site.weight.detach()
        set_weight(site, conditioned(weight.double(), moments[key].to(weight.device)).to(weight.dtype))


@torch.no_grad()
def input_moments(
    prepared: PreparedModel, sites: Sequence[PreparedLinear], crops: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Second moments ``sum x x^T`` `[K, K]` in float64 of the inputs of linear layers, by identity of the weight."""
    moments = {id(site.weight): torch.zeros(site.in_features, site.in_features).double() for site in sites}

    def add(site: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(site, PreparedLinear)
        x = args[0].flatten(0, -2).double()
        moments[id(site.weight)] += (x.T @ x).cpu()

    like = next(p for p in prepared.parameters() if p.is_floating_point())
    with quiet(), ExitStack() as hooks:
        prepared(crops[0][None].to(like))  # traces graphs for this image size
        for site in sites:
            hooks.callback(site.register_forward_pre_hook(add).remove)
        for crop in crops:
            prepared(crop[None].to(like))
    return moments


def conditioned(weight: Tensor, moment: Tensor, strength: float = STRENGTH, steps: int = STEPS) -> Tensor:
    """Proximal gradient descent on :func:`objective`, from a weight `[m, K]` in float64.

    Args:
        weight: The weight whose outputs are kept.
        moment: Second moments `[K, K]` of the inputs, of any scale; where they are zero nothing changes.
        strength: Weight of the spread.
        steps: How many steps.
    """
    moment = normalised(moment)
    curvature = float(torch.linalg.eigvalsh(moment)[-1])
    found = weight
    for _ in range(steps if curvature > 0 else 0):
        found = proximal_step(found - (found - weight) @ moment / curvature, strength / curvature)
    return found


def objective(found: Tensor, weight: Tensor, moment: Tensor, strength: float) -> float:
    """``tr((V - W) C (V - W)^T) / 2 + strength / 2 * sum_i (sigma_i(V) - mean_j sigma_j(V))^2``, `C` normalised."""
    values = torch.linalg.svdvals(found)
    error = (((found - weight) @ normalised(moment)) * (found - weight)).sum()
    return 0.5 * float(error + strength * (values - values.mean()).square().sum())


def normalised(moment: Tensor) -> Tensor:
    """Second moments `[K, K]` divided by their mean over the channels."""
    return moment / moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)


def proximal_step(weight: Tensor, strength: float) -> Tensor:
    """``argmin_V ||V - W||^2 / 2 + strength / 2 * sum_i (sigma_i(V) - mean_j sigma_j(V))^2`` for `W` of `[m, K]`.

    Of all `V` with given singular values those with the singular vectors of `W` are nearest (von Neumann), and the
    singular values ``mean + (sigma - mean) / (1 + strength)`` are the minimiser: no order changes, none is negative.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    mean = values.mean()
    return left * (mean + (values - mean) / (1.0 + strength)) @ right


def condition_number(weight: Tensor) -> float:
    """``sigma_max / sigma_min`` of `[m, K]`; infinite for a rank that is deficient."""
    values = torch.linalg.svdvals(weight.detach().double())
    return float(values[0] / values[-1])
