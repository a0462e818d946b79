"""Bits by need: each linear gets the fewest weight bits that the image can bear.

Activations keep their width: a product of 8-bit and 4-bit codes runs as fast as one of two 8-bit codes, so what few
bits buy is memory, and weights bear them best.

To first order the errors of sites add up at the output: with site `i` alone at `b` bits, its error
``delta_i(b) = mean (y_ib - y)^2`` over luma, and against a reference that float misses by `m`, the network loses
``10 log10(1 + sum_i delta_i(b_i) / m)`` dB. Each site's ``10 log10(1 + delta_i(b) / m)`` is its sensitivity. Steps down
the lower convex hulls of (bits, sensitivity), cheapest decibel per bit first, are the solutions of the relaxed
knapsack; how many of them to take is not predicted but measured, with all chosen sites rounded at once.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from harmoq_ao.calibration.calibrate import calibrate, compute_qparams, enable_fake_quant
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.common.progress import track
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.convert import convert_harmoq
from harmoq_ao.conversion.save import folder_bytes, save_quantized
from harmoq_ao.images import luma
from harmoq_ao.preparation.prepare import prepare_harmoq
from harmoq_ao.quant.quantizer import check_bits
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import PreparedModel, weight_quantizer
from harmoq_ao.sites.prepared import PreparedLinear, PreparedSite, quiet

WIDTHS = (8, 4, 3, 2)
"""Widths that the low-bit kernels read; others are stored as tightly, but have no fused kernel."""

_LEAST = 1e-12  # of a squared error: what float64 can tell from none


@dataclass(frozen=True)
class Measured:
    """What sensitivities are measured on.

    Args:
        image: Low-resolution crop `[C, H, W]` in 0..1.
        reference: The same at high resolution, `[C, sH, sW]`.
    """

    image: Tensor
    reference: Tensor


@dataclass(frozen=True)
class SiteBits:
    """One site that may take fewer bits.

    Args:
        name: Site name.
        weights: Number of weights.
        sensitivity_db: Loss in dB at each width, with this site alone rounded.
    """

    name: str
    weights: int
    sensitivity_db: dict[int, float]


@dataclass(frozen=True)
class Step:
    """One site goes down to fewer bits.

    Args:
        site: Index of the site.
        bits: Its new width.
        saved: Bits of storage that this saves.
        loss_db: Predicted loss.
    """

    site: int
    bits: int
    saved: int
    loss_db: float


@dataclass(frozen=True)
class Mixture:
    """What was chosen, and what for.

    Args:
        sites: The sites chosen for, with their sensitivities.
        bits: Width of each, by name.
        drop_db: Measured loss against float with all of the model quantized so, in dB on the held-out crops.
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
        """As rules for a configuration, one for each site below the largest width."""
        return tuple(_rule(name, bits) for name, bits in self.bits.items() if bits != self.largest)

    def recorded(self, history: History | None) -> History:
        """A history that tells the choice, to be saved with the model."""
        costs = {site.name: float(f"{site.sensitivity_db[self.bits[site.name]]:.3g}") for site in self.sites}
        return replace(history or History(), choice=self.describe(), sensitivities=costs)

    def describe(self) -> str:
        """Bits before and after, how many sites have which, and the loss."""
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
    """Choose the weight bits of every linear that no rule of the configuration has fixed.

    Args:
        model: As for :func:`prepare_harmoq`.
        crops: Low-resolution images to calibrate on.
        held_out: Images of one size to measure on, of photographs that were not calibrated on.
        config: Everything but the weight bits; the rules of the result are to be appended to its own.
        max_drop: Most that the model may lose against float, in dB of luma.
        max_bytes: Size of the saved model, instead of `max_drop`.
        widths: Widths to choose from.
        show_progress: Show progress bars; by default where standard error is a terminal.

    Raises:
        ConfigError: Not exactly one aim, an aim that cannot be reached, or nothing to choose for.
        CalibrationError: No images to measure on.
    """
    widths = _checked(max_drop, max_bytes, widths, held_out)
    candidates = _calibrated_widths(model, crops, config, widths, show_progress)
    board = _Board(candidates, _free_sites(candidates[widths[0]]), held_out)
    sites = board.sensitivities(widths, show_progress)
    steps = cheapest_steps(sites, widths)
    uniform = board.drop({})
    if max_bytes is not None:
        taken = _steps_to_size(
            sites, steps, widths[0], max_bytes - _bytes_beside(copy.deepcopy(candidates[widths[0]]), sites, widths[0])
        )
        drop = board.drop(bits_after(sites, steps[:taken])) if taken else uniform
    else:
        assert max_drop is not None
        taken, drop = _steps_to_drop(board, sites, steps, uniform, max_drop, widths[0])
    lowered = bits_after(sites, steps[:taken])
    bits = {site.name: lowered.get(site.name, widths[0]) for site in sites}
    return Mixture(tuple(sites), bits, drop, uniform, widths[0])


def cheapest_steps(sites: Sequence[SiteBits], widths: Sequence[int]) -> list[Step]:
    """Steps down every site's lower convex hull, in the order of predicted loss per saved bit.

    A prefix of them is a choice of bits that no other choice beats in both predicted loss and size.

    Args:
        sites: Sites and sensitivities.
        widths: Widths to choose from; the largest is where every site starts.
    """
    steps = [step for index, site in enumerate(sites) for step in _hull(index, site, sorted(widths, reverse=True))]
    return sorted(steps, key=lambda step: (step.loss_db / step.saved, step.site, -step.bits))


def bits_after(sites: Sequence[SiteBits], steps: Sequence[Step]) -> dict[str, int]:
    """Width of every site that went down, by name."""
    return {sites[step.site].name: step.bits for step in steps}


