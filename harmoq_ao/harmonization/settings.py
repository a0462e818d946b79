"""Settings of refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from harmoq_ao.common.errors import ConfigError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam at 2 bits; 0 leaves that kind of parameter alone.

    Args:
        bounds: Of the quantization ranges' ends, as a share of the range.
        scales: Of the logarithms of the joint scales, and of the joint shifts as a share of the input's range.
        weights: Of weights and biases of the sites, as a share of their standard deviation.
        rest: Of all other parameters (norms, convolutions, position biases), likewise.

    Raises:
        ConfigError: A rate is negative or not finite.
    """

    bounds: float = 2e-2
    scales: float = 2e-2
    weights: float = 1e-2
    rest: float = 3e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"The learning rate of {name} is out of range", found=value, expected="0 or more")

    def at(self, bits: int) -> Rates:
        """Rates for another width: times the root of ``3 / (2**bits - 1)``, that of weights times its cube.

        The smaller the step of the quantizers, the less there is to correct, and weights that wander are an error of
        their own (docs/results/refinement-trials-x2.md).
        """
        root = math.sqrt(3.0 / (2**bits - 1))
        return Rates(self.bounds * root, self.scales * root, self.weights * root**3, self.rest * root)


@dataclass(frozen=True)
class RefineSettings:
    """How to refine.

    Args:
        steps: Gradient steps of a cycle.
        cycles: How often they are taken, each time from the state kept so far and at half the rates of the time
            before: a cosine with warm restarts (Loshchilov and Hutter, 2017). After a first cycle, a second one does
            what a run of twice the length would do in its second half, but from a better start.
        batch_size: Images of a step.
        crop_size: Side of the images in low-resolution pixels, cut from the crops at random places; None takes whole
            crops. Several small images are worth more than one large one at the same cost.
        focus: How much such places are preferred where the float network adds most to interpolation
            (:class:`harmoq_ao.harmonization.places.Places`); 0 draws all alike.
        rates: Learning rates.
        by_bits: Whether the rates are meant for 2 bits and shrink with the step of the quantizers
            (:meth:`Rates.at`), or are taken as they are.
        feature_weight: Weight of the features' error beside the output's mean absolute error.
        warm_up: Steps over which the rates rise from zero.
        checks: How often the held-out crops are measured in a cycle, evenly over its steps; the best state is kept.
        precision: ``bfloat16`` runs the parts outside of the quantizers in mixed precision.
        seed: Of places and their mirroring.

    Raises:
        ConfigError: A value is out of range.
    """

    steps: int = 200
    cycles: int = 1
    batch_size: int = 4
    crop_size: int | None = 32
    focus: float = 0.0
    rates: Rates = field(default_factory=Rates)
    by_bits: bool = True
    feature_weight: float = 0.05
    warm_up: int = 5
    checks: int = 8
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "cycles", "batch_size", "crop_size", "warm_up", "checks", "seed"):
            value = getattr(self, name)
            minimum = 0 if name in ("warm_up", "seed") else 1
            if name == "crop_size" and value is None:
                continue
            if type(value) is not int or value < minimum:
                raise ConfigError(f"{name} of refinement is out of range", found=value, expected=f"{minimum} or more")
        if self.precision not in get_args(Precision):
            raise ConfigError("Unknown precision", found=self.precision, expected=get_args(Precision))
        for name in ("feature_weight", "focus"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} is out of range", found=value, expected="0 or more")

    @property
    def total_steps(self) -> int:
        """Gradient steps of all cycles."""
        return self.steps * self.cycles
