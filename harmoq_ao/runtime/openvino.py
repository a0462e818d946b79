"""A quantized model in OpenVINO: our codes in its integer kernels, its own fusion for the rest.

The model is traced at the size of the image, so masks, position biases and whatever else a size decides become
constants. Quantized sites are not traced: each becomes the operations of `openvino_ops`, which the CPU plugin runs as
u8 x s8 products. Chains of transposes are merged (`openvino_views`). Every size is compiled by itself, and the last few
are kept.

Masks of shifted windows grow with the image and are written out for every block that has one: upscale large images in
tiles, all of one size (``harmoq_ao.runtime.tiling.upscale``), which also compiles once.

OpenVINO is optional: ``pip install "harmoq-ao[openvino]"``.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError, InputError, OpenVinoError
from harmoq_ao.common.optional import require
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.images import check_image_tensor
from harmoq_ao.runtime.few_sizes import kept
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedSite

if TYPE_CHECKING:
    import openvino

Precision = Literal["bf16", "f32"]
Size = tuple[int, int, int, int]


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


class OpenVinoModel(nn.Module):
    """A quantized model that OpenVINO runs; call it as the original. Safe to call from several threads, one at a time.

    Attributes:
        precision: Type of what is not integer, ``bf16`` or ``f32``; CPUs without bfloat16 run float32.
        threads: Threads of one call.
        keep: Sizes that stay compiled.
        traits: Scale, size requirements and architecture.
        example_shapes: Image shapes the model was prepared on.
    """

    def __init__(self, quantized: QuantizedModel, precision: Precision, threads: int, keep: int) -> None:
        super().__init__()
        self.precision = precision
        self.threads = threads
        self.keep = keep
        self.traits = quantized.traits
        self.example_shapes = quantized.example_shapes
        self._quantized = [quantized]  # in a list, so that it is no submodule and its tensors are not counted as ours
        self._compiled: OrderedDict[Size, openvino.CompiledModel] = OrderedDict()
        self._lock = threading.Lock()

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
        with self._lock:
            compiled = self.compiled(_size(image.shape))
            result = compiled(image.float().contiguous().numpy(), share_inputs=True, share_outputs=False)
        return torch.from_numpy(result[0]).to(image.dtype)

    def compiled(self, size: Size) -> openvino.CompiledModel:
        """The compiled model for images `[B, C, H, W]` of this size; the least recently used one makes room."""
        return kept(self._compiled, size, lambda: self._compile(size), self.keep)

    def layers(self, size: Size) -> list[Layer]:
        """What OpenVINO runs for images of this size, constants left out."""
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
        import openvino as ov

        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
        }
        try:
            return ov.Core().compile_model(convert_at(self._quantized[0], size), "CPU", options)
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
        precision: Type of what is not integer: ``bf16`` for speed, ``f32`` for outputs as close as float32 gets.
        threads: Threads of one call; None is ``torch.get_num_threads()``.
        keep: Image sizes that stay compiled, at least 1; each holds its own masks and weights.

    Raises:
        OpenVinoError: OpenVINO is not installed.
        ConfigError: An option is outside its set.
    """
    if not isinstance(quantized, QuantizedModel):
        raise ConfigError(
            "lower_openvino takes a quantized model",
            found=type(quantized).__name__,
            expected="the result of convert_harmoq, or of load_quantized",
        )
    if precision not in get_args(Precision):
        raise ConfigError("Unknown precision", found=repr(precision), expected="'bf16' or 'f32'")
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in (("threads", threads), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number", found=repr(value), expected="1 or more")
    require_openvino()
    return OpenVinoModel(quantized, precision, threads, keep)


def require_openvino() -> None:
    """Raise OpenVinoError, with what to install, unless OpenVINO can be imported."""
    require(
        "OpenVINO", ("openvino",), OpenVinoError, extra="openvino", expected="the package openvino, 2025.0 or later"
    )


# --- from modules to an OpenVINO model --------------------------------------------------------------------------------


class _Product(nn.Module):
    """The product of two quantized activations `[..., M, K]` and `[..., K, N]`, however the author wrote it."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class _Matmul(QuantizedMatmul):
    """A quantized product in the author's form, with the product itself as a module of its own."""

    product: _Product

    def forward(self, *operands: Tensor, **options: Any) -> Tensor:
        left, right = self.form.canonical(*operands)
        if self.relative:
            product = self.of_map(left, lambda relative: self.product(relative, right))
        else:
            product = self.product(left, right)
        return self.form.finish(product, *operands, **options)


class _Whole(nn.Module):
    """The author's model, with one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.model(image)
        return result


def convert_at(quantized: QuantizedModel, size: Size) -> openvino.Model:
    """The OpenVINO model of a quantized model for images of one size `[B, C, H, W]`, to compile or to save.

    Raises:
        OpenVinoError: OpenVINO is not installed.
        RuntimeError: The model cannot be traced or converted.
    """
    require_openvino()
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from harmoq_ao.runtime.openvino_views import merge_views

    twin = copy.deepcopy(quantized)
    if twin.float_dtype is not torch.float32:
        twin.set_float_dtype(torch.float32)  # OpenVINO narrows what it runs narrow; parameters are rounded already
    modules, conversions = _extensions(twin)
    image = torch.rand(size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, which is what is wanted
        decoder = TorchScriptPythonDecoder(
            _Whole(twin.model).eval(),
            example_input=image,
            module_extensions=modules,
            trace_kwargs={"check_trace": False},  # it would run the model twice more
        )
        model = ov.convert_model(decoder, input=[ov.PartialShape(list(size))], extension=conversions or None)
    merge_views(model)
    return model


def _extensions(twin: QuantizedModel) -> tuple[dict[nn.Module, Any], list[Any]]:
    """What stands for each quantized site while tracing, and what it becomes. The sites of `twin` are exchanged."""
    from openvino.frontend.pytorch import ConversionExtension, ModuleExtension

    modules: dict[nn.Module, Any] = {}
    conversions: list[Any] = []
    for index, (name, site) in enumerate(list(twin.sites().items())):
        if not site.both_quantized:
            continue  # float with rounding, in plain torch
        module: nn.Module = site
        if isinstance(site, QuantizedMatmul):
            site.__class__ = _Matmul
            site.product = module = _Product()
        operation = f"harmoq::site_{index}"
        modules[module] = ModuleExtension(module, operation, evaluate=_shape_only, convert=_call)
        conversions.append(ConversionExtension(operation, _Converter(name, site)))
    return modules, conversions


class _Converter:
    """Turns the operation that stands for a site into OpenVINO's."""

    def __init__(self, name: str, site: QuantizedSite) -> None:
        self.name = name
        self.site = site

    def __call__(self, context: Any) -> list[Any]:
        from harmoq_ao.runtime import openvino_ops

        site, x = self.site, context.get_input(0)
        if isinstance(site, QuantizedLinear):
            outputs: list[Any] = openvino_ops.linear(x, site.operands(), self.name).outputs()
        elif isinstance(site, QuantizedConv2d):
            outputs = openvino_ops.conv2d(x, site).outputs()
        else:
            assert isinstance(site, QuantizedMatmul)
            product = openvino_ops.matmul(x, context.get_input(1), *site.operands(), self.name)
            outputs = product.outputs()
        return outputs


def _shape_only(module: nn.Module, *operands: Tensor) -> Tensor:
    """Zeros of the shape a site returns: all that tracing needs."""
    x = operands[0]
    if isinstance(module, _Product):
        return x.new_zeros(()).expand(*x.shape[:-1], operands[1].shape[-1]).contiguous()
    if isinstance(module, QuantizedConv2d):
        weight = x.new_zeros(()).expand(module.site.shape)
        return torch.conv2d(x, weight, None, **module.geometry)
    assert isinstance(module, QuantizedLinear)
    return x.new_zeros(*x.shape[:-1], module.site.shape[0])


def _call(module: nn.Module, operation: Any, *operands: Tensor, **options: Any) -> Tensor:
    """The operation on the operands; a bias that the caller of a linear passes is added outside."""
    if not isinstance(module, QuantizedLinear):
        result: Tensor = operation(*operands)
        return result
    bias = operands[1] if len(operands) > 1 else options.get("bias")
    y: Tensor = operation(operands[0])
    return y if bias is None else y + bias


def _size(shape: torch.Size) -> Size:
    batch, channels, height, width = shape
    return batch, channels, height, width


def _layer(info: Any) -> Layer:
    def text(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    origin = tuple(text("originalLayersNames").split(","))
    return Layer(text("layerType"), text("primitiveType"), text("runtimePrecision"), origin)


__all__ = ["Layer", "OpenVinoError", "OpenVinoModel", "convert_at", "lower_openvino", "require_openvino"]
