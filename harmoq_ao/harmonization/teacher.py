"""The float network that harmonization compares a prepared model with."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.graph.folding import fold_variant
from harmoq_ao.graph.island import finish_graphs, is_island
from harmoq_ao.lowering.attention import fuse_attention
from harmoq_ao.sites.base import quiet
from harmoq_ao.sites.model import PreparedModel


class FloatNetwork(PreparedModel):
    """A prepared model without quantizers: it always computes the float function, and takes no gradients.

    Args:
        prepared: The model it stands beside; sites have the same paths.
        model: A copy of its ``model``.
    """

    def __init__(self, prepared: PreparedModel, model: nn.Module) -> None:
        super().__init__(model, prepared.config, prepared.traits)
        self.order = list(prepared.order)
        for site in self.sites():
            site.attach(None, None)
            site.joint_scale = site.joint_shift = None
        self.requires_grad_(False)

    def forward(self, image: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The float output for an image batch `[B, C, H, W]`."""
        with quiet():  # sites first met at another image size get quantizers, which have to stay off
            return super().forward(image, *args, **kwargs)


class Teacher:
    """The float network behind a prepared model, as a target to learn from.

    Make it before any weight changes, and pass it to everything that compares with the float network afterwards.

    Args:
        prepared: A prepared model with the original weights.

    Attributes:
        exact: A copy that computes the original model's output bit for bit, with the same sites.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.exact = FloatNetwork(prepared, copy.deepcopy(prepared.model))

    @cached_property
    def quick(self) -> FloatNetwork:
        """The same parameters in lighter graphs, made at the first use.

        What does not depend on the image is computed once, and attention in one call, as in converted models. So its
        attention products are no sites any more, and outputs differ from :attr:`exact` by the rounding of float32 sums.
        """
        shared = [*self.exact.parameters(), *self.exact.buffers()]
        quick = FloatNetwork(self.exact, copy.deepcopy(self.exact.model, {id(tensor): tensor for tensor in shared}))
        with quiet(), torch.no_grad():
            for module in quick.model.modules():
                if is_island(module):
                    finish_graphs(module, (fold_variant, fuse_attention))
        return quick
