"""From a quantized model to an OpenVINO model of one image size.

The model is traced at the size of the image, so masks, position biases and whatever else depends on the size
alone become constants. Quantized sites are not traced: each becomes the operations of `ops.py`, which the CPU plugin
runs as u8 x s8 products. Chains of transposes are merged (`views.py`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import OpenVinoError
from harmoq_ao.common.optional import require
from harmoq_ao.conversion.model import QuantizedModel
from harmoq_ao.runtime.fixed_size import SingleInput, float32_copy
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedSite

if TYPE_CHECKING:
    import openvino

Size = tuple[int, int, int, int]
"""Of an image batch `[B, C, H, W]`."""


def require_openvino() -> None:
    """Raise OpenVinoError, with what to install, unless OpenVINO can be imported."""
    require(
        "OpenVINO", ("openvino",), OpenVinoError, extra="openvino", expected="the package openvino, 2025.0 or later"
    )


def convert_at(quantized: QuantizedModel, size: Size) -> openvino.Model:
    """The OpenVINO model of a quantized model for images of one size `[B, C, H, W]`, to compile or to save.

    Raises:
        OpenVinoError: OpenVINO is not installed.
        RuntimeError: The model cannot be traced or converted.
    """
    require_openvino()
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from harmoq_ao.runtime.openvino.views import merge_views

    twin = float32_copy(quantized)  # OpenVINO narrows by itself what it runs in bfloat16
    modules, conversions = _extensions(twin)
    image = torch.rand(size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that sizes become constants, as intended
        decoder = TorchScriptPythonDecoder(
            SingleInput(twin.image_module()).eval(),
            example_input=image,
            module_extensions=modules,
            trace_kwargs={"check_trace": False},  # it would run the model twice more
        )
        model = ov.convert_model(decoder, input=[ov.PartialShape(list(size))], extension=conversions or None)
    merge_views(model)
    return model


def _extensions(twin: QuantizedModel) -> tuple[dict[nn.Module, Any], list[Any]]:
    """Module extensions that replace the sites while tracing, and their conversions. Exchanges the sites of `twin`."""
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


class _Converter:
    """Converts the placeholder operation of a site to OpenVINO operations."""

    def __init__(self, name: str, site: QuantizedSite) -> None:
        self.name = name
        self.site = site

    def __call__(self, context: Any) -> list[Any]:
        from harmoq_ao.runtime.openvino import ops

        site, x = self.site, context.get_input(0)
        if isinstance(site, QuantizedLinear):
            outputs: list[Any] = ops.linear(x, site.operands(), self.name).outputs()
        elif isinstance(site, QuantizedConv2d):
            outputs = ops.conv2d(x, site).outputs()
        else:
            assert isinstance(site, QuantizedMatmul)
            product = ops.matmul(x, context.get_input(1), *site.operands(), self.name)
            outputs = product.outputs()
        return outputs


def _shape_only(module: nn.Module, *operands: Tensor) -> Tensor:
    """Zeros of the shape that a site returns; tracing needs nothing else."""
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
