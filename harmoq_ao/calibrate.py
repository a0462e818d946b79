"""Calibration: run images through a prepared model, then settle joint scales and bounds from what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.bounds import search_channel_bounds
from harmoq_ao.config import SiteSettings
from harmoq_ao.errors import CalibrationError
from harmoq_ao.fake_quant import HarmoqFakeQuantize
from harmoq_ao.harmonize import joint_scale, pair_scale, search_exponent
from harmoq_ao.modules.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul, PreparedSite
from harmoq_ao.observers import OperandObserver
from harmoq_ao.prepare import PreparedModel, wants_joint_scale
from harmoq_ao.progress import track
from harmoq_ao.quantizer import Scheme, dynamic_bounds_for, fake_quantize

_REPORT_ROWS = 512  # rows of the sample that the reported SQNR is measured on


def calibrate(
    prepared: PreparedModel,
    data: Iterable[Any],
    *,
    max_batches: int | None = None,
    show_progress: bool | None = None,
) -> PreparedModel:
    """Observe images, then settle joint scales and bounds and switch fake-quantization on.

    Memory does not grow with the amount of data: each operand keeps its channel ranges and a sample of fixed size.

    Args:
        prepared: From :func:`~harmoq_ao.prepare.prepare_harmoq`; changed in place.
        data: Low-resolution image batches `[B, C, H, W]` or images `[C, H, W]` in 0..1; of a tuple or a dictionary the
            first tensor counts.
        max_batches: Stop after this many.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        The same prepared model.

    Raises:
        CalibrationError: No data, or a site that no image reached.
        InputError: A batch is no image, or not finite.
    """
    disable_fake_quant(prepared)
    enable_observers(prepared)
    device = next((p.device for p in prepared.parameters()), torch.device("cpu"))
    seen = 0
    with torch.no_grad():
        for batch in track(data, "Calibrating", total=max_batches, show=show_progress):
            prepared(image_of(batch).to(device))
            seen += 1
            if max_batches is not None and seen >= max_batches:
                break
    if seen == 0:
        raise CalibrationError("No calibration images", found="an empty iterable", expected="at least one image batch")
    compute_qparams(prepared, show_progress=show_progress)
    enable_fake_quant(prepared)
    return prepared


def image_of(batch: Any) -> Tensor:
    """The image batch `[B, C, H, W]` in whatever a loader yields."""
    if isinstance(batch, dict):
        batch = next((v for v in batch.values() if isinstance(v, Tensor)), batch)
    if isinstance(batch, (tuple, list)) and batch:
        return image_of(batch[0])
    if not isinstance(batch, Tensor):
        raise CalibrationError(
            "Calibration data holds no tensor",
            found=type(batch).__name__,
            expected="an image batch [B, C, H, W] in 0..1, or a tuple or dictionary whose first tensor is one",
        )
    return batch.unsqueeze(0) if batch.dim() == 3 else batch


def compute_qparams(prepared: PreparedModel, *, show_progress: bool | None = None) -> None:
    """Settle every site's joint scale and bounds from its observers, and switch the observers off.

    Raises:
        CalibrationError: A site saw no data.
    """
    with torch.no_grad():
        for module in track(prepared.sites(), "Solving sites", show=show_progress):
            _check_observed(module)
            settings = prepared.settings(module.site)
            if isinstance(module, PreparedLinear):
                _solve_linear(module, settings, prepared.config.observer == "minmax")
            elif isinstance(module, PreparedConv2d):
                _solve_conv(module, prepared.config.observer == "minmax")
            elif isinstance(module, PreparedMatmul):
                _solve_matmul(module, settings)
    disable_observers(prepared)


def has_qparams(prepared: PreparedModel) -> bool:
    """Whether every quantizer of the model knows its bounds."""
    return all(q.spec.dynamic or q.has_bounds for q in _quantizers(prepared))


def enable_fake_quant(prepared: PreparedModel) -> None:
    """Simulate quantization from now on; settles bounds first if images were observed but nothing settled yet."""
    if not has_qparams(prepared):
        compute_qparams(prepared)
    for quantizer in _quantizers(prepared):
        quantizer.enable_fake_quant()


def disable_fake_quant(prepared: PreparedModel) -> None:
    """Compute the float function from now on, bit for bit that of the original model."""
    for quantizer in _quantizers(prepared):
        quantizer.disable_fake_quant()


def enable_observers(prepared: PreparedModel) -> None:
    """Collect statistics from now on."""
    for quantizer in _quantizers(prepared):
        quantizer.enable_observer()


def disable_observers(prepared: PreparedModel) -> None:
    """Stop collecting statistics."""
    for quantizer in _quantizers(prepared):
        quantizer.disable_observer()


def _quantizers(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    return [q for module in prepared.sites() for q in module.quantizers()]


def _observer(quantizer: HarmoqFakeQuantize | None) -> OperandObserver | None:
    return None if quantizer is None else quantizer.observer


def _check_observed(module: PreparedSite) -> None:
    for quantizer in module.quantizers():
        observer = quantizer.observer
        if observer is not None and observer.rows_seen == 0:
            raise CalibrationError(
                f"{module.site.name} saw no calibration data",
                found="a site without statistics",
                expected="images that reach every site",
                remedy="call calibrate(prepared, data), or run images through the prepared model, before converting",
            )


# --- one site ---------------------------------------------------------------------------------------------------------


def _solve_linear(module: PreparedLinear, settings: SiteSettings, minmax: bool) -> None:
    weight = module.weight.detach().float()
    observer = _observer(module.left)
    scale = None
    if wants_joint_scale(module.site, settings) and observer is not None:
        scale = _linear_scale(weight, observer, settings)
    module.set_joint_scale(scale)
    _settle_activation(module.left, observer, scale)
    scaled = weight if scale is None else weight * scale
    if module.right is not None:
        moment = None if observer is None else observer.second_moment()
        if moment is not None and scale is not None:
            moment = moment / scale.square()
        _settle_weight(module.right, scaled, moment, minmax)
    module.site.sqnr_db = _linear_sqnr(module, weight, scale)


def _linear_scale(weight: Tensor, observer: OperandObserver, settings: SiteSettings) -> Tensor:
    ranges = observer.channel_range()
    if ranges is None:
        return torch.ones(weight.shape[1])
    range_x, range_w = ranges[1] - ranges[0], weight.amax(0) - weight.amin(0)
    if settings.joint_scale == "search":
        sample = observer.sample()
        chosen = search_exponent(sample, weight, settings.act, settings.weight, range_x=range_x, range_w=range_w)
        return chosen.scale
    return joint_scale(range_x, range_w, settings.act.bits, settings.weight.bits)


def _settle_activation(quantizer: HarmoqFakeQuantize | None, observer: OperandObserver | None, scale: Any) -> None:
    if quantizer is not None and observer is not None and not quantizer.spec.dynamic:
        quantizer.set_bounds(*observer.bounds(scale))


def _settle_weight(quantizer: HarmoqFakeQuantize, weight: Tensor, importance: Tensor | None, minmax: bool) -> None:
    rows = weight.flatten(1)
    if minmax:
        hi = rows.abs().amax(1, keepdim=True)
        lo = -hi
    else:  # weights are symmetric; a scheme with a zero level snaps the result
        lo, hi = search_channel_bounds(rows, replace(quantizer.spec, scheme=Scheme.SYMMETRIC), importance)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    quantizer.set_bounds(lo.reshape(shape), hi.reshape(shape))


def _solve_conv(module: PreparedConv2d, minmax: bool) -> None:
    _settle_activation(module.left, _observer(module.left), None)
    if module.right is not None:
        _settle_weight(module.right, module.weight.detach().float(), None, minmax)


def _solve_matmul(module: PreparedMatmul, settings: SiteSettings) -> None:
    left, right = _observer(module.left), _observer(module.right)
    scale = None
    if wants_joint_scale(module.site, settings) and left is not None and right is not None:
        scale = _pair_scale(left, right, settings, module.site.shape[0])
    module.set_joint_scale(scale)
    _settle_activation(module.left, left, scale)
    _settle_activation(module.right, right, None if scale is None else 1.0 / scale)
    noise = [
        10 ** (-_operand_sqnr(q, q.observer, s) / 10)
        for q, s in ((module.left, scale), (module.right, None if scale is None else 1.0 / scale))
        if q is not None and q.observer is not None
    ]
    module.site.sqnr_db = -10 * math.log10(max(sum(noise), 1e-30)) if noise else None


def _pair_scale(left: OperandObserver, right: OperandObserver, settings: SiteSettings, length: int) -> Tensor:
    ranges = left.channel_range(), right.channel_range()
    if ranges[0] is None or ranges[1] is None:
        return torch.ones(length)
    range_q, range_k = (hi - lo for lo, hi in ranges)
    return pair_scale(range_q, range_k, settings.act.bits, settings.weight.bits)


# --- what the report says ---------------------------------------------------------------------------------------------


def _linear_sqnr(module: PreparedLinear, weight: Tensor, scale: Tensor | None) -> float | None:
    """SQNR of ``W x`` over the sample, in dB; None without a sample of rows."""
    observer = _observer(module.left)
    if observer is None or not observer.tracks_channels or not module.quantizers():
        return None
    x = observer.sample()[:_REPORT_ROWS].float()
    exact = x @ weight.T
    rounded = _rounded(module.left, x, scale)
    inverse = None if scale is None else 1.0 / scale
    return _ratio_db(exact, rounded @ _rounded(module.right, weight, inverse).T)


def _operand_sqnr(quantizer: HarmoqFakeQuantize, observer: OperandObserver | None, scale: Tensor | None) -> float:
    assert observer is not None
    x = observer.sample()[: _REPORT_ROWS * 64].float()
    usable = scale if x.dim() == 2 else None
    scaled = x if usable is None else x / usable
    return _ratio_db(scaled, _rounded(quantizer, x, usable))


def _rounded(quantizer: HarmoqFakeQuantize | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """`x / scale` through the quantizer's levels, contracted axis last, whatever its switches."""
    if quantizer is None:
        return x if scale is None else x / scale
    spec = quantizer.spec
    if spec.dynamic:
        lo, hi = dynamic_bounds_for(x, replace(spec, axis=-1), scale)
    else:
        lo, hi = quantizer.bounds()
    return fake_quantize(x, lo, hi, spec.bits, scale)


def _ratio_db(signal: Tensor, approximation: Tensor) -> float:
    noise = float((signal - approximation).double().square().mean())
    return 10 * math.log10(max(float(signal.double().square().mean()), 1e-30) / max(noise, 1e-30))
