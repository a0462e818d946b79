"""Harmonization of a calibrated model: Algorithm 1, then refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from harmoq_ao.calibration.solve import enable_fake_quant
from harmoq_ao.harmonization.paper.algorithm import run_algorithm
from harmoq_ao.harmonization.paper.trace import AlgorithmTrace, Balance
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.harmonization.refine import RefineTrace, refine
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.history import History, SiteChange, short, thinned
from harmoq_ao.sites.model import PreparedModel


@dataclass
class HarmonizeTrace:
    """Record of a call of :func:`harmonize`.

    Args:
        algorithm: Trace of Algorithm 1, or None where it was left out.
        refine: Trace of the refinement, or None.
    """

    algorithm: AlgorithmTrace | None = None
    refine: RefineTrace | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        parts = {"algorithm": self.algorithm, "refine": self.refine}
        return {name: None if part is None else part.to_dict() for name, part in parts.items()}

    def to_history(self, method: str | None = None, preset: str | None = None) -> History:
        """The part saved with a model: numbers of four digits, curves thinned to :data:`MAX_POINTS` points."""
        sites: tuple[SiteChange, ...] = ()
        if self.algorithm is not None:
            changes = (_change(s.name, s.start, s.end, s.balances) for s in self.algorithm.sites)
            sites = tuple(c for c in changes if all(v is None or math.isfinite(v) for v in c[1:]))
        learned = self.refine
        if learned is None:
            return History(method, preset, sites)
        losses = thinned(list(enumerate(learned.losses, start=1)))
        return History(method, preset, sites, losses, thinned(learned.held_out), learned.best_step)


def _change(name: str, start: float, end: float, balances: Sequence[Balance]) -> SiteChange:
    last = balances[-1] if balances else None
    shares = (None, None) if last is None else (short(last.left), short(last.right))
    return SiteChange(name, short(start), short(end), *shares)


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
        settings: What to do, such as ``PRESETS["fast"]``.
        held_out: Images like `crops` that are not learned from; refinement keeps its best state on them.
        checkpoint: File that refinement saves its progress to and resumes from. Algorithm 1 is short and
            deterministic, so it is repeated on resuming.
        show_progress: Show progress bars; by default where standard error is a terminal.

    Returns:
        The whole trace; the part saved with the model goes to ``prepared.history``.

    Raises:
        CalibrationError: Not calibrated, or no crops.
        CheckpointError: The checkpoint belongs to other work.
    """
    enable_fake_quant(prepared)
    teacher = Teacher(prepared)
    trace = HarmonizeTrace()
    if settings.algorithm is not None:
        trace.algorithm = run_algorithm(
            prepared, crops, settings.algorithm, teacher=teacher, show_progress=show_progress
        )
    if settings.refine is not None:
        trace.refine = refine(
            prepared,
            crops,
            settings.refine,
            teacher=teacher,
            held_out=held_out,
            algorithm=settings.algorithm,
            checkpoint=checkpoint,
            show_progress=show_progress,
        )
    prepared.history = trace.to_history(method="harmoq")
    return trace
