"""What the tests of baselines share: small prepared models, their operands, and what changed in them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.baselines import BASELINES, Budget
from harmoq_ao.calibration.solve import disable_fake_quant, enable_observers
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.distillation import feature_error, features_of
from harmoq_ao.harmonization.stages import find_stages, first_tensor
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.prepared import PreparedMatmul
from tests.models import images, prepare


def crops(count: int = 6) -> list[Tensor]:
    """Images `[3, 16, 16]`."""
    return [image[0] for image in images(count)]


def applied(
    method: str, name: str, config: HarmoqConfig, steps: int = 0, count: int = 6, **options: Any
) -> h.PreparedModel:
    """A small model that went through a baseline on `count` images."""
    baseline = BASELINES[method]
    prepared = prepare(name, baseline.configure(config))
    baseline.apply(prepared, crops(count), Budget(steps, **options))
    return prepared


class _Recorder(nn.Module):
    """Stands in for an observer and keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().flatten().clone())
        return x


def float_operands(prepared: h.PreparedModel, batches: Sequence[Tensor]) -> dict[str, tuple[Any, Tensor]]:
    """Activations at every quantizer when the float network runs: by name, the quantizer and all values `[n]`."""
    twin = copy.deepcopy(prepared)
    disable_fake_quant(twin)
    recorders: dict[str, tuple[Any, _Recorder]] = {}
    for site in twin.sites():
        for side, quantizer in (("left", site.act_quantizer), ("right", site.weight_quantizer)):
            if quantizer is not None and (side == "left" or isinstance(site, PreparedMatmul)):
                recorder = _Recorder()
                quantizer.observer = recorder
                recorders[f"{site.site.name}.{side}"] = (quantizer, recorder)
    enable_observers(twin)
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return {name: (quantizer, torch.cat(recorder.seen)) for name, (quantizer, recorder) in recorders.items()}


def changed(before: h.PreparedModel, after: h.PreparedModel) -> set[str]:
    """Names of the tensors that differ between two prepared models."""
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def learned_tensors(method: str, name: str, config: HarmoqConfig) -> tuple[set[str], h.PreparedModel]:
    """What 24 steps of a baseline change, at least something and to a lower distillation loss, and the model after."""
    initial, learned = (applied(method, name, config, steps=steps) for steps in (0, 24))
    assert distillation_loss(learned, images(6)) < 0.95 * distillation_loss(initial, images(6))
    names = changed(initial, learned)
    assert names
    return names, learned


@torch.no_grad()
def distillation_loss(prepared: h.PreparedModel, batches: Sequence[Tensor]) -> float:
    """Mean absolute error to the float network's output, plus the error of the blocks' features.

    For models of which only bounds were learned: their weights are those of the float network.
    """
    teacher = Teacher(prepared).exact
    names, total = [stage.name for stage in find_stages(prepared)], 0.0
    for batch in batches:
        with features_of(teacher, names) as wanted:
            target = first_tensor(teacher(batch))
        with features_of(prepared, names) as reached:
            output = first_tensor(prepared(batch))
        total += float((output - target).abs().mean())
        total += 0.05 * float(feature_error(reached, wanted)) if names else 0.0
    return total / len(batches)
