"""Adaptive boundary refinement (ABR): the ranges of one contraction by projected gradient descent on its output error.

Gradients are those of Theorem 3 (`contraction.py`). Bounds are learned in units of the range at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.paper.contraction import TINY, Contraction, Evaluation, Gradient, evaluate
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme, snap_bounds


@dataclass(frozen=True)
class ABRSettings:
    """Settings of boundary refinement.

    Args:
        updates: Most updates of one contraction.
        rate: First step of a bound in units of its range.
        last_rate: Step that the cosine ends at.
        warm_up: Share of the updates over which the step rises to `rate`.
        clip: Largest norm of all gradients of the relative objective together.
        gap: Smallest range, in units of the first.
        review_every: Updates between two reviews.
        tolerance: Relative fall of the objective that counts as progress at a review.
        patience: Successive reviews without progress after which to stop.

    Raises:
        ConfigError: A value is outside its range.
    """

    updates: int = 20
    rate: float = 5e-2
    last_rate: float = 5e-4
    warm_up: float = 0.1
    clip: float = 1.0
    gap: float = 0.01
    review_every: int = 5
    tolerance: float = 1e-4
    patience: int = 2

    def __post_init__(self) -> None:
        counts = type(self.updates) is int and self.updates >= 0
        counts = counts and all(type(n) is int and n >= 1 for n in (self.review_every, self.patience))
        steps = 0 < self.last_rate <= self.rate <= 1 and self.clip > 0
        if not (counts and steps and 0 <= self.warm_up < 1 and 0 < self.gap < 1 and self.tolerance >= 0):
            raise ConfigError(
                "A setting of the boundary refinement is out of range",
                found=self,
                expected="updates >= 0, review_every and patience >= 1, 0 < last_rate <= rate <= 1, clip > 0, "
                "warm_up and gap in (0, 1)",
            )


# --- free parameters --------------------------------------------------------------------------------------------------


class _FreeBounds:
    """The free parameters of one operand's range, in units of the range at the start.

    An asymmetric quantizer has two free bounds. Under the other schemes the code of zero is fixed, and only the
    width of the range is free.
    """

    def __init__(self, spec: QuantizerSpec, bounds: tuple[Tensor, Tensor], gap: float) -> None:
        self.spec, self.gap = spec, gap
        lo, hi = bounds
        self.unit = (hi - lo).clamp_min(TINY)
        self.tied = spec.scheme is not Scheme.ASYMMETRIC
        self.below = -lo / self.unit  # share of the range below zero; one half if symmetric

    def parameters(self, bounds: tuple[Tensor, Tensor]) -> list[Tensor]:
        lo, hi = bounds
        return [(hi - lo) / self.unit] if self.tied else [lo / self.unit, hi / self.unit]

    def gradient(self, gradient: Gradient, objective: float) -> list[Tensor]:
        """Gradient of the logarithm of the objective by the parameters."""
        lo, hi = (g * self.unit / max(objective, TINY) for g in gradient)
        return [(1 - self.below) * hi - self.below * lo] if self.tied else [lo, hi]

    def bounds(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest feasible bounds: at least a gap apart, and valid under the scheme."""
        if self.tied:
            width = parameters[0].clamp_min(self.gap) * self.unit
            return snap_bounds(-self.below * width, (1 - self.below) * width, self.spec)
        lo, hi = parameters
        short = ((self.gap - (hi - lo)) / 2).clamp_min(0)
        return (lo - short) * self.unit, (hi + short) * self.unit


