"""What tests of refinement share: crops, how close a model is to the float network, and learners that are killed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.harmonization.distillation import held_out_psnr
from harmoq_ao.harmonization.learner import Learner
from harmoq_ao.harmonization.teacher import Teacher
from tests.models import images


def crops(count: int, seed: int = 5) -> list[Tensor]:
    """Images `[3, 16, 16]` to refine with."""
    return [image[0] for image in images(count, (16, 16), seed)]


def fidelity(prepared: h.PreparedModel, teacher: Teacher, unseen: Sequence[Tensor]) -> float:
    """PSNR in dB against the float network on images `[3, H, W]`."""
    with torch.no_grad():
        targets = [(image, teacher.exact(image[None])) for image in unseen]
    return held_out_psnr(prepared, targets, torch.zeros(()))


class KilledError(Exception):
    """Stands for the process being killed."""


class DyingLearner:
    """Kills what runs at the `at`-th gradient step of all learners, once; `count` is of all steps asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.count, self.at, self._step = 0, at, Learner.step
        monkeypatch.setattr(Learner, "step", lambda learner, loss: self._counted(learner, loss))

    def _counted(self, learner: Learner, loss: Tensor) -> None:
        self.count += 1
        if self.count == self.at:
            raise KilledError
        self._step(learner, loss)
