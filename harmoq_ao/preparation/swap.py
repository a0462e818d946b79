"""Modules exchanged for their sites: linear layers and convolutions, wherever they are registered."""

from __future__ import annotations

from torch import nn

from harmoq_ao.graph import Discovery
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear
from harmoq_ao.sites.site import CONSTANT, FloatCause, FloatReason, FloatSite, Site


def swap_modules(prepared: PreparedModel, found: Discovery, fixed: set[str]) -> None:
    """Exchange linear layers and convolutions for their sites; list those that stay float.

    Args:
        prepared: Changed in place.
        found: Modules that the example images called.
        fixed: Linear layers whose input does not depend on the image.
    """
    swaps: dict[nn.Module, nn.Module] = {}
    for name in found.calls:
        module = prepared.model.get_submodule(name)
        site = module_site(prepared, name, module, name in fixed, found.macs.get(name, 0))
        if site is not None:
            swaps[module] = site
    replace_modules(prepared.model, swaps)


def module_site(prepared: PreparedModel, name: str, module: nn.Module, fixed: bool, macs: int) -> PreparedSite | None:
    """The site of a linear layer or a convolution; None, and perhaps a line in the report, where it stays float.

    Args:
        prepared: Its configuration decides, its report is added to.
        name: Of the module.
        module: Any module.
        fixed: Its input does not depend on the image.
        macs: Its multiply-accumulates on the example image.
    """
    if type(module) is nn.Linear:
        return _linear_site(prepared, name, module, fixed)
    return _conv_site(prepared, name, module, macs) if isinstance(module, nn.Conv2d) else None


def _linear_site(prepared: PreparedModel, name: str, linear: nn.Linear, fixed: bool) -> PreparedLinear | None:
    """The site of a linear layer; None, and a line in the report, where its input does not depend on the image."""
    if fixed:
        prepared.floats.append(FloatSite(name, "linear", CONSTANT))
        return None
    return PreparedLinear(Site(name, name, "linear", tuple(linear.weight.shape)), linear.weight, linear.bias)


def _conv_site(prepared: PreparedModel, name: str, conv: nn.Conv2d, macs: int) -> PreparedConv2d | None:
    """The site of a convolution; None, and a line in the report, where it stays float."""
    by_settings = prepared.config.settings(name, "conv2d").reason
    reason = None if by_settings is None else FloatReason(FloatCause.SETTINGS, by_settings)
    if reason is None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        text = f"padding {conv.padding_mode!r} / {conv.padding!r} has no integer form"
        reason = FloatReason(FloatCause.UNSUPPORTED, text)
    if reason is not None:
        prepared.floats.append(FloatSite(name, "conv2d", reason, macs))
        return None
    return PreparedConv2d(Site(name, name, "conv2d", tuple(conv.weight.shape)), conv)


def replace_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones are registered (modules may be shared).

    Args:
        model: Changed in place.
        swaps: New modules by old ones.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]
