"""In which order the weights of linear layers lose bits: the relaxed knapsack.

To first order the errors of layers add up at the output, so each layer's loss in dB at each width counts by itself.
Steps down the lower convex hulls of (bits, loss), cheapest decibel per saved bit first, are the solutions of the
relaxed knapsack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteBits:
    """One layer whose weights may take fewer bits.

    Args:
        name: Site name.
        weights: Number of weights.
        sensitivity_db: Loss in dB at each width, with this layer alone rounded.
    """

    name: str
    weights: int
    sensitivity_db: dict[int, float]


@dataclass(frozen=True)
class Step:
    """One layer is lowered to fewer bits.

    Args:
        site: Index of the site.
        bits: Its new width.
        saved: Bits of storage that this saves.
        loss_db: Predicted loss.
    """

    site: int
    bits: int
    saved: int
    loss_db: float


def cheapest_steps(sites: Sequence[SiteBits], widths: Sequence[int]) -> list[Step]:
    """Steps down every layer's lower convex hull, in the order of predicted loss per saved bit.

    No other choice of bits beats a prefix of them in both predicted loss and size.

    Args:
        sites: Sites and sensitivities.
        widths: Widths to choose from; the largest is where every site starts.
    """
    steps = [step for index, site in enumerate(sites) for step in _hull(index, site, sorted(widths, reverse=True))]
    return sorted(steps, key=lambda step: (step.loss_db / step.saved, step.site, -step.bits))


def bits_after(sites: Sequence[SiteBits], steps: Sequence[Step]) -> dict[str, int]:
    """Width of every lowered layer, by name."""
    return {sites[step.site].name: step.bits for step in steps}


def _hull(index: int, site: SiteBits, widths: Sequence[int]) -> list[Step]:
    """From each corner of the hull, the step of least slope leads to the next corner."""
    steps, at = [], 0
    while at < len(widths) - 1:
        options = [_step(index, site, widths[at], bits) for bits in widths[at + 1 :]]
        slopes = [option.loss_db / option.saved for option in options]
        best = max(i for i, slope in enumerate(slopes) if slope == min(slopes))
        steps.append(options[best])
        at += best + 1
    return steps


def _step(index: int, site: SiteBits, before: int, after: int) -> Step:
    loss = site.sensitivity_db[after] - site.sensitivity_db[before]
    return Step(index, after, (before - after) * site.weights, loss)
