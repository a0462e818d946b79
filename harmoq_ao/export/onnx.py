"""A quantized model as an ONNX file (opset 21) with integer weights and quantize/dequantize nodes.

Height and width are free where the graph of the architecture holds for every multiple of its windows. Some transformers
build masks and index tables from the size in Python. Their file is for images of one size, larger images are upscaled
in tiles, and the reason is in the file's metadata (``harmoq_size``).
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmoq_ao.common.errors import ExportError, HarmoqError
from harmoq_ao.common.optional import require
from harmoq_ao.common.version import __version__
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.onnx_sites import fits_int4, rewrite_sites  # registers the operators, too
from harmoq_ao.export.validation import RUN_IT_HERE, UNTRACEABLE, check_exportable, example_for, failed
from harmoq_ao.images import atomic_write
from harmoq_ao.runtime.fixed_size import SingleInput, fixed_size, float32_copy

if TYPE_CHECKING:
    import onnx_ir

OPSET = 21
"""First opset with int4."""
_DOUBLINGS = 7  # windows of up to 64 times what a model demands
_TOLERANCE = 1e-3  # of a program with free sizes, against the model itself: a tie of rounding, not another graph


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: The file.
        size: Height and width of its images, or None where they are free.
        note: Why the size is fixed, or None.
        multiple: Sides of the images must be multiples of this.
    """

    path: Path
    size: tuple[int, int] | None
    note: str | None
    multiple: int = 1


def export_onnx(quantized: QuantizedModel, path: str | Path, size: tuple[int, int] | None = None) -> OnnxExport:
    """Write a quantized model as ONNX. The input is ``image``, the output ``upscaled``, both `[1, C, H, W]` in 0..1.

    Args:
        quantized: From :func:`convert_harmoq` or a saved model; left as it is.
        path: The file, replaced if it is there.
        size: Height and width of the images, for a file of one size. None leaves them free where the graph of the
            architecture allows it, and otherwise takes 128 x 128.

    Raises:
        ExportError: onnx or onnxscript is not installed, the model does not take the size, or a part of it has no
            counterpart in ONNX.
        OutputError: The file cannot be written.
    """
    require_onnx()
    twin = _twin(quantized)
    note: str | None = None
    program, multiple = None, max(1, quantized.traits.size_multiple)
    if size is None:
        try:
            program, multiple = _free_size(twin, quantized)
        except _OneSizeError as error:
            note = str(error)
    if program is None:
        example = example_for(quantized, size)
        size = (example.shape[-2], example.shape[-1])
        program = _one_size(twin, example)
        note = note or "asked for"
    model = _translated(program)
    _narrow_weights(model)
    _share_constants(model)
    _describe(model, quantized, size, note, multiple)
    data = _serialized(model)
    with atomic_write(path) as file:
        file.write(data)
    return OnnxExport(Path(path), size, note, multiple)


def require_onnx() -> None:
    """Raise ExportError, with what to install, unless onnx and onnxscript can be imported."""
    require("ONNX", ("onnx", "onnxscript"), ExportError, extra="onnx", expected="the packages onnx and onnxscript")


# --- from modules to a program ----------------------------------------------------------------------------------------


def _twin(quantized: QuantizedModel) -> QuantizedModel:
    """A copy in float32 with its sites in quantize and dequantize operators."""
    check_exportable(quantized)
    twin = float32_copy(quantized)
    rewrite_sites(twin.model)
    return twin


def _one_size(twin: QuantizedModel, example: Tensor) -> torch.export.ExportedProgram:
    """The program for one size; everything that depends on the size alone is a constant."""
    try:
        flat = fixed_size(twin, example, cuda_graph=False, keep=(torch.ops.harmoq.dequantize_weight.default,))
        with torch.no_grad():
            return torch.export.export(flat.graph, (example,), strict=False)
    except HarmoqError:
        raise
    except Exception as error:  # an author's forward may fail under export in any way
        raise failed(UNTRACEABLE, error, place=f"{tuple(example.shape)}: ", remedy=RUN_IT_HERE) from error


class _OneSizeError(Exception):
    """Why height and width cannot be free."""


def _free_size(twin: QuantizedModel, quantized: QuantizedModel) -> tuple[torch.export.ExportedProgram, int]:
    """The program with free height and width, and what they must be multiples of.

    Padding to whole windows is often decided in Python for the traced size. The program is then right only for sizes
    that need no padding, which is found by trying multiples.
    """
    height, width = quantized.example_shapes[0][-2:]
    example = example_for(quantized, (height, width))
    free: Any = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad(), _silent():
            twin(example)
            program = torch.export.export(
                SingleInput(twin), (example,), dynamic_shapes={"image": {2: free, 3: free}}, strict=False
            )
    except Exception as error:  # whatever the author's Python does with a size that is not known
        raise _OneSizeError(f"the graph holds for one size only: {_reason(error)}") from error
    step = max(1, quantized.traits.size_multiple)
    for multiple in (step << n for n in range(_DOUBLINGS)):
        aligned = height % multiple == width % multiple == 0
        others = ((height + multiple, width + 2 * multiple), (height + 3 * multiple, width + multiple))
        if aligned and all(_holds(program, quantized, other) for other in others):
            return program, multiple
    raise _OneSizeError("the graph holds for one size only: at others it fails or gives another result")


