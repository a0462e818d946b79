"""From statistics to quantization parameters, and the switches of observers and fake-quantizers."""

from __future__ import annotations

import torch

from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.common.progress import track
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.model import PreparedModel


def compute_qparams(prepared: PreparedModel, *, show_progress: bool | None = None) -> None:
    """Compute every site's joint scale and quantization ranges from its observers, and switch the observers off.

    Args:
        prepared: Has observed images; changed in place.
        show_progress: Show a progress bar; by default where standard error is a terminal.

    Raises:
        CalibrationError: A site saw no data.
    """
    with torch.no_grad():
        for module in track(prepared.sites(), "Solving sites", show=show_progress):
            _check_observed(module)
            module.solve(prepared.settings(module.site), minmax=prepared.config.observer == "minmax")
    disable_observers(prepared)


def has_qparams(prepared: PreparedModel) -> bool:
    """Whether every static quantizer of the model has its quantization range."""
    return all(q.spec.dynamic or q.has_bounds for q in quantizers(prepared))


def enable_fake_quant(prepared: PreparedModel) -> None:
    """Switch simulated quantization on; computes the qparams first if images were observed and they are missing."""
    if not has_qparams(prepared):
        compute_qparams(prepared)
    for quantizer in quantizers(prepared):
        quantizer.enable_fake_quant()


def disable_fake_quant(prepared: PreparedModel) -> None:
    """Switch simulated quantization off: the float function again, bit for bit that of the original model."""
    for quantizer in quantizers(prepared):
        quantizer.disable_fake_quant()


def enable_observers(prepared: PreparedModel) -> None:
    """Switch the collection of statistics on."""
    for quantizer in quantizers(prepared):
        quantizer.enable_observer()


def disable_observers(prepared: PreparedModel) -> None:
    """Switch the collection of statistics off."""
    for quantizer in quantizers(prepared):
        quantizer.disable_observer()


def quantizers(prepared: PreparedModel) -> list[HarmoqFakeQuantize]:
    """The fake-quantizers of all sites, in execution order."""
    return [q for module in prepared.sites() for q in module.quantizers()]


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
