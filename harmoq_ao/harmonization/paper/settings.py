"""Settings of Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.paper.abr import ABRSettings
from harmoq_ao.harmonization.paper.projections import Projection, Subspace
from harmoq_ao.harmonization.paper.src import SRCSettings


@dataclass(frozen=True)
class AlgorithmSettings:
    """What Algorithm 1 does, and how much of it.

    Args:
        src: Calibrate weights and biases for the error of their input (structural residual calibration).
        hso: Balance the operands by a joint scale (harmonized scale optimization).
        abr: Refine the quantization ranges (adaptive boundary refinement).
        projection: H of SRC: ``laplacian``, ``sobel``, ``dct``, ``learned``, ``random`` or ``identity``.
        edge_weight: Weight of a spatial filter beside the plain residual; infinity leaves the filter alone.
        ridge: Relative ridge of SRC.
        subspace: Size of a channel projection, or ``adaptive``.
        printed: SRC as the paper prints it, for comparison: regression on the float input, filter alone, bias
            untouched, and the result kept whatever it does to the objective.
        on_float: Regress SRC on the input before its quantizer instead of after it.
        inherited: Share, 0 to 1, of the deviation already in a site's input that its output is to make up for. The mean
            of a linear layer always counts in full. With a joint scale and shift less is better on DAT-light (2 bits,
            SRC alone: 0.4 dB between 0 and 1); a regression on a noisy input shrinks its output, which may be why.
        updates: Most updates of the ranges per site.
        rate: First step of a bound in units of its range.
        rows: Rows per site that the objective is measured on.
        images: Most images; more than a few are not needed, and memory grows with them.
        rebalance_every: Updates between two looks at progress and balance.
        balance_tolerance: Difference of the operands' shares of the error that is left alone, relative to the error
            before.
        src_factor: SRC is applied again where the difference exceeds this many tolerances.
        memory: Bytes of captured inputs held at a time; sites are solved in as many passes as that takes.
        seed: Of samples and random projections.

    Raises:
        ConfigError: A value is outside its set.
    """

    src: bool = True
    hso: bool = True
    abr: bool = True
    projection: Projection = "laplacian"
    edge_weight: float = 1.0
    ridge: float = 1e-2
    subspace: Subspace = "adaptive"
    printed: bool = False
    on_float: bool = False
    inherited: float = 0.0
    updates: int = 20
    rate: float = 5e-2
    rows: int = 2048
    images: int = 8
    rebalance_every: int = 5
    balance_tolerance: float = 0.01
    src_factor: float = 1.5
    memory: int = 512 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "images", "rebalance_every", "memory"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", found=repr(getattr(self, name)), expected="1 or more")
        if self.balance_tolerance < 0 or self.src_factor < 0:
            raise ConfigError("A tolerance is negative", found=(self.balance_tolerance, self.src_factor))
        if not 0 <= self.inherited <= 1:
            raise ConfigError("The inherited share is out of range", found=self.inherited, expected="0 to 1")
        self.src_settings()
        self.abr_settings()

    def src_settings(self) -> SRCSettings:
        """Settings of the first component."""
        if self.printed:
            return replace(SRCSettings.printed(self.projection, self.ridge), subspace=self.subspace, seed=self.seed)
        return SRCSettings(
            self.projection, self.edge_weight, self.ridge, self.subspace, on_float=self.on_float, seed=self.seed
        )

    def abr_settings(self) -> ABRSettings:
        """Settings of the third component."""
        return ABRSettings(self.updates, self.rate, self.rate / 100, review_every=self.rebalance_every)