def _hull(index: int, site: SiteBits, widths: Sequence[int]) -> list[Step]:
    """From each corner of the hull the step of the least slope leads to the next."""
    steps, at = [], 0
    while at < len(widths) - 1:
        options = [_step(index, site, widths[at], bits) for bits in widths[at + 1 :]]
        slopes = [option.loss_db / option.saved for option in options]
        best = max(i for i, slope in enumerate(slopes) if slope == min(slopes))
        steps.append(options[best])
        at += best + 1
    return steps


def _step(index: int, site: SiteBits, before: int, after: int) -> Step:
    loss = site.sensitivity_db[after] - site.sensitivity_db[before]
    return Step(index, after, (before - after) * site.weights, loss)


# --- how many steps ---------------------------------------------------------------------------------------------------


def _steps_to_size(sites: Sequence[SiteBits], steps: Sequence[Step], largest: int, max_bytes: int) -> int:
    """The fewest steps until the weights fit in what the rest leaves of the size."""
    total = sum(site.weights for site in sites) * largest
    taken = 0
    while total > 8 * max_bytes and taken < len(steps):
        total -= steps[taken].saved
        taken += 1
    if total > 8 * max_bytes:
        raise ConfigError(
            "The model does not fit in the size asked for",
            found=f"{total // 8:,} bytes of weights at the fewest bits, where the rest leaves {max(0, max_bytes):,}",
            expected="a size that the fewest bits reach",
            remedy=f"allow {total // 8 - max_bytes:,} bytes more",
        )
    return taken


def _bytes_beside(prepared: PreparedModel, sites: Sequence[SiteBits], bits: int) -> int:
    """Bytes of a saved model that are not the weights chosen for, found by saving it with a rule for every site."""
    rules = tuple(_rule(site.name, bits) for site in sites)
    prepared.config = replace(prepared.config, rules=(*prepared.config.rules, *rules))
    with tempfile.TemporaryDirectory() as folder:
        saved = save_quantized(convert_harmoq(prepared), Path(folder) / "uniform")
        return folder_bytes(saved) - sum(site.weights for site in sites) * bits // 8


def _steps_to_drop(
    board: _Board, sites: Sequence[SiteBits], steps: Sequence[Step], uniform: float, max_drop: float, largest: int
) -> tuple[int, float]:
    """The most steps whose measured loss is allowed, and that loss; by bisection, as it grows but for noise."""
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
        measured = board.drop(bits_after(sites, steps[:middle]))
        if measured <= max_drop:
            fits, loss = middle, measured
        else:
            breaks = middle
    return fits, loss


# --- measuring --------------------------------------------------------------------------------------------------------


class _Board:
    """A model whose sites are exchanged one by one for those of the same model at other widths.

    Args:
        candidates: The model calibrated at each width.
        names: Sites to choose for, in execution order.
        held_out: What losses are measured on.
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
        """Every site alone at every width, the others in float."""
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
        """Mean loss of PSNR against float in dB, with the whole model quantized."""
        for name in self._own:
            self._place(name, lowered.get(name, self.largest))
        errors = [_mse(y, reference) for y, reference in zip(self._outputs(), self._references, strict=True)]
        return _mean_db(max(e, _LEAST) / m for e, m in zip(errors, self._misses, strict=True))

    def _estimated_drop(self) -> float:
        """Mean of ``10 log10(1 + delta / m)``: of the error against float, which no chance correlation can hide."""
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


def _calibrated_widths(
    model: Any, crops: Sequence[Tensor], config: HarmoqConfig, widths: Sequence[int], show_progress: bool | None
) -> dict[int, PreparedModel]:
    """One pass over the images serves all widths: inputs are observed in float."""
    observed = prepare_harmoq(model, replace(config, weight_bits=widths[0]))
    calibrate(observed, crops, show_progress=show_progress)
    candidates = {widths[0]: observed}
    for bits in widths[1:]:
        candidate = copy.deepcopy(observed)
        candidate.config = replace(config, weight_bits=bits)
        for module in candidate.sites():
            if isinstance(module, PreparedLinear):
                module.attach(
                    module.act_quantizer, weight_quantizer(module.site, candidate.settings(module.site).weight)
                )
                module.to(module.weight.device)
        compute_qparams(candidate, show_progress=show_progress)
        enable_fake_quant(candidate)
        candidates[bits] = candidate
    return candidates


def _free_sites(prepared: PreparedModel) -> list[str]:
    """Linears whose weights are quantized and whose bits no rule fixes."""
    fixed = [rule for rule in prepared.config.rules if rule.weight_bits is not None]

    def free(module: PreparedSite) -> bool:
        site = module.site
        return (
            isinstance(module, PreparedLinear)
            and module.weight_quantizer is not None
            and not any(rule.matches(site.name, site.kind) for rule in fixed)
        )

    names = [module.site.name for module in prepared.sites() if free(module)]
    if not names:
        raise ConfigError(
            "There is no linear to choose bits for",
            found="linears that are float, or fixed by rules",
            expected="at least one quantized linear without a rule",
            remedy="remove a rule",
        )
    return names


def _rule(name: str, bits: int) -> SiteRule:
    """A rule for the site of this name and no other."""
    literal = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    return SiteRule(literal, kind="linear", weight_bits=bits)


def _checked(
    max_drop: float | None, max_bytes: int | None, widths: Sequence[int], held_out: Sequence[Measured]
) -> tuple[int, ...]:
    if (max_drop is None) == (max_bytes is None):
        raise ConfigError("One aim is needed", found=f"{max_drop=}, {max_bytes=}", expected="a loss or a size")
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
