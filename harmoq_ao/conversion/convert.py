"""``convert_harmoq``: a calibrated model becomes one that holds integer codes and computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.conversion.storage import round_float_state, rounding
from harmoq_ao.preparation.swap import replace_modules
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.quantized import QuantizedSite


def convert_harmoq(prepared: PreparedModel, *, float_dtype: torch.dtype = torch.float32) -> QuantizedModel:
    """Turn a calibrated model into an integer one. The prepared model is left as it is.

    Weights become packed codes; their float originals are gone. Parameters that stay float are rounded to what a saved
    model stores, so that a model that was saved and loaded computes the same bits.

    Args:
        prepared: A prepared model whose quantization parameters are computed, as :func:`calibrate` does.
        float_dtype: Type of the parts that stay float, ``torch.float32`` or ``torch.bfloat16``.

    Raises:
        CalibrationError: A quantizer has no quantization parameters.
        ConfigError: Another float type.
    """
    if not isinstance(prepared, PreparedModel):
        raise CalibrationError(
            "convert_harmoq takes a prepared model",
            found=type(prepared).__name__,
            expected="the result of prepare_harmoq, calibrated",
        )
    _check_qparams(prepared)
    rows = prepared.report().rows
    model = _detached_copy(prepared)
    round_float_state(model, prepared.config.storage_dtype)
    stored = rounding(prepared.config.storage_dtype)
    place = next((p.device for p in prepared.parameters()), None)
    replace_sites(model, lambda site: site.to_quantized(prepared.settings(site.site), stored).to(place))
    quantized = QuantizedModel(model, prepared.config, rows, prepared.example_shapes, prepared.traits).eval()
    quantized.history = prepared.history
    quantized.fingerprint = prepared.fingerprint
    if float_dtype is not torch.float32:
        return quantized.set_float_dtype(float_dtype)
    quantized.finalize()
    return quantized


def _check_qparams(prepared: PreparedModel) -> None:
    quantizers = [(m.site.name, q) for m in prepared.sites() for q in m.quantizers() if not q.spec.dynamic]
    missing = [name for name, quantizer in quantizers if not quantizer.has_bounds]
    if missing:
        raise CalibrationError(
            "The prepared model has no quantization parameters (qparams)",
            found=f"{len(missing)} of {len(quantizers)} quantizers without, first at {missing[0]}",
            remedy="call calibrate(prepared, data), or compute_qparams(prepared) once images ran through it by hand",
        )


def replace_sites(
    model: nn.Module,
    make: Callable[[PreparedSite], QuantizedSite],
    wanted: Callable[[PreparedSite], bool] = lambda site: bool(site.quantizers()),
) -> None:
    """Put a quantized module at every prepared site that is quantized; release float weights that nothing else reads.

    Args:
        model: Changed in place.
        make: The quantized module of a site.
        wanted: Whether a site is quantized; by default those that have a quantizer.
    """
    shared: list[Tensor] = []
    swaps: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if not isinstance(module, PreparedSite) or not wanted(module):
            continue
        made = make(module)
        if module.site.is_functional and module.own_weight is not None and made.settings.weight.enabled:
            shared.append(module.own_weight)
        swaps[module] = made
    replace_modules(model, swaps)
    _release(model, shared)


def _detached_copy(prepared: PreparedModel) -> nn.Module:
    """A copy of the inner model without the observers' samples."""
    observers = []
    for module in prepared.sites():
        for quantizer in module.quantizers():
            observers.append((quantizer, quantizer.observer))
            quantizer.observer = None
    try:
        model = copy.deepcopy(prepared.model)
    finally:
        for quantizer, observer in observers:
            quantizer.observer = observer
    return model


def _release(model: nn.Module, weights: list[Tensor]) -> None:
    """Replace float weights that quantized functional calls shared with their owner by a shape without memory."""
    gone = {id(w) for w in weights}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in gone:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
