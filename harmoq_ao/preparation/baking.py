"""Weights that a module computes from others before each call: computed once, as nothing learns them here."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def bake_weights(model: nn.Module) -> None:
    """Replace parametrized weights (weight and spectral normalisation, old and new) by their values, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _bake_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's, about functions that authors still use
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(module, hook.name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(module, hook.name)


def _bake_parametrizations(module: nn.Module) -> None:
    """By hand: ``remove_parametrizations`` takes the weight from the class, which the original still has."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also where it keeps results of computations (tensors that torch does not copy by itself)."""
    kept = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})
