"""Mixed-precision bit allocation: each linear layer gets the fewest weight bits that the image can bear.

Activations keep their width: a product of 8-bit and 4-bit codes runs as fast as one of two 8-bit codes, so what few
bits buy is memory, and weights bear them best.

The sensitivity of each layer is measured (`sensitivity.py`), which puts all possible reductions in an order
(`bit_allocation.py`). How many of them to take is not predicted but measured, with all chosen layers rounded at once.
"""

from __future__ import annotations

import copy
import glob
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from harmoq_ao.baselines.bit_allocation import SiteBits, Step, bits_after, cheapest_steps
from harmoq_ao.baselines.sensitivity import Measured, SensitivityBench
from harmoq_ao.calibration.calibrate import calibrate
from harmoq_ao.calibration.solve import compute_qparams, enable_fake_quant
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.convert import convert_harmoq
from harmoq_ao.conversion.save import folder_bytes, save_quantized
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.quant.quantizer import check_bits
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import PreparedModel

WIDTHS = (8, 4, 3, 2)
"""Widths that the low-bit kernels read; others are stored as tightly, but have no fused kernel."""


@dataclass(frozen=True)
class Mixture:
    """The bits chosen, with the measurements behind them.

    Args:
        sites: The linear layers, with their sensitivities.
        bits: Width of each, by name.
        drop_db: Measured loss against float with the whole model quantized so, in dB on the held-out crops.
        uniform_drop_db: The same with every site at the largest width.
        largest: That width.
    """

    sites: tuple[SiteBits, ...]
    bits: dict[str, int]
    drop_db: float
    uniform_drop_db: float
    largest: int

    @property
    def total_bits(self) -> int:
        """Bits of all weights chosen for."""
        return sum(site.weights * self.bits[site.name] for site in self.sites)

    @property
    def uniform_bits(self) -> int:
        """The same at the largest width."""
        return sum(site.weights * self.largest for site in self.sites)

    def rules(self) -> tuple[SiteRule, ...]:
        """Rules for a configuration, one for each layer below the largest width."""
        return tuple(_rule(name, bits) for name, bits in self.bits.items() if bits != self.largest)

    def recorded(self, history: History | None) -> History:
        """A history that records the choice, to be saved with the model."""
        costs = {site.name: float(f"{site.sensitivity_db[self.bits[site.name]]:.3g}") for site in self.sites}
        return replace(history or History(), choice=self.describe(), sensitivities=costs)

    def describe(self) -> str:
        """Summary: bits before and after, layers per width, and the loss."""
        counts = Counter(self.bits.values())
        shares = ", ".join(f"{counts[width]} at W{width}" for width in sorted(counts, reverse=True))
        average = self.total_bits / max(1, sum(site.weights for site in self.sites))
        return (
            f"{self.total_bits:,} bits of weights ({average:.2f} each) instead of {self.uniform_bits:,}: {shares}; "
            f"{self.drop_db:.3f} dB below float on held-out crops, {self.uniform_drop_db:.3f} at W{self.largest}"
        )


def mix_bits(
    model: Any,
    crops: Sequence[Tensor],
    held_out: Sequence[Measured],
    config: HarmoqConfig,
    *,
    max_drop: float | None = None,
    max_bytes: int | None = None,
    widths: Sequence[int] = WIDTHS,
    show_progress: bool | None = None,
) -> Mixture:
    """Mixed-precision bit allocation: weight bits of every linear layer that no rule of the configuration fixes.

    Args:
        model: As for :func:`prepare_harmoq`.
        crops: Low-resolution images to calibrate on.
        held_out: Images of one size to measure on, of photographs not used for calibration.
        config: Everything but the weight bits; append :meth:`Mixture.rules` to its rules.
        max_drop: Largest allowed loss against float, in dB of luma PSNR.
        max_bytes: Largest size of the saved model, instead of `max_drop`.
        widths: Widths to choose from.
        show_progress: Show progress bars; by default where standard error is a terminal.

    Raises:
        ConfigError: Not exactly one of `max_drop` and `max_bytes`, one that cannot be reached, or no layer to choose
            for.
        CalibrationError: No images to measure on.
    """
    widths = _checked(max_drop, max_bytes, widths, held_out)
    candidates = _calibrated_widths(model, crops, config, widths, show_progress)
    bench = SensitivityBench(candidates, _free_sites(candidates[widths[0]]), held_out)
    sites = bench.sensitivities(widths, show_progress)
    steps = cheapest_steps(sites, widths)
    uniform = bench.drop({})
    if max_bytes is not None:
        taken = _steps_to_size(
            sites, steps, widths[0], max_bytes - _bytes_beside(copy.deepcopy(candidates[widths[0]]), sites, widths[0])
        )
        drop = bench.drop(bits_after(sites, steps[:taken])) if taken else uniform
    else:
        assert max_drop is not None
        taken, drop = _steps_to_drop(bench, sites, steps, uniform, max_drop, widths[0])
    lowered = bits_after(sites, steps[:taken])
    bits = {site.name: lowered.get(site.name, widths[0]) for site in sites}
    return Mixture(tuple(sites), bits, drop, uniform, widths[0])


