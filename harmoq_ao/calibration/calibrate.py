"""``calibrate``: run images through a prepared model, on one rank or several, then solve its sites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from harmoq_ao.calibration.solve import (
    compute_qparams,
    disable_fake_quant,
    enable_fake_quant,
    enable_observers,
    quantizers,
)
from harmoq_ao.common import distributed
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.common.progress import track
from harmoq_ao.images import check_image_tensor
from harmoq_ao.quant.observers.base import Call, OperandObserver
from harmoq_ao.sites.model import PreparedModel

_MAX_NESTING = 4  # containers around the image in what a loader yields


def calibrate(
    prepared: PreparedModel,
    data: Iterable[Any] | Dataset[Any],
    *,
    max_batches: int | None = None,
    show_progress: bool | None = None,
) -> PreparedModel:
    """Observe images, then compute joint scales and quantization ranges and switch fake-quantization on.

    Memory does not grow with the amount of data: each operand keeps its channel ranges and a sample of fixed size.

    Of several ranks (`common.distributed`) each is given the same data, observes its share, and computes the same
    ranges as a single process: samples are drawn from the whole stream, whichever rank observes it. Only histograms
    are merged approximately.

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
        InputError: A batch is not an image, not finite, or has the wrong number of channels.
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
    for the images of the others too, and holds only the rows that it saw; the number of values at each observer is
    counted once per image shape.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self._counted: dict[torch.Size, list[tuple[OperandObserver, list[Call]]]] = {}
        self._observers = [q.observer for q in quantizers(prepared) if q.observer is not None]
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
    check_image_tensor(image, channels=(prepared.example_shapes[0][1],), batched=True)
    return image
