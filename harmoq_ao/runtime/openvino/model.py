"""A quantized model in OpenVINO: our codes in its integer kernels, its own fusion for the rest.

Every image size is converted (`conversion.py`) and compiled by itself, and the last few are kept.

Masks of shifted windows grow with the image and are written out for every block that has one: upscale large images in
tiles, all of one size (``harmoq_ao.runtime.tiling.upscale``), which also compiles once.

OpenVINO is optional: ``pip install "harmoq-ao[openvino]"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from harmoq_ao.common.errors import ConfigError, InputError, OpenVinoError
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.images import check_image_tensor
from harmoq_ao.runtime.openvino.compiling import compile_on_cpu
from harmoq_ao.runtime.openvino.conversion import Size, convert_at, require_openvino
from harmoq_ao.runtime.per_size import PerSizeModel, check_count

if TYPE_CHECKING:
    import openvino

Precision = Literal["bf16", "f32"]


@dataclass(frozen=True)
class Layer:
    """One operation of a compiled model, as OpenVINO runs it.

    Attributes:
        kind: Such as ``FullyConnected``.
        kernel: Such as ``brgemm_avx512_I8``.
        precision: What it computes in: ``u8`` and ``i8`` for integer products.
        origin: Names of the operations it was made from; those of sites are among them.
    """

    kind: str
    kernel: str
    precision: str
    origin: tuple[str, ...]


class OpenVinoModel(PerSizeModel[Size, "openvino.CompiledModel"]):
    """A quantized model that OpenVINO runs; call it as the original. Calls from several threads take turns.

    Attributes:
        precision: Type of the float parts, ``bf16`` or ``f32``; CPUs without bfloat16 run float32.
        threads: Threads of one call.
    """

    def __init__(self, quantized: QuantizedModel, precision: Precision, threads: int, keep: int) -> None:
        super().__init__(quantized, keep)
        self.precision = precision
        self.threads = threads
        self._quantized = [quantized]  # a list hides it from nn.Module: its tensors are not ours

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Upscale an image batch `[B, C, H, W]` in 0..1 on the CPU; the result has the type of the input.

        The first image of a size compiles the model for it, which takes many times as long as a call.

        Raises:
            InputError: Not an image batch, not finite, or of another number of channels.
            OpenVinoError: OpenVINO cannot take the model at this size.
        """
        check_image_tensor(image)
        channels = self.example_shapes[0][1]
        if image.shape[1] != channels or image.device.type != "cpu":
            raise InputError(
                "The image does not fit the model",
                found=f"{tuple(image.shape)} on {image.device}",
                expected=f"[B, {channels}, H, W] on the CPU",
            )
        with self.lock:
            compiled = self.compiled(_size(image.shape))
            result = compiled(image.float().contiguous().numpy(), share_inputs=True, share_outputs=False)
        return torch.from_numpy(result[0]).to(image.dtype)

    def compiled(self, size: Size) -> openvino.CompiledModel:
        """The compiled model for images `[B, C, H, W]` of this size; the least recently used one makes room."""
        return self.program(size, lambda: self._compile(size))

    def layers(self, size: Size) -> list[Layer]:
        """The operations that OpenVINO runs for images of this size, without constants."""
        model = self.compiled(size).get_runtime_model()
        found = [_layer(node.get_rt_info()) for node in model.get_ordered_ops()]
        return [layer for layer in found if layer.kind not in ("Const", "Parameter", "Input", "Output", "Result")]

    def kernels(self, size: Size) -> dict[str, Layer]:
        """The operation that computes the product of each quantized site, by site name.

        Found by name, also within operations that the plugin fused. A product that is merged with a scale of the
        author's may lose its name, and then is missing here; `layers` lists it all the same.
        """
        layers = self.layers(size)
        found: dict[str, Layer] = {}
        for name in self._quantized[0].sites():
            own = [n for n in layers if any(o == name or o.startswith(f"{name}/") for o in n.origin)]
            product = [n for n in own if n.kind in ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")]
            if own:
                found[name] = (product or own)[0]
        return found

    def _compile(self, size: Size) -> openvino.CompiledModel:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
        }
        try:
            return compile_on_cpu(convert_at(self._quantized[0], size), **options)
        except RuntimeError as error:
            raise OpenVinoError(
                "OpenVINO cannot take this model at this size",
                found=f"{size}: {' '.join(str(error).split())[:400]}",
                expected="a model that torch.jit.trace and openvino.convert_model take",
                remedy="run the quantized model itself",
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenVinoModel:
        return OpenVinoModel(self._quantized[0], self.precision, self.threads, self.keep)


def lower_openvino(
    quantized: QuantizedModel, *, precision: Precision = "bf16", threads: int | None = None, keep: int = 4
) -> OpenVinoModel:
    """Run a quantized model by OpenVINO on the CPU.

    Args:
        quantized: Result of :func:`convert_harmoq` or of a saved model. It is read when a new size is
            compiled, and should not be changed afterwards.
        precision: Type of the float parts: ``bf16`` for speed, ``f32`` for outputs as close as float32 gets.
        threads: Threads of one call; None is ``torch.get_num_threads()``.
        keep: Image sizes that stay compiled, at least 1; each holds its own masks and weights.

    Raises:
        OpenVinoError: OpenVINO is not installed.
        ConfigError: An option is out of range.
    """
    if not isinstance(quantized, QuantizedModel):
        raise ConfigError(
            "lower_openvino takes a quantized model",
            found=type(quantized).__name__,
            expected="the result of convert_harmoq, or of load_quantized",
        )
    if precision not in get_args(Precision):
        raise ConfigError("Unknown precision", found=repr(precision), expected="'bf16' or 'f32'")
    threads = check_count("threads", torch.get_num_threads() if threads is None else threads)
    require_openvino()
    return OpenVinoModel(quantized, precision, threads, keep)


def _size(shape: torch.Size) -> Size:
    batch, channels, height, width = shape
    return batch, channels, height, width


def _layer(info: Any) -> Layer:
    def text(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    origin = tuple(text("originalLayersNames").split(","))
    return Layer(text("layerType"), text("primitiveType"), text("runtimePrecision"), origin)
