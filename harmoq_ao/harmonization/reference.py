"""The float network that harmonization compares with, and changing a weight without losing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.graph.folding import fold_variant
from harmoq_ao.graph.island import finish_graphs, is_island
from harmoq_ao.lowering.attention import fuse_attention
from harmoq_ao.sites.base import quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear

_KEY = "_float_reference"


class FloatReference(PreparedModel):
    """A prepared model that always computes the float function of the model it was copied from."""

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The float output for an image batch `[B, C, H, W]`, bit for bit that of the original model."""
        with quiet():
            return super().forward(image, *args, **kwargs)


def float_reference(prepared: PreparedModel) -> PreparedModel:
    """The float network behind `prepared`: a frozen copy with the original weights, sites under the same paths.

    It is copied at the first call and kept, so whatever changes weights calls it first.
    """
    known: PreparedModel | None = prepared.__dict__.get(_KEY)
    if known is None:
        known = copy.deepcopy(prepared)
        known.__class__ = FloatReference
        for site in known.sites():
            site.attach(None, None)
            site.joint_scale = site.joint_shift = None
        known.requires_grad_(False)
        prepared.__dict__[_KEY] = known  # not as a submodule: it is no part of the model
    return known


def teacher(prepared: PreparedModel) -> PreparedModel:
    """The float network in less time, for learning from: with :func:`float_reference`'s parameters, but other graphs.

    What does not depend on the image is computed once, and attention in one call, as in converted models; so its
    attention products are no sites any more, and outputs differ by the rounding of float32 sums.
    """
    reference = float_reference(prepared)
    shared = [*reference.parameters(), *reference.buffers()]
    quick = copy.deepcopy(reference, {id(tensor): tensor for tensor in shared})
    with quiet(), torch.no_grad():
        for module in quick.model.modules():
            if is_island(module):
                finish_graphs(module, (fold_variant, fuse_attention))
    return quick


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter of `model` asks for gradients but those that are told to; afterwards all is as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def owns_bias(site: PreparedLinear) -> bool:
    """Whether the site has a bias of its own, which can be corrected.

    None is added where the author's layer has none: a saved model is rebuilt from its architecture.
    """
    return site.bias is not None


def set_weight(site: PreparedLinear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace weight `[m, K]` and, if given, bias `[m]` in place: optimizers and tied modules follow.

    Raises:
        ConfigError: The shapes do not fit, or a bias is given where it cannot be stored.
    """
    if weight.shape != site.weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
        raise ConfigError(
            f"The new weight of {site.site.name} has the wrong shape",
            found=(tuple(weight.shape), None if bias is None else tuple(bias.shape)),
            expected=(tuple(site.weight.shape), tuple(site.weight.shape[:1])),
        )
    if bias is not None and not owns_bias(site):
        raise ConfigError(f"{site.site.name} has no bias of its own that could be changed")
    with torch.no_grad():
        site.weight.copy_(weight)
        if bias is not None:
            site.bias.copy_(bias)
