"""From a quantized model to one flat program of quantize and dequantize operators, which file formats translate.

The number of images is free where the author's code allows it (`batch.py`), height and width where its graph holds for
every multiple of the windows. What does not depend on the image is computed once, but for what would take more memory
than it is computed from: a mask for every window plus a bias for every head stays a sum.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from harmoq_ao.common.errors import HarmoqError
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.batch import PAIR, BatchError, free_batch
from harmoq_ao.export.onnx_sites import rewrite_sites, without_rounding  # registers the operators, too
from harmoq_ao.export.validation import RUN_IT_HERE, UNTRACEABLE, check_exportable, example_for, failed
from harmoq_ao.runtime.fixed_size import SingleInput, float32_copy, fold_constants

_DOUBLINGS = 7  # windows of up to 64 times what a model demands
_TOLERANCE = 1e-3  # against the same operators, module by module and without rounding
_SIDES = (48, 80)  # of an image that is not square, nor of a size for which authors keep a mask


@dataclass(frozen=True)
class Traced:
    """A program, and the images it is for.

    Attributes:
        program: Takes ``image`` `[B, C, H, W]`.
        size: Height and width, or None where they are free.
        note: Why the size is fixed, or None.
        multiple: Sides of the images must be multiples of this.
        batch: Number of images, or None where it is free.
    """

    program: ExportedProgram
    size: tuple[int, int] | None
    note: str | None
    multiple: int
    batch: int | None


def trace(quantized: QuantizedModel, size: tuple[int, int] | None) -> Traced:
    """The program of a quantized model in float32, its sites in quantize and dequantize operators.

    Args:
        quantized: Left as it is.
        size: Height and width; None leaves them free if the graph allows it, and otherwise is 128 x 128.

    Raises:
        ExportError: The model cannot be exported, or does not take the size.
    """
    check_exportable(quantized)
    twin = float32_copy(quantized)
    rewrite_sites(twin.model)
    twin.use_reference()  # what is exported are the modules, not the fused kernels that would run in their place
    note = "asked for"
    if size is None:
        try:
            return _any_size(twin)
        except _OneSizeError as error:
            note = str(error)
    example = example_for(twin, size)
    program, batch = _program(twin, example, {})
    return Traced(program, (example.shape[-2], example.shape[-1]), note, max(1, twin.traits.size_multiple), batch)


class _OneSizeError(Exception):
    """Why height and width cannot be free."""


def _any_size(twin: QuantizedModel) -> Traced:
    """The program with free height and width.

    Padding to whole windows is often decided in Python for the traced size. The program is then right only for sizes
    that need no padding, which is found by trying multiples.
    """
    step = max(1, twin.traits.size_multiple)
    least = max(1, twin.traits.size_minimum)
    height, width = (-(-max(side, least) // step) * step for side in _SIDES)
    example = example_for(twin, (height, width))
    try:
        program, batch = _program(twin, example, {2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    except HarmoqError as error:
        raise _OneSizeError(f"the graph holds for one size only: {error.found}") from error
    for multiple in (step << n for n in range(_DOUBLINGS)):
        aligned = height % multiple == width % multiple == 0
        others = ((height + multiple, width + 2 * multiple), (height + 3 * multiple, width + multiple))
        if aligned and all(_holds(program, twin, example_for(twin, other)) for other in others):
            return Traced(program, None, None, multiple, batch)
    raise _OneSizeError("the graph holds for one size only: at others it fails or gives another result")


def _program(twin: QuantizedModel, example: Tensor, free: dict[int, Any]) -> tuple[ExportedProgram, int | None]:
    """The program for images like the example, and the number of images where that is not free.

    Args:
        twin: The model in operators that can be exported.
        example: One image.
        free: Axes of the image that are free, as `torch.export` takes them.

    Raises:
        ExportError: torch.export does not take the model.
    """
    try:
        return _any_batch(twin, example, free), None
    except BatchError as error:
        logging.getLogger(__name__).debug("One image at a time: %s", error)
    try:
        with silent(), torch.no_grad():
            return _exported(_flat(twin, example, free), example, free), 1
    except HarmoqError:
        raise
    except Exception as error:  # an author's forward may fail under export in any way
        raise failed(UNTRACEABLE, error, place=f"{tuple(example.shape)}: ", remedy=RUN_IT_HERE) from error


def _any_batch(twin: QuantizedModel, example: Tensor, free: dict[int, Any]) -> ExportedProgram:
    batches = [example.expand(count, -1, -1, -1).contiguous() for count in PAIR]
    try:
        with silent(), torch.no_grad():
            two, three = (_flat(twin, images, free) for images in batches)
            free_batch(two, three)
            program = _exported(two, batches[0], {0: Dim.DYNAMIC, **free})
    except BatchError:
        raise
    except Exception as error:  # as above, and of some models the authors took one image for granted
        raise BatchError(str(error)) from error
    images = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    if not (_holds(program, twin, images[:1]) and _holds(program, twin, images)):
        raise BatchError("the graph for two images fails for others, or gives another result")
    return program


def _flat(twin: QuantizedModel, images: Tensor, free: dict[int, Any]) -> fx.GraphModule:
    """One graph of operators, with its constants folded."""
    twin(images)  # makes the graphs of islands for this size, which an export cannot
    program = _exported(SingleInput(twin), images, free).run_decompositions({})
    module = program.module(check_guards=False)
    fold_constants(module, keep=(torch.ops.harmoq.dequantize_weight.default,), growth=1.0)
    return module


def _exported(module: torch.nn.Module, images: Tensor, free: dict[int, Any]) -> ExportedProgram:
    return torch.export.export(module, (images,), dynamic_shapes=(free or None,), strict=False)


def _holds(program: ExportedProgram, twin: QuantizedModel, images: Tensor) -> bool:
    """Whether the program computes what the modules do."""
    try:
        with torch.no_grad(), silent(), without_rounding():
            found, expected = program.module(check_guards=False)(images), twin(images)
    except Exception:  # a shape that does not fit
        return False
    return found.shape == expected.shape and float((found - expected).abs().max()) <= _TOLERANCE


@contextmanager
def silent() -> Iterator[None]:
    """Context manager that silences exporters: what fails is reported by an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
