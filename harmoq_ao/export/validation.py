"""What every export needs first: a converted model, an image size that it takes, and the error for what fails."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.common.errors import ExportError
from harmoq_ao.conversion.model import QuantizedModel

DEFAULT_SIDE = 128
"""Height and width, in input pixels, of the images of a file for one size, unless another size is asked for."""


def check_exportable(quantized: object) -> None:
    """Raise ExportError unless this is a converted model on the CPU."""
    if not isinstance(quantized, QuantizedModel):
        raise ExportError(
            "Only quantized models are exported",
            found=type(quantized).__name__,
            expected="the result of convert_harmoq, or of load_quantized",
        )
    place = next((p.device for p in quantized.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if place.type != "cpu":
        raise ExportError("The model is not on the CPU", found=place, expected="cpu", remedy='model.to("cpu") first')


def example_for(quantized: QuantizedModel, size: tuple[int, int] | None) -> Tensor:
    """A random image batch `[1, C, H, W]`; by default of the smallest size from 128 x 128 on that the model takes.

    Raises:
        ExportError: The model does not take images of this size.
    """
    traits = quantized.traits
    multiple, least = max(1, traits.size_multiple), max(1, traits.size_minimum)
    if size is None:
        side = -(-max(DEFAULT_SIDE, least) // multiple) * multiple
        size = (side, side)
    if min(size) < least or any(side % multiple for side in size):
        raise ExportError(
            "The model does not take images of this size",
            found="{}x{}".format(*size),
            expected=f"sides of at least {least}" + (f", multiples of {multiple}" if multiple > 1 else ""),
            remedy="choose another --size",
        )
    return torch.rand(1, quantized.example_shapes[0][1], *size, generator=torch.Generator().manual_seed(0))


def failed(
    what: str, error: Exception, *, place: str = "", expected: str | None = None, remedy: str | None = None
) -> ExportError:
    """The error for whatever an author's forward, a translator or an archive may raise.

    Args:
        what: What cannot be done.
        error: Why.
        place: Where it happened, such as at which size.
        expected: What would have been accepted.
        remedy: What to do instead.
    """
    reason = " ".join(str(error).split())[:200]
    return ExportError(what, found=f"{place}{type(error).__name__}: {reason}", expected=expected, remedy=remedy)


RUN_IT_HERE = "run the quantized model itself"
"""Remedy where a format cannot express a model."""
UNTRACEABLE = "torch.export cannot take this model at this size"
