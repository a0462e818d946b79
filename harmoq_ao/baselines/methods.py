"""One entry point for every quantization method that the command line and the recipes know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spandrel import ImageModelDescriptor
from torch import Tensor, nn

from harmoq_ao.baselines import BASELINES, Budget
from harmoq_ao.calibration.calibrate import calibrate
from harmoq_ao.calibration.solve import enable_fake_quant
from harmoq_ao.common.choices import METHODS as METHODS
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.harmonize import harmonize
from harmoq_ao.harmonization.presets import preset as preset_of
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.zoo import LoadedModel


def check_method(method: str) -> None:
    """Raise ConfigError unless it is one of :data:`METHODS`."""
    if method not in METHODS:
        raise ConfigError("Unknown method", found=method, expected=", ".join(METHODS))


def prepare_with(
    method: str,
    model: nn.Module | LoadedModel | ImageModelDescriptor[Any],
    crops: Sequence[Tensor],
    config: HarmoqConfig,
    *,
    preset: str = "fast",
    held_out: Sequence[Tensor] = (),
    checkpoint: Path | None = None,
    show_progress: bool | None = None,
) -> PreparedModel:
    """Quantize a float model with one of the methods.

    Args:
        method: One of :data:`METHODS`.
        model: As for :func:`prepare_harmoq`.
        crops: Low-resolution images `[C, S, S]` in 0..1, of one size.
        config: Bits, profile and rules; the method chooses observer and joint scales.
        preset: How much work: a name of :data:`PRESETS`. Baselines that learn take as many
            gradient steps, of as many images, as HarmoQ's refinement.
        held_out: Images that are not learned from (HarmoQ keeps the state that is best on them).
        checkpoint: File that a method that learns saves its progress to and resumes from.
        show_progress: Show progress bars; by default where standard error is a terminal.

    Returns:
        A prepared model, fake-quantization on, ready for :func:`convert_harmoq`.

    Raises:
        ConfigError: Unknown method or preset.
        CalibrationError: No crops, crops of different sizes, or a site that none of them reaches.
        CheckpointError: The checkpoint belongs to other work.
    """
    check_method(method)
    settings = preset_of(preset)
    if method == "harmoq":
        prepared = prepare_harmoq(model, config)
        calibrate(prepared, crops, show_progress=show_progress)
        harmonize(prepared, crops, settings, held_out=held_out, checkpoint=checkpoint, show_progress=show_progress)
        prepared.history = replace(prepared.history or History(), method=method, preset=preset)
        return prepared
    baseline = BASELINES[method]
    prepared = prepare_harmoq(model, baseline.configure(config))
    refine = settings.refine or RefineSettings()
    budget = Budget(settings.steps, refine.batch_size, refine.crop_size, config.seed, show_progress, checkpoint)
    baseline.apply(prepared, crops, budget)
    enable_fake_quant(prepared)
    prepared.history = History(method, preset)
    return prepared
