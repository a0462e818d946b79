"""The interface of a baseline, and helpers that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harmoq_ao.calibration.calibrate import calibrate
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, Observer
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.sites.model import PreparedModel


@dataclass(frozen=True)
class Budget:
    """Optimization budget of a method that learns.

    Args:
        steps: Gradient steps of the whole network.
        batch_size: Images of a step.
        crop_size: Side of these images, cut from the crops at random places; None takes whole crops.
        seed: Of the order of the crops and of what is cut from them.
        show_progress: Show progress bars; by default where standard error is a terminal.
        checkpoint: File that a method that learns saves its progress to and resumes from.

    Raises:
        ConfigError: A number is out of range.
    """

    steps: int
    batch_size: int = 1
    crop_size: int | None = None
    seed: int = 0
    show_progress: bool | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        side = 1 if self.crop_size is None else self.crop_size
        if self.steps < 0 or self.batch_size < 1 or side < 1 or self.seed < 0:
            raise ConfigError(
                "The budget of a baseline is out of range",
                found=f"{self.steps} steps of {self.batch_size} images of side {self.crop_size}, seed {self.seed}",
                expected="no negative number, at least one image, at least one pixel",
            )


class Baseline:
    """A published method on the same sites, quantizers and images as HarmoQ.

    A method overrides :meth:`adjust_qparams`, :meth:`learn`, or neither.

    Attributes:
        name: Word that selects it on the command line.
        title: Name in tables.
        observer: How calibration finds its static quantization ranges, before :meth:`adjust_qparams` and :meth:`learn`.
        learns: Whether it takes gradient steps.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    observer: ClassVar[Observer]
    learns: ClassVar[bool] = False

    def configure(self, config: HarmoqConfig) -> HarmoqConfig:
        """`config` with this method's observer, without HarmoQ's own joint scales, shifts and relative maps."""
        rules = tuple(replace(rule, joint_scale=None) for rule in config.rules)
        plain = replace(config, joint_scale="none", joint_shift=False, relative_maps=False, rms_ranges=False)
        return replace(plain, observer=self.observer, rules=rules)

    def apply(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Calibrate, adjust, learn: afterwards `prepared` is ready for :func:`convert_harmoq`.

        Args:
            prepared: From ``prepare_harmoq(model, self.configure(config))``, not calibrated; changed in place.
            crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
            budget: For a method that learns; with no steps it only calibrates.

        Raises:
            CalibrationError: No crops, or a site that none of them reaches.
        """
        calibrate(prepared, crops, show_progress=budget.show_progress)
        self.adjust_qparams(prepared)
        if self.learns and budget.steps > 0:
            self.learn(prepared, crops, budget)

    def adjust_qparams(self, prepared: PreparedModel) -> None:
        """Change the quantization ranges or bits of a calibrated model by rule. The default changes nothing."""

    def learn(self, prepared: PreparedModel, crops: Sequence[Tensor], budget: Budget) -> None:
        """Take gradient steps, if the method :attr:`learns`."""


def activation_quantizers(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    """Static quantizers of activations: of inputs, and of both operands of products."""
    return [q for site in prepared.sites() for q in site.activation_quantizers() if not q.spec.dynamic]


def weight_quantizers(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    """Quantizers of the weights of linear layers and convolutions."""
    return [q for site in prepared.sites() for q in site.weight_quantizers()]


@torch.no_grad()
def minmax_weights(prepared: PreparedModel) -> None:
    """Set the range of every weight quantizer to the largest magnitude of each row."""
    for site in prepared.sites():
        site.solve_weight(minmax=True)
