"""Granular-DQ as its paper has it: bits of activations follow the entropy of the patch. Simulated, never integers."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from spandrel import ImageModelDescriptor
from torch import Tensor, nn

from harmoq_ao.baselines.granular_dq import GranularDQ, code_entropy, sites_with_static_activations, solve_with_bits
from harmoq_ao.calibration.calibrate import calibrate
from harmoq_ao.calibration.solve import enable_fake_quant
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.quant.quantizer import QUANTIZED_BITS
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.zoo import LoadedModel


class BitsByPatch(nn.Module):
    """One network with activations at several widths; each image is upscaled at the width its entropy asks for.

    Patches are images to it: upscale in tiles. The width of a patch holds at all sites, weights are the same in all
    patches. No integer model has it, for a width is part of a kernel; what it shows is the quality of the method.

    Args:
        models: Prepared models by bits of their activations, fake-quantization on.
        thresholds: Ascending entropies in bits that part one width from the next, one fewer than models.

    Raises:
        ConfigError: As many thresholds as models, or more, or fewer than needed.
    """

    def __init__(self, models: Mapping[int, PreparedModel], thresholds: Sequence[float]) -> None:
        super().__init__()
        if len(thresholds) != len(models) - 1:
            found = f"{len(models)} models, {len(thresholds)} thresholds"
            raise ConfigError("Thresholds part one width from the next", found=found, expected="one fewer than models")
        self.widths, self.thresholds = sorted(models), list(thresholds)
        self.models = nn.ModuleList(models[width] for width in self.widths)
        self.used: Counter[int] = Counter()

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` in 0..1, each image at its own width."""
        return torch.cat([self._upscaled(image[None]) for image in images])

    def _upscaled(self, image: Tensor) -> Tensor:
        index = bisect_right(self.thresholds, patch_entropy(image))
        self.used[self.widths[index]] += 1
        model = self.models[index]
        assert isinstance(model, PreparedModel)
        return model.image(image)

    @property
    def mean_bits(self) -> float:
        """Bits of the activations, mean over the patches since `used` was cleared; NaN before the first."""
        total = self.used.total()
        return sum(width * count for width, count in self.used.items()) / total if total else float("nan")


def patch_entropy(image: Tensor) -> float:
    """Shannon entropy in bits of the values of an image in 0..1, in 256 bins."""
    return code_entropy(image, image.new_zeros(()), image.new_ones(()))


def widths_of(bits: int) -> list[int]:
    """Widths around `bits` that average to it when they are equally frequent; at 2 and 8 bits there is nothing else."""
    widths = [bits - 1, bits, bits + 1]
    return widths if set(widths) <= set(QUANTIZED_BITS) else [bits]


def prepare_by_patch(
    model: nn.Module | LoadedModel | ImageModelDescriptor[Any], crops: Sequence[Tensor], config: HarmoqConfig
) -> BitsByPatch:
    """Calibrate Granular-DQ with bits that belong to patches.

    Thresholds are quantiles of the crops' entropies: over the crops, widths are equally frequent and average to
    ``config.act_bits``. Over other images they need not be (:attr:`BitsByPatch.mean_bits`).

    Args:
        model: As for :func:`prepare_harmoq`.
        crops: Low-resolution images `[C, S, S]` in 0..1, of the size of the patches.
        config: Bits, profile and rules.

    Raises:
        CalibrationError: No crops, crops of different sizes, or a site that none of them reaches.
    """
    prepared = calibrate(prepare_harmoq(model, GranularDQ().configure(config)), crops)
    models = {}
    for width in widths_of(config.act_bits):
        models[width] = deepcopy(prepared)
        solve_with_bits(models[width], {s.site.name: width for s in sites_with_static_activations(prepared)})
        enable_fake_quant(models[width])
    entropies = torch.tensor([patch_entropy(crop) for crop in crops], dtype=torch.float64)
    shares = torch.arange(1, len(models), dtype=torch.float64) / len(models)
    return BitsByPatch(models, torch.quantile(entropies, shares).tolist())