# --- how many steps ---------------------------------------------------------------------------------------------------


def _steps_to_size(sites: Sequence[SiteBits], steps: Sequence[Step], largest: int, max_bytes: int) -> int:
    """The fewest steps until the weights fit into the size that the rest of the model leaves."""
    total = sum(site.weights for site in sites) * largest
    taken = 0
    while total > 8 * max_bytes and taken < len(steps):
        total -= steps[taken].saved
        taken += 1
    if total > 8 * max_bytes:
        raise ConfigError(
            "The model does not fit into the size asked for",
            found=f"{total // 8:,} bytes of weights at the fewest bits, where the rest leaves {max(0, max_bytes):,}",
            expected="a size that the fewest bits reach",
            remedy=f"allow {total // 8 - max_bytes:,} bytes more",
        )
    return taken


def _bytes_beside(prepared: PreparedModel, sites: Sequence[SiteBits], bits: int) -> int:
    """Bytes of a saved model beside the weights chosen for, found by saving it with a rule for every layer."""
    rules = tuple(_rule(site.name, bits) for site in sites)
    prepared.config = replace(prepared.config, rules=(*prepared.config.rules, *rules))
    with tempfile.TemporaryDirectory() as folder:
        saved = save_quantized(convert_harmoq(prepared), Path(folder) / "uniform")
        return folder_bytes(saved) - sum(site.weights for site in sites) * bits // 8


def _steps_to_drop(
    bench: SensitivityBench,
    sites: Sequence[SiteBits],
    steps: Sequence[Step],
    uniform: float,
    max_drop: float,
    largest: int,
) -> tuple[int, float]:
    """The most steps whose measured loss is allowed, and that loss; by bisection, since it grows except for noise."""
    if uniform > max_drop:
        raise ConfigError(
            "The loss allowed is less than what the model loses at the largest width",
            found=f"{uniform:.3f} dB with all weights at {largest} bits",
            expected=f"at most {max_drop:g} dB",
            remedy="allow a larger loss, or more bits for activations (--act-bits)",
        )
    fits, breaks, loss = 0, len(steps) + 1, uniform
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        measured = bench.drop(bits_after(sites, steps[:middle]))
        if measured <= max_drop:
            fits, loss = middle, measured
        else:
            breaks = middle
    return fits, loss


# --- the model and its sites ------------------------------------------------------------------------------------------


def _calibrated_widths(
    model: Any, crops: Sequence[Tensor], config: HarmoqConfig, widths: Sequence[int], show_progress: bool | None
) -> dict[int, PreparedModel]:
    """The model calibrated at each width. Inputs are observed in float, so one pass over the images serves all."""
    observed = prepare_harmoq(model, replace(config, weight_bits=widths[0]))
    calibrate(observed, crops, show_progress=show_progress)
    candidates = {widths[0]: observed}
    for bits in widths[1:]:
        candidate = copy.deepcopy(observed)
        candidate.config = replace(config, weight_bits=bits)
        for module in candidate.sites():
            if module.site.kind == "linear" and module.own_weight is not None:
                weight = candidate.settings(module.site).weight
                module.attach(module.act_quantizer, module.new_weight_quantizer(weight))
                module.to(module.own_weight.device)
        compute_qparams(candidate, show_progress=show_progress)
        enable_fake_quant(candidate)
        candidates[bits] = candidate
    return candidates


def _free_sites(prepared: PreparedModel) -> list[str]:
    """Linear layers whose weights are quantized and whose bits no rule fixes."""
    fixed = [rule for rule in prepared.config.rules if rule.weight_bits is not None]

    def free(module: PreparedSite) -> bool:
        site = module.site
        return (
            site.kind == "linear"
            and module.weight_quantizer is not None
            and not any(rule.matches(site.name, site.kind) for rule in fixed)
        )

    names = [module.site.name for module in prepared.sites() if free(module)]
    if not names:
        raise ConfigError(
            "There is no linear layer to choose bits for",
            found="only layers that are float, or fixed by rules",
            expected="at least one quantized linear layer without a rule",
            remedy="remove a rule",
        )
    return names


def _rule(name: str, bits: int) -> SiteRule:
    """A rule for the layer of this name and no other."""
    return SiteRule(glob.escape(name), kind="linear", weight_bits=bits)


def _checked(
    max_drop: float | None, max_bytes: int | None, widths: Sequence[int], held_out: Sequence[Measured]
) -> tuple[int, ...]:
    if (max_drop is None) == (max_bytes is None):
        raise ConfigError("Exactly one of a loss and a size is needed", found=f"{max_drop=}, {max_bytes=}")
    if max_drop is not None and not 0 < max_drop < math.inf:
        raise ConfigError("The loss allowed is out of range", found=max_drop, expected="more than 0 dB")
    for bits in widths:
        check_bits(bits)
    if len(set(widths)) < 2 or max(widths) > 8:
        raise ConfigError("There are no widths to choose from", found=tuple(widths), expected="two or more of 2 to 8")
    if not held_out:
        raise CalibrationError(
            "There are no images to measure losses on",
            found="0 held-out crops",
            expected="at least one",
            remedy="give two photographs or more",
        )
    return tuple(sorted(set(widths), reverse=True))
