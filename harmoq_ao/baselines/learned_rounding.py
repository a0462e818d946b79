"""AdaRound: every entry of a weight learns whether it is rounded down or up.

The grid is that of the weight's quantizer, ``lower + code * step`` per row with a fixed quantization range, so the
quantizer reproduces the rounded weight. With a joint scale `s`, round ``W * s`` and divide the result by `s`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STRETCH = (-0.1, 1.1)  # gamma and zeta of AdaRound: the rectified sigmoid reaches 0 and 1 at finite logits


class LearnedRounding(nn.Module):
    """A weight whose every entry learns whether to be rounded down or up.

    AdaRound (Nagel, Amjad, van Baalen, Louizos, Blankevoort: "Up or down? Adaptive rounding for post-training
    quantization", ICML 2020)::

        W~ = lower + step * clamp(floor((W - lower) / step) + h(V), 0, 2**bits - 1)
        h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

    It starts at the weight itself: `h` is the fractional part.

    Args:
        weight: Any shape.
        lower: Value of code 0, broadcastable to `weight`.
        step: Distance of levels, broadcastable to `weight`.
        bits: 2 to 8.

    Attributes:
        logits: `V`, the shape of `weight`: what is learned.
    """

    def __init__(self, weight: Tensor, lower: Tensor, step: Tensor, bits: int) -> None:
        super().__init__()
        self.qmax = 2**bits - 1
        position = (weight.detach().float() - lower.detach()) / step.detach()
        self.floor: Tensor
        self.lower: Tensor
        self.step: Tensor
        self.register_buffer("floor", position.floor())
        self.register_buffer("lower", lower.detach().clone())
        self.register_buffer("step", step.detach().clone())
        low, high = _STRETCH
        share = (position - self.floor - low) / (high - low)
        self.logits = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """``h(V)`` in [0, 1], differentiable: how far each entry is rounded up."""
        low, high = _STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        """The weight between its two levels, differentiable in the logits; clipped entries stay clipped."""
        return self._at(self.floor + self.share())

    def hard(self) -> Tensor:
        """The weight on its grid: every entry one of its two neighbouring levels, no gradient."""
        return self._at(self.floor + (self.share().detach() >= 0.5))

    def regularizer(self, beta: float) -> Tensor:
        """Mean of ``1 - |2 h - 1|**beta``: zero once every `h` is 0 or 1. A falling beta first lets them move freely.

        Args:
            beta: Exponent, above 1: large values act only close to 0 and 1, small ones everywhere.
        """
        return (1.0 - (2.0 * self.share() - 1.0).abs().pow(beta)).mean()

    def _at(self, position: Tensor) -> Tensor:
        return position.clamp(0.0, float(self.qmax)) * self.step + self.lower