class BoundaryRefiner:
    """Projected Adam on the bounds of one contraction.

    It moves freely and remembers its best state. A review every few updates returns to that state, at half the step,
    unless the state was found since the last review.

    Args:
        contraction: The start.
        settings: Steps and their schedule.

    Attributes:
        best: The contraction of least objective so far.
        objective: Its objective.
        failures: Reviews without progress since the last one with some.
    """

    best: Contraction
    objective: float
    failures: int
    _place: Contraction
    _evaluation: Evaluation
    _reviewed: float

    def __init__(self, contraction: Contraction, settings: ABRSettings) -> None:
        self.settings = settings
        self._halvings = 0
        self._done = 0
        self._adam = _Adam()
        self.restart(contraction)

    def restart(self, contraction: Contraction) -> None:
        """Continue from another contraction (a new scale, another weight), at the present step size."""
        self.failures = 0
        self._free = {
            side: _FreeBounds(operand.spec, operand.bounds, self.settings.gap)
            for side, operand in (("left", contraction.left), ("right", contraction.right))
            if operand.spec is not None and operand.bounds is not None
        }
        self._enter(contraction)

    @property
    def can_learn(self) -> bool:
        """Whether there are bounds, and an error to reduce."""
        return self.objective > 0 and bool(self._free)

    def update(self) -> float:
        """One step from the present state; returns the objective there."""
        gradients = {
            side: free.gradient(getattr(self._evaluation, side), self._evaluation.objective)
            for side, free in self._free.items()
        }
        flat = [g for part in gradients.values() for g in part]
        directions = iter(self._adam.direction(clipped(flat, self.settings.clip)))
        step = self._rate() * 0.5**self._halvings
        self._place = self._moved({side: [next(directions) for _ in part] for side, part in gradients.items()}, step)
        self._evaluation = evaluate(self._place)
        self._done += 1
        if self._evaluation.objective < self.objective:
            self.best, self.objective = self._place, self._evaluation.objective
        return self._evaluation.objective

    def review(self) -> bool:
        """Whether there was progress since the last review; if not, return to the best state, at half the step."""
        progress = self.objective < self._reviewed * (1 - self.settings.tolerance)
        self.failures = 0 if progress else self.failures + 1
        if not progress:
            self._halvings += 1
            self._enter(self.best)
        self._reviewed = self.objective
        return progress

    def _enter(self, contraction: Contraction) -> None:
        self._place = self.best = contraction
        self._evaluation = evaluate(contraction)
        self.objective = self._evaluation.objective
        self._reviewed = self.objective
        self._adam = _Adam()

    def _rate(self) -> float:
        """Linear warm-up, then a cosine from the first to the last step."""
        s = self.settings
        warm_up = int(s.warm_up * s.updates)
        if self._done < warm_up:
            return s.rate * (self._done + 1) / (warm_up + 1)
        part = min(1.0, (self._done - warm_up) / max(1, s.updates - warm_up))
        return s.last_rate + (s.rate - s.last_rate) * (1 + math.cos(math.pi * part)) / 2

    def _moved(self, direction: dict[str, list[Tensor]], step: float) -> Contraction:
        moved = {"left": self._place.left, "right": self._place.right}
        for side, free in self._free.items():
            present = moved[side].bounds
            assert present is not None
            start = free.parameters(present)
            bounds = free.bounds([p - step * d for p, d in zip(start, direction[side], strict=True)])
            moved[side] = replace(moved[side], bounds=bounds)
        return replace(self._place, left=moved["left"], right=moved["right"])


def clipped(gradients: list[Tensor], limit: float) -> list[Tensor]:
    """The gradients, scaled down together where their common norm exceeds the limit."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    return gradients if norm <= limit else [g * (limit / norm) for g in gradients]


class _Adam:
    """Directions of Adam (beta 0.9 and 0.999), per element of order one."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._second: list[Tensor] = []
        self._steps = 0

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        if not self._first:
            self._first = [torch.zeros_like(g) for g in gradients]
            self._second = [torch.zeros_like(g) for g in gradients]
        self._steps += 1
        bias_1, bias_2 = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        result = []
        for g, first, second in zip(gradients, self._first, self._second, strict=True):
            first.lerp_(g, 0.1)
            second.lerp_(g.square(), 0.001)
            result.append(first / bias_1 / ((second / bias_2).sqrt() + 1e-8))
        return result
