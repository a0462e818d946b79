"""Histograms of the operands of quantized sites on one picture, with their quantization ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.sites.quantized import ActivationOperand, QuantizedSite
from harmoq_ao.sites.report import SiteRow

BINS = 72


@dataclass(frozen=True)
class Histogram:
    """Values of one operand in its quantizer's domain: after the joint shift and scale.

    Args:
        operand: ``input``, or ``left`` and ``right`` of a product.
        counts: By bin, from `low` to `high`.
        low: Left edge of the first bin.
        high: Right edge of the last bin.
        quant_range: What values are clipped to; None where each token has its own.
        outside: Share of the values that lie more than half a step outside this range: rounding moves no others as far.
        bits: Of the quantizer.
    """

    operand: str
    counts: tuple[int, ...]
    low: float
    high: float
    quant_range: tuple[float, float] | None
    outside: float
    bits: int


@contextmanager
def recorded(model: QuantizedModel, names: Sequence[str]) -> Iterator[dict[str, list[Histogram]]]:
    """Context manager that records histograms of the operands of sites, by name, at the first call of each.

    Args:
        model: On the CPU, or on a GPU with kernels that run site by site: a fused kernel calls no site.
        names: Of quantized sites.
    """
    found: dict[str, list[Histogram]] = {}
    sites = model.sites()
    handles = [sites[name].register_forward_pre_hook(partial(_record, found, name)) for name in names if name in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def worst_sites(rows: Sequence[SiteRow], count: int) -> list[SiteRow]:
    """The quantized sites of the lowest signal-to-noise ratio, lowest first; sites without one are left out."""
    measured = [(row.sqnr_db, index) for index, row in enumerate(rows) if row.quantized and row.sqnr_db is not None]
    return [rows[index] for _, index in sorted(measured)[:count]]


def _record(found: dict[str, list[Histogram]], name: str, site: QuantizedSite, args: tuple[Any, ...]) -> None:
    if name not in found and args:
        found[name] = [_histogram(operand) for operand in site.activations(*args) if operand.spec.enabled]


def _histogram(operand: ActivationOperand) -> Histogram:
    flat = operand.values.detach().float().flatten()
    low, high = float(flat.min()), float(flat.max())
    quant_range, outside = None, 0.0
    if operand.qparams is not None:
        step, lower = float(operand.qparams.step), float(operand.qparams.lower)
        quant_range = (lower, lower + step * operand.spec.qmax)
        beyond = (flat < quant_range[0] - step / 2) | (flat > quant_range[1] + step / 2)
        outside = float(beyond.float().mean())
        low, high = min(low, quant_range[0]), max(high, quant_range[1])
    if high <= low:
        high = low + 1.0
    counts = torch.histc(flat, BINS, low, high)
    return Histogram(operand.name, tuple(int(c) for c in counts), low, high, quant_range, outside, operand.spec.bits)
