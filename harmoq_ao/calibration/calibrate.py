"""Calibration: run images through a prepared model, then settle joint scales and bounds from what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from harmoq_ao.common import distributed
from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.common.progress import track
from harmoq_ao.config import SiteSettings
from harmoq_ao.images import check_image_tensor
from harmoq_ao.quant.bounds import weight_bounds
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.joint_scale import joint_scale, pair_scale, search_exponent
from harmoq_ao.quant.joint_shift import joint_shift
from harmoq_ao.quant.observers import Call, OperandObserver
from harmoq_ao.quant.quantizer import dynamic_bounds_for, fake_quantize
from harmoq_ao.sites.model import PreparedModel, wants_joint_scale, wants_joint_shift
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear, PreparedMatmul, PreparedSite

_REPORT_ROWS = 512  # rows of the sample that the reported SQNR is measured on
_MAX_NESTING = 4  # containers around the image in what a loader yields


def calibrate(
    prepared: PreparedModel,
    data: Iterable[Any] | Dataset[Any],
    *,
    max_batches: int | None = None,
    show_progress: bool | None = None,
) -> PreparedModel:
    """Observe images, then settle joint scales and bounds and switch fake-quantization on.

    Memory does not grow with the amount of data: each operand keeps its channel ranges and a sample of fixed size.

    Of several ranks (`common.distributed`) each is given the same data, observes its share, and settles the same
    bounds as a single process: the samples are drawn from the whole stream, whoever observes it. Only histograms are
    added up approximately.

    Args:
        prepared: From :func:`prepare_harmoq`; changed in place.
        data: Low-resolution image batches `[B, C, H, W]` or images `[C, H, W]` in 0..1; of a tuple or a dictionary the
            first tensor counts. They are brought to the device and the float type of the model.
        max_batches: Stop after this many; None takes all.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Returns:
        The same prepared model.

    Raises:
        CalibrationError: No data, or a site that no image reached.
        InputError: A batch is no image, not finite, or of another number of channels.
        RankLostError: Another rank did not finish its share.
    """
    _check_arguments(prepared, data, max_batches)
    disable_fake_quant(prepared)
    enable_observers(prepared)
    like = next((p for p in prepared.parameters() if p.is_floating_point()), torch.empty(0))
    shares = _Shares(prepared)
    seen = 0
    with torch.no_grad():
        for batch in track(cast(Iterable[Any], data), "Calibrating", total=max_batches, show=show_progress):
            shares.observe(seen, _checked_image(batch, prepared).to(like))
            seen += 1
            if max_batches is not None and seen >= max_batches:
                break
        shares.merge()
    if seen == 0:
        raise CalibrationError("No calibration images", found="an empty iterable", expected="at least one image batch")
    compute_qparams(prepared, show_progress=show_progress)
    enable_fake_quant(prepared)
    return prepared


class _Shares:
    """One calibration run over the ranks.

    What enters an observer's random sample depends on how many values it meets, not on the values. So each rank draws
    for the images of the others too, and holds only those rows that it saw; how many values an image has at each
    observer is counted once for each shape of images.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self._counted: dict[torch.Size, list[tuple[OperandObserver, list[Call]]]] = {}
        self._observers = [q.observer for q in _quantizers(prepared) if q.observer is not None]
        if distributed.is_distributed():
            for observer in self._observers:
                observer.begin_share()

    def observe(self, index: int, image: Tensor) -> None:
        """Observe an image batch `[B, C, H, W]`, or note that another rank does."""
        with distributed.own_share():
            if distributed.is_mine(index):
                self.prepared(image)
                return
            if image.shape not in self._counted:
                self._counted[image.shape] = self._count(image)
        for observer, calls in self._counted[image.shape]:
            for call in calls:
                observer.pass_over(call)

    def merge(self) -> None:
        """Give every rank the statistics of all."""
        if distributed.is_distributed():
            for observer in self._observers:
                observer.merge()

    def _count(self, image: Tensor) -> list[tuple[OperandObserver, list[Call]]]:
        noted: list[tuple[OperandObserver, list[Call]]] = [(observer, []) for observer in self._observers]
        try:
            for observer, calls in noted:
                observer.calls = calls
            self.prepared(image)
        finally:
            for observer, _ in noted:
                observer.calls = None
        return noted


