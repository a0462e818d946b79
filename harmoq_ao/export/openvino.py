"""A quantized model as OpenVINO IR: an ``.xml`` file with its weights beside it (``.bin``), run without torch.

OpenVINO reads what the ONNX file says (`onnx.py`) and runs its quantize and dequantize nodes in the integer kernels of
its CPU plugin. What is written is for one image at a time; transposes of windows are merged where the size is fixed.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from harmoq_ao.common.errors import ExportError
from harmoq_ao.common.optional import require
from harmoq_ao.common.output import atomic_write
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.export.onnx import Exported, onnx_model, require_onnx
from harmoq_ao.export.validation import RUN_IT_HERE, example_for, failed


def export_openvino(quantized: QuantizedModel, path: str | Path, size: tuple[int, int] | None = None) -> Exported:
    """Write a quantized model as OpenVINO IR, for images ``image`` `[1, C, H, W]` in 0..1.

    Args:
        quantized: From :func:`convert_harmoq` or a saved model; left as it is.
        path: The ``.xml`` file, replaced if it is there, as is the ``.bin`` file of the same name.
        size: Height and width of the images, for a file of one size. None leaves them free where the graph of the
            architecture and OpenVINO allow it, and otherwise takes 128 x 128.

    Raises:
        ExportError: openvino, onnx or onnxscript is not installed, or the model cannot be exported.
        OutputError: A file cannot be written.
    """
    require_onnx()
    require("OpenVINO IR", ("openvino",), ExportError, extra="openvino", expected="the package openvino")
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.xml")
        found = _converted(quantized, size, written)
        # The weights first: an .xml file that is there has them.
        for source, target in ((written.with_suffix(".bin"), weights_of(path)), (written, path)):
            with atomic_write(target) as file:
                file.write(source.read_bytes())
    return Exported(path, found.size, found.note, found.multiple, 1)


def weights_of(path: Path) -> Path:
    """The file of weights that belongs to an ``.xml`` file."""
    return path.with_suffix(".bin")


def _converted(quantized: QuantizedModel, size: tuple[int, int] | None, target: Path) -> Exported:
    """Convert and save; where OpenVINO does not take free sizes, for one size."""
    import openvino as ov

    from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
    from harmoq_ao.runtime.openvino.views import merge_views

    proto, traced = onnx_model(quantized, size)
    try:
        model = ov.Core().read_model(io.BytesIO(proto.SerializeToString()))
        model.reshape(ov.PartialShape([1, *model.input(0).partial_shape[1:]]))
        merge_views(model)
        if traced.size is None:  # where only compiling shows whether the plugin takes masks that are drawn at run time
            compile_on_cpu(model)
    except RuntimeError as error:
        if traced.size is not None:
            raise failed("OpenVINO does not take this model", error, remedy=RUN_IT_HERE) from error
        fallback = _converted(quantized, _default_size(quantized), target)
        note = f"OpenVINO does not take the graph for free sizes: {' '.join(str(error).split())[-160:]}"
        return Exported(target, fallback.size, note, fallback.multiple, 1)
    for key, value in {p.key: p.value for p in proto.metadata_props}.items():
        model.set_rt_info(value, [key])
    ov.save_model(model, str(target), compress_to_fp16=False)
    return Exported(target, traced.size, traced.note, traced.multiple, 1)


def _default_size(quantized: QuantizedModel) -> tuple[int, int]:
    height, width = example_for(quantized, None).shape[-2:]
    return height, width
