"""What the ranks of the tests do: one function for calibration, refinement and a death in the middle of it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import RankLostError
from harmoq_ao.harmonization.learner import Learner
from harmoq_ao.harmonization.refine import refine
from harmoq_ao.harmonization.settings import Rates, RefineSettings
from harmoq_ao.quant.observers import OBSERVERS, HistogramObserver
from tests.common.ranks import join, tiny
from tests.models import images

SETTINGS = RefineSettings(
    steps=8,
    batch_size=3,
    crop_size=8,
    checks=4,
    warm_up=1,
    rates=Rates(1e-3, 1e-3, 1e-3, 1e-3),
)
LOST = 17


def prepare(observer: str) -> h.PreparedModel:
    """A small model with joint scales, except where the observer takes none."""
    joint_scale: Any = "none" if observer == "histogram" else "hso"
    # with maps relative to their rows losses part by a percent after four steps: sums are taken in another order
    config = h.HarmoqConfig(4, 4, "paper", observer=observer, joint_scale=joint_scale, relative_maps=False)  # type: ignore[arg-type]
    return h.prepare_harmoq(tiny(), config, images(1))


def stream() -> list[Tensor]:
    """Five images of two sizes: the shares are unequal."""
    return [image[:, :, :, : 16 if i % 3 else 12] * (0.3 + 0.2 * i) for i, image in enumerate(images(5))]


def calibrated(observer: str) -> tuple[h.PreparedModel, dict[str, Tensor]]:
    """A model, calibrated twice so that statistics go on, and what its observers know."""
    prepared = prepare(observer)
    h.calibrate(prepared, stream()[:2])
    h.calibrate(prepared, stream())
    known: dict[str, Tensor] = {}
    for site in prepared.sites():
        for side, quantizer in (("left", site.act_quantizer), ("right", site.weight_quantizer)):
            watcher = None if quantizer is None else quantizer.observer
            if watcher is None:
                continue
            name = f"{site.site.path}.{side}"
            known[f"{name}.range"] = torch.stack(watcher.value_range())
            known[f"{name}.rows"] = torch.tensor(watcher.rows_seen)
            if isinstance(watcher, HistogramObserver):
                known[f"{name}.edges"], known[f"{name}.counts"] = watcher.histogram()
            else:
                known[f"{name}.sample"] = watcher.sample()
            channels = watcher.channel_range()
            if channels is not None:
                known[f"{name}.channels"] = torch.stack(channels)
    return prepared, known


def refined(checkpoint: Path | None = None) -> tuple[h.PreparedModel, dict[str, Any]]:
    """A refined model and its trace."""
    prepared = h.calibrate(prepare("minmax"), images(2))
    crops = [image[0] for image in images(4, seed=5)]
    held_out = [image[0] for image in images(3, seed=9)]
    trace = refine(prepared, crops, SETTINGS, held_out=held_out, checkpoint=checkpoint)
    return prepared, asdict(trace)


def _dying_after(steps: int) -> None:
    step = Learner.step

    def dies(self: Learner, loss: Tensor) -> None:
        if self.steps_done == steps:
            os._exit(9)
        step(self, loss)

    Learner.step = dies  # type: ignore[method-assign]


def main(number: int, count: int, task: str, folder: Path) -> None:
    """Do a task as one of the ranks, and keep what came out of it in the folder."""
    join(number, count, folder)
    if task == "calibrate":
        for observer in OBSERVERS:
            prepared, known = calibrated(observer)
            torch.save((prepared.state_dict(), known), folder / f"{observer}.{number}")
    if task == "die" and number == count - 1:
        _dying_after(5)
    try:
        prepared, trace = refined(folder / "progress.safetensors")
    except RankLostError as error:
        (folder / f"error.{number}").write_text(str(error))
        sys.exit(LOST)
    torch.save(prepared.state_dict(), folder / f"refined.{number}")
    (folder / f"trace.{number}").write_text(json.dumps(trace))
