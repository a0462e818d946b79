"""Harmonization as one pass over a calibrated model: Algorithm 1, then refinement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from harmoq_ao.calibration.calibrate import enable_fake_quant
from harmoq_ao.harmonization.paper.algorithm import AlgorithmTrace, run_algorithm
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.harmonization.reference import float_reference
from harmoq_ao.harmonization.refine import RefineTrace, refine
from harmoq_ao.preparation.prepare import PreparedModel
from harmoq_ao.sites.history import History


@dataclass
class HarmonizeTrace:
    """How :func:`harmonize` went.

    Args:
        algorithm: Of Algorithm 1, or None where it was left out.
        refine: Of the refinement, or None.
    """

    algorithm: AlgorithmTrace | None = None
    refine: RefineTrace | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        parts = {"algorithm": self.algorithm, "refine": self.refine}
        return {name: None if part is None else part.to_dict() for name, part in parts.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HarmonizeTrace:
        """Inverse of :meth:`to_dict`."""
        algorithm, learned = data.get("algorithm"), data.get("refine")
        return cls(
            None if algorithm is None else AlgorithmTrace.from_dict(algorithm),
            None if learned is None else RefineTrace.from_dict(learned),
        )


def harmonize(
    prepared: PreparedModel,
    crops: Sequence[Tensor],
    settings: HarmonizeSettings,
    *,
    held_out: Sequence[Tensor] = (),
    checkpoint: Path | None = None,
    show_progress: bool | None = None,
) -> HarmonizeTrace:
    """Harmonize weights and activations of a calibrated model.

    Args:
        prepared: From :func:`calibrate`; changed in place, ready to convert afterwards.
        crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
        settings: Such as ``PRESETS["fast"]``.
        held_out: Images like `crops` that are not learned from; refinement keeps the state that is best on them.
        checkpoint: File that refinement saves its progress in and resumes from. Algorithm 1, which is short and
            deterministic, is repeated on resuming.
        show_progress: Show progress bars; by default where standard error is a terminal.

    Returns:
        The whole trace; what is saved with the model stays in ``prepared.history``.

    Raises:
        CalibrationError: Not calibrated, or no crops.
        CheckpointError: The checkpoint belongs to other work.
    """
    enable_fake_quant(prepared)
    float_reference(prepared)  # before any weight changes
    trace = HarmonizeTrace()
    if settings.algorithm is not None:
        trace.algorithm = run_algorithm(prepared, crops, settings.algorithm, show_progress=show_progress)
    if settings.refine is not None:
        trace.refine = refine(
            prepared, crops, settings.refine, held_out=held_out, checkpoint=checkpoint, show_progress=show_progress
        )
    prepared.history = History.of(trace, method="harmoq")
    return trace
