"""Granular-DQ: more bits where activations carry more information."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harmoq_ao.baselines.base import Baseline, minmax_weights
from harmoq_ao.calibration.solve import compute_qparams
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.quant.quantizer import QUANTIZED_BITS
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel

LOWERED = 1 / 3
"""Share of the sites, those of least entropy, that may give up a bit."""


class GranularDQ(Baseline):
    """Bits of activations by information density: ``b - 1``, ``b`` or ``b + 1`` per site, on average at most ``b``.

    Source: Wang, Zhang, Li, Xu, Miao, Wang: "Thinking in granularity: dynamic quantization for image super-resolution
    by intriguing multi-granularity clues", AAAI 2025, which gives each image patch its bits, the same in all layers: a
    learned controller on features of three granularities, then thresholds on the entropy of patches with many bits.

    Different here, so that the result runs on integers of fixed width: bits belong to sites, not to patches
    (:class:`BitsByPatch` has those, simulated), are chosen once from the entropy of what calibration saw there, and
    nothing is trained (the paper trains controller and network). The average counts multiply-accumulates. At 2 and 8
    bits there is nothing to trade and all sites have ``b``. Bounds of activations are static percentiles in every
    profile, those of weights the largest magnitude of each row, at their own ``b`` bits.
    """

    name = "granular-dq"
    title = "Granular-DQ"
    observer = "percentile"

    def configure(self, config: HarmoqConfig) -> HarmoqConfig:
        """As every baseline, and with static bounds unless a rule of the user asks for others."""
        configured = super().configure(config)
        return replace(configured, rules=(SiteRule(dynamic=False), *configured.rules))

    def adjust_qparams(self, prepared: PreparedModel) -> None:
        """Choose bits, and compute the quantization parameters that go with them."""
        solve_with_bits(prepared, chosen_bits(prepared))


def solve_with_bits(prepared: PreparedModel, bits: Mapping[str, int]) -> None:
    """Change the bits of activations by site name, and compute all quantization parameters anew."""
    set_activation_bits(prepared, bits)
    compute_qparams(prepared, show_progress=False)
    minmax_weights(prepared)


def chosen_bits(prepared: PreparedModel) -> dict[str, int]:
    """Bits of the activations of each site with static bounds, by name, from the entropies calibration saw."""
    sites = sites_with_static_activations(prepared)
    entropies = [site_entropy(site) for site in sites]
    bits = [prepared.settings(site.site).act.bits for site in sites]
    changes = allocate(entropies, [site.site.macs for site in sites], bits)
    return {site.site.name: b + change for site, b, change in zip(sites, bits, changes, strict=True)}


def site_entropy(site: PreparedSite) -> float:
    """Entropy in bits of the 8-bit codes of a site's activations between their bounds; of a product the mean of two."""
    values = []
    for quantizer in site.activation_quantizers():
        assert quantizer.observer is not None
        lo, hi = quantizer.bounds()
        values.append(code_entropy(quantizer.observer.sample(), lo, hi))
    return sum(values) / len(values)


def code_entropy(values: Tensor, lo: Tensor, hi: Tensor) -> float:
    """Shannon entropy in bits of `values` in 256 equal bins between `lo` and `hi`; what lies outside is clipped."""
    position = (values.float() - lo) / (hi - lo).clamp_min(1e-30)
    counts = torch.bincount((position * 256).long().clamp_(0, 255).flatten(), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0


def allocate(entropies: Sequence[float], costs: Sequence[float], bits: Sequence[int]) -> list[int]:
    """Change of each site's bits, -1, 0 or +1, in the order of the entropies and paid for.

    Sites of least entropy give up a bit for as long as those of most entropy, taken one by one, can use it: the sum of
    ``cost * change`` is never positive.

    Args:
        entropies: Entropy of each site.
        costs: Multiply-accumulates of each site.
        bits: Bits of each site; results stay within 2 to 8.
    """
    order = sorted(range(len(bits)), key=lambda i: entropies[i])
    given = [i for i in order[: int(len(order) * LOWERED)] if bits[i] > QUANTIZED_BITS[0]]
    budget = sum(costs[i] for i in given)
    changes = [0] * len(bits)
    for i in reversed(order[len(order) // 2 :]):
        if bits[i] == QUANTIZED_BITS[-1]:
            continue
        if costs[i] > budget:
            break
        changes[i] = 1
        budget -= costs[i]
    while given and costs[given[-1]] <= budget:  # what nobody could use is given back
        budget -= costs[given.pop()]
    for i in given:
        changes[i] = -1
    return changes


def set_activation_bits(prepared: PreparedModel, bits: Mapping[str, int]) -> None:
    """Change the bits of activations of single sites after calibration, in the quantizers and in the configuration.

    A rule for each site that changes is appended to the configuration, so that conversion, reports and saved models
    follow. Quantization parameters have to be computed again (:func:`compute_qparams`).

    Args:
        prepared: Calibrated, static; changed in place.
        bits: Bits by site name, 2 to 8. For a product of activations they hold for both operands.

    Raises:
        ConfigError: A width that does not quantize, or a name of no site with quantized activations.
    """
    sites = {site.site.name: site for site in sites_with_static_activations(prepared)}
    rules = []
    for name, width in bits.items():
        if name not in sites or width not in QUANTIZED_BITS:
            raise ConfigError(
                f"Activations cannot have {width} bits at {name}",
                found="no such site with static activations" if name not in sites else f"{width} bits",
                expected=f"a quantized site, and one of {QUANTIZED_BITS}",
            )
        site = sites[name]
        if width == prepared.settings(site.site).act.bits:
            continue
        right = width if site.own_weight is None else None
        rules.append(SiteRule(glob.escape(name), site.site.kind, right, width, dynamic=False))
        for quantizer in site.activation_quantizers():
            quantizer.spec = replace(quantizer.spec, bits=width)
            if quantizer.observer is not None:
                quantizer.observer.spec = quantizer.spec
    prepared.config = replace(prepared.config, rules=(*prepared.config.rules, *rules))


def sites_with_static_activations(prepared: PreparedModel) -> list[PreparedSite]:
    """Sites whose activations are quantized with bounds from calibration."""
    return [s for s in prepared.sites() if s.act_quantizer is not None and not s.act_quantizer.spec.dynamic]