def _holds(program: torch.export.ExportedProgram, quantized: QuantizedModel, size: tuple[int, int]) -> bool:
    """Whether the program computes what the model does at a size."""
    image = example_for(quantized, size)
    try:
        with torch.no_grad(), _silent():
            found, expected = program.module()(image), quantized(image)
    except Exception:  # a guard, or a shape that does not fit
        return False
    return found.shape == expected.shape and float((found - expected).abs().max()) <= _TOLERANCE


# --- from a program to ONNX -------------------------------------------------------------------------------------------


def _translated(program: torch.export.ExportedProgram) -> onnx_ir.Model:
    table: dict[Any, Any] = {
        torch.ops.harmoq.quantize_dequantize.default: _quantize_dequantize,
        torch.ops.harmoq.dequantize_weight.default: _dequantize_weight,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    }
    try:
        with _silent():
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["upscaled"],
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:
        raise failed("A part of this model has no counterpart in ONNX", error, remedy=RUN_IT_HERE) from error
    assert found is not None
    return found.model


def _quantize_dequantize(position: Any, step: float, zero_point: int) -> Any:
    """Node for node :func:`quantize_dequantize`."""
    op = _opset()
    codes = op.QuantizeLinear(position, op.Constant(value=_scalar(1.0)), op.Constant(value=_byte(0)))
    return op.DequantizeLinear(codes, op.Constant(value=_scalar(step)), op.Constant(value=_byte(zero_point)))


def _dequantize_weight(codes: Any, scale: Any, axis: int) -> Any:
    """Node for node :func:`dequantize_weight`."""
    return _opset().DequantizeLinear(codes, scale, axis=axis)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``F.scaled_dot_product_attention`` of any rank; torch's own translation takes four axes only."""
    import onnx_ir as ir

    op = _opset()
    if is_causal or enable_gqa:
        raise NotImplementedError("scaled_dot_product_attention with is_causal or enable_gqa")
    rank = len(query.shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    factor = int(query.shape[-1]) ** -0.5 if scale is None else scale
    scores = op.MatMul(op.Mul(query, op.Constant(value=_scalar(factor))), op.Transpose(key, perm=order))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        zero, never = op.Constant(value=_scalar(0.0)), op.Constant(value=_scalar(-math.inf))
        attn_mask = op.Where(attn_mask, zero, never)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _opset() -> Any:
    from onnxscript import opset21

    return opset21


def _scalar(value: float) -> Any:
    import numpy as np
    import onnx

    return onnx.numpy_helper.from_array(np.array(value, np.float32))


def _byte(value: int) -> Any:
    import numpy as np
    import onnx

    return onnx.numpy_helper.from_array(np.array(value, np.uint8))


def _narrow_weights(model: onnx_ir.Model) -> None:
    """Store weight codes in int4 where they all fit."""
    import ml_dtypes
    import onnx_ir as ir

    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or codes.dtype is not ir.DataType.INT8:
            continue
        values = codes.const_value.numpy()
        if fits_int4(torch.from_numpy(values.copy())):
            narrow = values.astype(ml_dtypes.int4)
            codes.const_value = ir.Tensor(narrow, dtype=ir.DataType.INT4, name=codes.name)
            codes.type = ir.TensorType(ir.DataType.INT4)


def _share_constants(model: onnx_ir.Model) -> None:
    """Store equal tables once: every block with shifted windows has the same mask."""
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    for value in model.graph.initializers.values():
        array = None if value.const_value is None else value.const_value.numpy()
        if array is not None and not array.flags.c_contiguous:  # the pass hashes memory as it lies
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    DeduplicateHashedInitializersPass(size_limit=1 << 40)(model)


def _describe(
    model: onnx_ir.Model, quantized: QuantizedModel, size: tuple[int, int] | None, note: str | None, multiple: int
) -> None:
    """Write the origin of the file and the requirements on its images as metadata."""
    model.producer_name, model.producer_version = "harmoq-ao", __version__
    fixed = "any" if size is None else f"{size[0]}x{size[1]} ({note})"
    traits = quantized.traits
    model.metadata_props.update(
        harmoq_size=fixed,
        harmoq_scale=str(traits.scale),
        harmoq_size_multiple=str(multiple),
        harmoq_config=json.dumps(quantized.config.to_dict(), sort_keys=True),
    )


def _serialized(model: onnx_ir.Model) -> bytes:
    """The file's bytes, once `onnx.checker` has passed them."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise failed("The translated model is not valid ONNX", error, remedy=RUN_IT_HERE) from error
    data: bytes = proto.SerializeToString()
    return data


@contextmanager
def _silent() -> Iterator[None]:
    """Context manager that silences the exporter: what fails is reported by an error."""
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


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
