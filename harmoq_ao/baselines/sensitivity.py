"""How much PSNR a network loses when single linear layers have fewer weight bits, or all of them together.

With layer `i` alone at `b` bits, its error is ``delta_i(b) = mean (y_ib - y)^2`` over luma. Against a reference that
the float network misses by `m`, the network loses ``10 log10(1 + sum_i delta_i(b_i) / m)`` dB to first order. Each
layer's ``10 log10(1 + delta_i(b) / m)`` is its sensitivity.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from harmoq_ao.baselines.bit_allocation import SiteBits
from harmoq_ao.common.progress import track
from harmoq_ao.images import luma
from harmoq_ao.sites.base import quiet
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear

_LEAST = 1e-12  # the smallest squared error that float64 can tell from none


@dataclass(frozen=True)
class Measured:
    """A pair of images that sensitivities are measured on.

    Args:
        image: Low-resolution crop `[C, H, W]` in 0..1.
        reference: The same at high resolution, `[C, sH, sW]`.
    """

    image: Tensor
    reference: Tensor


class SensitivityBench:
    """A model whose quantizers are exchanged site by site for those of the same model at other widths.

    Args:
        candidates: The model calibrated at each width.
        names: Sites to choose for, in execution order.
        held_out: Pairs that losses are measured on.
    """

    def __init__(
        self, candidates: dict[int, PreparedModel], names: Sequence[str], held_out: Sequence[Measured]
    ) -> None:
        self.largest = max(candidates)
        self.names = tuple(names)
        self._sites = {bits: {s.site.name: s for s in model.sites()} for bits, model in candidates.items()}
        self.model = copy.deepcopy(candidates[self.largest])
        self._own = {s.site.name: s for s in self.model.sites()}
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        self._images = torch.stack([pair.image for pair in held_out]).to(like)
        with quiet():
            self._float = self._outputs()
        self._references = [self._inner(pair.reference.to(like.device)) for pair in held_out]
        self._misses = [max(_mse(y, r), _LEAST) for y, r in zip(self._float, self._references, strict=True)]

    def sensitivities(self, widths: Sequence[int], show_progress: bool | None = None) -> list[SiteBits]:
        """Measure every layer alone at every width, with all others in float."""
        for name in self._own:
            self._clear(name)
        found: dict[str, dict[int, float]] = {name: {} for name in self.names}
        tasks = [(name, bits) for name in self.names for bits in widths]
        for name, bits in track(tasks, "Measuring sensitivities", show=show_progress):
            self._place(name, bits)
            found[name][bits] = self._estimated_drop()
            self._clear(name)
        weights = {name: cast(PreparedLinear, self._own[name]).weight.numel() for name in self.names}
        return [SiteBits(name, weights[name], found[name]) for name in self.names]

    def drop(self, lowered: dict[str, int]) -> float:
        """Mean loss of PSNR against float in dB, with the whole model quantized.

        Args:
            lowered: Widths of layers below the largest one, by name.
        """
        for name in self._own:
            self._place(name, lowered.get(name, self.largest))
        errors = [_mse(y, reference) for y, reference in zip(self._outputs(), self._references, strict=True)]
        return _mean_db(max(e, _LEAST) / m for e, m in zip(errors, self._misses, strict=True))

    def _estimated_drop(self) -> float:
        """Mean of ``10 log10(1 + delta / m)``; chance correlation cannot hide `delta`, the error against float."""
        errors = [_mse(y, own) for y, own in zip(self._outputs(), self._float, strict=True)]
        return _mean_db(1 + e / m for e, m in zip(errors, self._misses, strict=True))

    def _place(self, name: str, bits: int) -> None:
        own, other = self._own[name], self._sites[bits][name]
        own.attach(other.act_quantizer, other.weight_quantizer)
        own.joint_scale, own.joint_shift = other.joint_scale, other.joint_shift

    def _clear(self, name: str) -> None:
        self._own[name].attach(None, None)
        self._own[name].joint_scale = self._own[name].joint_shift = None

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        result: Tensor = self.model(self._images)
        return [self._inner(image) for image in result.float().clamp(0, 1)]

    def _inner(self, image: Tensor) -> Tensor:
        """Luma, in float64, without a border of the scale."""
        border = self.model.traits.scale
        values = luma(image) if len(image) == 3 else image
        return values[..., border : values.shape[-2] - border, border : values.shape[-1] - border].double()


def _mean_db(ratios: Iterable[float]) -> float:
    values = [10 * math.log10(ratio) for ratio in ratios]
    return sum(values) / len(values)


def _mse(a: Tensor, b: Tensor) -> float:
    return float(((a - b) ** 2).mean())
