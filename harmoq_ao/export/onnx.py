"""A quantized model as an ONNX file (opset 21) with integer weights and quantize/dequantize nodes.

Height and width are free where the graph of the architecture holds for every multiple of its windows. Some transformers
build masks and index tables from the size in Python. Their file is for images of one size, larger images are upscaled
in tiles, and the reason is in the file's metadata (``harmoq_size``). The number of images is free (``harmoq_batch``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from harmoq_ao.common.errors import ExportError
from harmoq_ao.common.optional import require
from harmoq_ao.common.version import __version__
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.onnx_sites import fits_int4
from harmoq_ao.export.tracing import Traced, silent, trace
from harmoq_ao.export.validation import RUN_IT_HERE, failed
from harmoq_ao.images import atomic_write

if TYPE_CHECKING:
    import onnx
    import onnx_ir

OPSET = 21
"""First opset with int4."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        size: Height and width of its images, or None where they are free.
        note: Why the size is fixed, or None.
        multiple: Sides of the images must be multiples of this.
        batch: Number of images in a call, or None where it is free.
    """

    path: Path
    size: tuple[int, int] | None
    note: str | None
    multiple: int = 1
    batch: int | None = None


def export_onnx(quantized: QuantizedModel, path: str | Path, size: tuple[int, int] | None = None) -> Exported:
    """Write a quantized model as ONNX. The input is ``image``, the output ``upscaled``, both `[B, C, H, W]` in 0..1.

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
    proto, traced = onnx_model(quantized, size)
    with atomic_write(path) as file:
        file.write(proto.SerializeToString())
    return exported(path, traced)


def exported(path: str | Path, traced: Traced) -> Exported:
    """What was written for a program."""
    return Exported(Path(path), traced.size, traced.note, traced.multiple, traced.batch)


def onnx_model(quantized: QuantizedModel, size: tuple[int, int] | None) -> tuple[onnx.ModelProto, Traced]:
    """The content of the file, and the program it was made from; arguments and errors of :func:`export_onnx`."""
    require_onnx()
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from harmoq_ao.export.compact import compact_constants

    traced = trace(quantized, size)
    model = _translated(traced.program)
    compact_constants(model)
    _narrow_weights(model)
    ClearMetadataAndDocStringPass()(model)  # the author's source at every node
    _describe(model, quantized, traced)
    return _checked(model), traced


def require_onnx() -> None:
    """Raise ExportError, with what to install, unless onnx and onnxscript can be imported."""
    require("ONNX", ("onnx", "onnxscript"), ExportError, extra="onnx", expected="the packages onnx and onnxscript")


# --- from a program to ONNX -------------------------------------------------------------------------------------------


def _translated(program: ExportedProgram) -> onnx_ir.Model:
    table: dict[Any, Any] = {
        torch.ops.harmoq.quantize_dequantize.default: _quantize_dequantize,
        torch.ops.harmoq.dequantize_weight.default: _dequantize_weight,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    }
    try:
        with silent():
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


def _describe(model: onnx_ir.Model, quantized: QuantizedModel, traced: Traced) -> None:
    """Write the origin of the file and the requirements on its images as metadata."""
    model.producer_name, model.producer_version = "harmoq-ao", __version__
    size = traced.size
    model.metadata_props.update(
        harmoq_size="any" if size is None else f"{size[0]}x{size[1]} ({traced.note})",
        harmoq_batch="any" if traced.batch is None else str(traced.batch),
        harmoq_scale=str(quantized.traits.scale),
        harmoq_size_multiple=str(traced.multiple),
        harmoq_config=json.dumps(quantized.config.to_dict(), sort_keys=True),
    )


def _checked(model: onnx_ir.Model) -> onnx.ModelProto:
    """The model as onnx's own type, once `onnx.checker` has passed it."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # shapes between nodes, which engines infer
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise failed("The translated model is not valid ONNX", error, remedy=RUN_IT_HERE) from error
    return proto
