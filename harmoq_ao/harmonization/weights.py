"""Changing the weights of a prepared model: in place, and which of them take gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.sites.prepared import PreparedLinear


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager that turns gradients off for all parameters of `model` and restores their flags on exit.

    Single parameters may be turned on inside it.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def owns_bias(site: PreparedLinear) -> bool:
    """Whether the site has a bias of its own, which can be corrected.

    A layer without one is not given one: a saved model is rebuilt from its architecture.
    """
    return site.bias is not None


def set_weight(site: PreparedLinear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace weight `[m, K]` and, if given, bias `[m]` in place: optimizers and tied modules follow.

    Raises:
        ConfigError: The shapes do not fit, or a bias is given to a site without one.
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
