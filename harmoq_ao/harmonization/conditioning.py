"""Condition numbers of weights: how much a layer can amplify the error of its input relative to the signal.

``kappa(W) = sigma_max / sigma_min``. Liu, Wang, Li, Chen, Guo, Li, Kong, Zhang: "CondiQuant: Condition number based
low-bit quantization for image super-resolution", 2025, lower it by a proximal step on the singular values after every
gradient step. Different here: the step is one on their logarithms, which has a closed form; it acts on the weight as
codes meet it (joint scale included), and between the steps of the refinement, not before quantization.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.prepared import PreparedLinear

_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding errors of a weight that has not full rank."""


def condition_number(weight: Tensor) -> float:
    """``sigma_max / sigma_min`` of `[m, K]`, without the singular values that are nothing but rounding."""
    values = torch.linalg.svdvals(weight.detach().double())
    kept = values[values > _NEGLIGIBLE * values[0]]
    return float(kept[0] / kept[-1]) if len(kept) else 1.0


def proximal_step(weight: Tensor, strength: float) -> Tensor:
    """Draw the singular values of `[m, K]` towards each other: ``kappa -> kappa ** (1 / (1 + strength))``.

    Their logarithms `l` go to ``argmin_v sum (v - l)^2 + strength * sum (v - mean(v))^2``, whose deviations from the
    mean are those of `l` divided by ``1 + strength``. The Frobenius norm is kept.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = values > _NEGLIGIBLE * values[0]
    logs = values[kept].log()
    if not len(logs):
        return weight
    drawn = values.clone()
    drawn[kept] = (logs.mean() + (logs - logs.mean()) / (1.0 + strength)).exp()
    drawn *= (values.square().sum() / drawn.square().sum()).sqrt()
    return (left * drawn @ right).to(weight)


@torch.no_grad()
def condition_weights(sites: Iterable[PreparedSite], strength: float) -> None:
    """One :func:`proximal_step` of every linear's weight, in place, with its joint scale multiplied in."""
    for site in sites:
        if isinstance(site, PreparedLinear):
            scale = 1.0 if site.joint_scale is None else site.joint_scale
            site.weight.copy_(proximal_step(site.weight * scale, strength) / scale)