def image_of(batch: Any) -> Tensor:
    """The image batch `[B, C, H, W]` in whatever a loader yields."""
    image = _first_tensor(batch)
    if image is None:
        raise CalibrationError(
            "Calibration data holds no tensor",
            found=type(batch).__name__,
            expected="an image batch [B, C, H, W] in 0..1, or a tuple or dictionary whose first tensor is one",
        )
    return image.unsqueeze(0) if image.dim() == 3 else image


def _first_tensor(batch: Any, depth: int = 0) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    if depth == _MAX_NESTING:
        return None
    return next((t for t in (_first_tensor(e, depth + 1) for e in entries) if t is not None), None)


def _check_arguments(prepared: Any, data: Any, max_batches: int | None) -> None:
    if not isinstance(prepared, PreparedModel):
        raise CalibrationError(
            "calibrate takes a prepared model",
            found=type(prepared).__name__,
            expected="the result of prepare_harmoq",
            remedy="call prepare_harmoq first",
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise CalibrationError(
            "Calibration data cannot be iterated over", found=type(data).__name__, expected="an iterable of images"
        )
    if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
        raise ConfigError("max_batches must be positive", found=repr(max_batches), expected="1 or more, or None")


def _checked_image(batch: Any, prepared: PreparedModel) -> Tensor:
    image = image_of(batch)
    check_image_tensor(image)
    channels = prepared.example_shapes[0][1]
    if image.shape[1] != channels:
        raise InputError(
            "The calibration images have another number of channels than the model takes",
            found=tuple(image.shape),
            expected=f"[B, {channels}, H, W]",
        )
    return image


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
    observer = _observer(module.act_quantizer)
    scale = None
    if wants_joint_scale(module.site, settings) and observer is not None:
        scale = _linear_scale(weight, observer, settings)
    module.set_joint_scale(scale)
    shift = None
    if wants_joint_shift(module.site, settings) and observer is not None and scale is not None:
        shift = _linear_shift(weight, observer, scale, settings)
    module.set_joint_shift(shift)
    _settle_activation(module.act_quantizer, observer, scale, shift)
    scaled = weight if scale is None else weight * scale
    if module.weight_quantizer is not None:
        moment = None if observer is None else observer.second_moment(shift)
        if moment is not None and scale is not None:
            moment = moment / scale.square()
        _settle_weight(module.weight_quantizer, scaled, moment, minmax)
    module.site.sqnr_db = _rounded_db(_linear_sqnr(module, weight, scale))


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


def _linear_shift(weight: Tensor, observer: OperandObserver, scale: Tensor, settings: SiteSettings) -> Tensor:
    ranges = observer.channel_range()
    if ranges is None:
        return torch.zeros(weight.shape[1])
    return joint_shift(observer.sample(), weight, scale, ranges, settings.act)


def _settle_activation(
    quantizer: HarmoqFakeQuantize | None, observer: OperandObserver | None, scale: Any, shift: Any = None
) -> None:
    if quantizer is not None and observer is not None and not quantizer.spec.dynamic:
        quantizer.set_bounds(*observer.bounds(scale, shift))


def _settle_weight(quantizer: HarmoqFakeQuantize, weight: Tensor, importance: Tensor | None, minmax: bool) -> None:
    lo, hi = weight_bounds(weight.flatten(1), quantizer.spec, importance, minmax=minmax)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    quantizer.set_bounds(lo.reshape(shape), hi.reshape(shape))


def _solve_conv(module: PreparedConv2d, minmax: bool) -> None:
    _settle_activation(module.act_quantizer, _observer(module.act_quantizer), None)
    if module.weight_quantizer is not None:
        _settle_weight(module.weight_quantizer, module.weight.detach().float(), None, minmax)


def _solve_matmul(module: PreparedMatmul, settings: SiteSettings) -> None:
    left, right = _observer(module.act_quantizer), _observer(module.weight_quantizer)
    scale = None
    if wants_joint_scale(module.site, settings) and left is not None and right is not None:
        scale = _pair_scale(left, right, settings, module.site.shape[0])
    module.set_joint_scale(scale)
    if module.relative and module.act_quantizer is not None:
        module.act_quantizer.set_bounds(0.0, 1.0)  # the largest entry of every row is the highest level
    else:
        _settle_activation(module.act_quantizer, left, scale)
    _settle_activation(module.weight_quantizer, right, None if scale is None else 1.0 / scale)
    noise = [
        10 ** (-_operand_sqnr(q, q.observer, s) / 10)
        for q, s in ((module.act_quantizer, scale), (module.weight_quantizer, None if scale is None else 1.0 / scale))
        if q is not None and q.observer is not None
    ]
    module.site.sqnr_db = _rounded_db(-10 * math.log10(max(sum(noise), 1e-30)) if noise else None)


def _pair_scale(left: OperandObserver, right: OperandObserver, settings: SiteSettings, length: int) -> Tensor:
    range_q, range_k = left.channel_range(), right.channel_range()
    if range_q is None or range_k is None:
        return torch.ones(length)
    widths = range_q[1] - range_q[0], range_k[1] - range_k[0]
    return pair_scale(*widths, settings.act.bits, settings.weight.bits)


def _keeps_rows(observer: OperandObserver) -> bool:
    """Whether the sample is of whole rows `[R, K]`; that of a histogram is of values."""
    return observer.tracks_channels and observer.sample().dim() == 2


# --- what the report says ---------------------------------------------------------------------------------------------


def _linear_sqnr(module: PreparedLinear, weight: Tensor, scale: Tensor | None) -> float | None:
    """SQNR of ``W x`` over the sample, in dB; None without a sample of rows."""
    observer = _observer(module.act_quantizer)
    if observer is None or not _keeps_rows(observer) or not module.quantizers():
        return None
    x = observer.sample()[:_REPORT_ROWS].float()
    exact = x @ weight.T
    shift = module.joint_shift
    rounded = _rounded(module.act_quantizer, x, scale, shift)
    inverse = None if scale is None else 1.0 / scale
    constant = 0.0 if shift is None else weight @ shift
    return _ratio_db(exact, rounded @ _rounded(module.weight_quantizer, weight, inverse).T + constant)


def _operand_sqnr(quantizer: HarmoqFakeQuantize, observer: OperandObserver | None, scale: Tensor | None) -> float:
    assert observer is not None
    x = observer.sample()[: _REPORT_ROWS * 64].float()
    usable = scale if x.dim() == 2 else None
    scaled = x if usable is None else x / usable
    return _ratio_db(scaled, _rounded(quantizer, x, usable))


def _rounded(
    quantizer: HarmoqFakeQuantize | None, x: Tensor, scale: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """`(x - shift) / scale` through the quantizer's levels, contracted axis last, whatever its switches."""
    if quantizer is None:
        x = x if shift is None else x - shift
        return x if scale is None else x / scale
    spec = quantizer.spec
    if spec.dynamic:
        lo, hi = dynamic_bounds_for(x, replace(spec, axis=-1), scale)
    else:
        lo, hi = quantizer.bounds()
    return fake_quantize(x, lo, hi, spec.bits, scale, shift)


def _ratio_db(signal: Tensor, approximation: Tensor) -> float:
    noise = float((signal - approximation).double().square().mean())
    return 10 * math.log10(max(float(signal.double().square().mean()), 1e-30) / max(noise, 1e-30))


def _rounded_db(value: float | None) -> float | None:
    """What the report says, and a saved model holds."""
    return None if value is None else round(value, 2)
