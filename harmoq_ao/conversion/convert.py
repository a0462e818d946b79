"""``convert_harmoq``: a calibrated model becomes one that holds integer codes and computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.calibration.calibrate import compute_qparams, has_qparams
from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.config import HarmoqConfig, StorageDtype
from harmoq_ao.graph import Variant, finish_graphs, is_island, island_state
from harmoq_ao.graph.folding import fold_variant, remember
from harmoq_ao.images import check_image_tensor
from harmoq_ao.kernels.select import check_backend
from harmoq_ao.lowering.attention import fuse_attention
from harmoq_ao.lowering.attention_core import LoweredCores
from harmoq_ao.lowering.core_rewriting import lower_cores
from harmoq_ao.lowering.mlp import fuse_mlps
from harmoq_ao.lowering.survey import survey
from harmoq_ao.lowering.window_attention import LoweredAttention, lower_attention
from harmoq_ao.preparation.prepare import replace_modules
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import ModelTraits, PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear, PreparedSite
from harmoq_ao.sites.quantized import QuantizedSite, quantize_site
from harmoq_ao.sites.report import Lowering, Report, SiteRow, quantized_report

_FLOAT_DTYPES = (torch.float32, torch.bfloat16)
_FLOAT16_MAX = 65504.0


class QuantizedModel(nn.Module):
    """A model whose sites compute on integers; call it as the original.

    Attributes:
        model: The author's model, with quantized modules at its sites.
        config: The configuration it was made with.
        rows: One report row per contraction.
        example_shapes: Image shapes it was prepared on.
        traits: Scale, size requirements and architecture.
        float_dtype: Type of the parts that stay float.
        history: How it was made, or None if that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HarmoqConfig,
        rows: list[SiteRow],
        example_shapes: list[tuple[int, ...]],
        traits: ModelTraits,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.rows = rows
        self.example_shapes = example_shapes
        self.traits = traits
        self.float_dtype = torch.float32
        self.history: History | None = None

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Upscale an image batch `[B, C, H, W]` in 0..1; the result has the type of the input.

        Raises:
            InputError: Not an image batch, not finite, or of another number of channels.
        """
        check_image_tensor(image)
        channels = self.example_shapes[0][1]
        if image.shape[1] != channels:
            raise InputError(
                "The image has another number of channels than the model takes",
                found=tuple(image.shape),
                expected=f"[B, {channels}, H, W]",
            )
        # Authors create float32 masks in forward; autocast brings the operands of each product to one type.
        mixed = self.float_dtype is not torch.float32
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=mixed):
            output = self.model(image.to(self.float_dtype), *args, **kwargs)
        return output.to(image.dtype) if isinstance(output, Tensor) else output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """As any module's, but weights that were released have no memory on any device."""
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        return self

    def sites(self) -> dict[str, QuantizedSite]:
        """Quantized modules by site name."""
        return {m.site.name: m for m in self.model.modules() if isinstance(m, QuantizedSite)}

    def kernels(self) -> dict[str, str]:
        """Code path of each quantized site on its present device."""
        return {name: lowering.kernel for name, lowering in self.lowerings().items()}

    def lowerings(self, device: str | None = None) -> dict[str, Lowering]:
        """What computes each quantized site, and where it could be a fused kernel but is not, why.

        Args:
            device: ``cpu`` or ``cuda``; by default where the model is. A GPU need not be there.

        Raises:
            ConfigError: Another device.
        """
        if device not in (None, "cpu", "cuda"):
            raise ConfigError("Kernels are for CPUs and GPUs", found=device, expected="cpu or cuda")
        sites = self.sites()
        first = next(self.model.parameters(), None)
        here = "cpu" if first is None else first.device.type
        if any(s.backend == "triton" for s in sites.values()) or (device or here) == "cuda":
            return survey(self.model, self.sites(), self._example_run)
        return {name: Lowering(module.kernel) for name, module in sites.items()}

    def _example_run(self) -> None:
        """Run the first example's size once."""
        place = next((p.device for p in self.parameters()), torch.device("cpu"))
        self(torch.rand(self.example_shapes[0]).to(place))

    def use_reference(self, enabled: bool = True) -> None:
        """Run every site on the plain integer reference (slow) instead of the device's kernels."""
        self.use_backend("reference" if enabled else "auto")

    def use_backend(self, backend: str) -> None:
        """Choose the kernels of every site: ``auto`` (the device's own), ``reference`` or ``triton``.

        Raises:
            ConfigError: Another name.
        """
        chosen = check_backend(backend)
        for module in self.sites().values():
            module.backend = chosen

    def set_float_dtype(self, dtype: torch.dtype) -> QuantizedModel:
        """Run the parts that stay float in float32 or bfloat16; codes, scales and bounds are not touched.

        Raises:
            ConfigError: Another type.
        """
        if dtype not in _FLOAT_DTYPES:
            raise ConfigError("Unsupported float type", found=dtype, expected="torch.float32 or torch.bfloat16")
        self.model.to(dtype)  # islands forget what was folded in the former type
        self.float_dtype = dtype
        finalize(self)
        return self

    def report(self, device: str | None = None) -> Report:
        """One row per site: bits, bounds, joint scale, SQNR, kernel, and why a site stays float.

        Args:
            device: Whose kernels to name, as in :meth:`lowerings`.
        """
        report = quantized_report(self.rows, self.sites(), self.lowerings(device))
        measured = {} if self.history is None else self.history.sensitivities
        for row in report.rows:
            row.sensitivity_db = measured.get(row.name, row.sensitivity_db)
        return report


def convert_harmoq(prepared: PreparedModel, *, float_dtype: torch.dtype = torch.float32) -> QuantizedModel:
    """Turn a calibrated model into an integer one. The prepared model is left as it is.

    Weights become packed codes; their float originals are gone. Parameters that stay float are rounded to what a saved
    model stores, so that a model that was saved and loaded computes the same bits.

    Args:
        prepared: A prepared model that has seen calibration images.
        float_dtype: Type of the parts that stay float, ``torch.float32`` or ``torch.bfloat16``.

    Raises:
        CalibrationError: A site saw no calibration data.
        ConfigError: Another float type.
    """
    if not isinstance(prepared, PreparedModel):
        raise CalibrationError(
            "convert_harmoq takes a prepared model",
            found=type(prepared).__name__,
            expected="the result of prepare_harmoq, calibrated",
        )
    if not has_qparams(prepared):
        compute_qparams(prepared)
    rows = prepared.report().rows
    model = _detached_copy(prepared)
    round_float_state(model, prepared.config.storage_dtype)
    stored = _rounding(prepared.config.storage_dtype)
    place = next((p.device for p in prepared.parameters()), None)
    replace_sites(model, lambda module: quantize_site(module, prepared.settings(module.site), stored).to(place))
    quantized = QuantizedModel(model, prepared.config, rows, prepared.example_shapes, prepared.traits).eval()
    quantized.history = prepared.history
    if float_dtype is not torch.float32:
        return quantized.set_float_dtype(float_dtype)
    finalize(quantized)
    return quantized


def replace_sites(model: nn.Module, make: Callable[[PreparedSite], QuantizedSite]) -> None:
    """Put a quantized module at every prepared site with a quantizer, and release float weights nobody else reads."""
    shared: list[Tensor] = []
    swaps: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if not isinstance(module, PreparedSite) or not module.quantizers():
            continue
        if isinstance(module, PreparedLinear) and "::" in module.site.name and module.weight_quantizer is not None:
            shared.append(module.weight)
        swaps[module] = make(module)
    replace_modules(model, swaps)
    _release(model, shared)


def finalize(quantized: QuantizedModel) -> None:
    """Last touches on a model whose tensors are final: fold constants, fuse float attention, compare no more."""
    model = quantized.model
    fuse_mlps(model)
    for module in model.modules():
        module.__dict__.pop("_harmoq_last", None)
        if is_island(module):
            state = island_state(module)
            state.verify = False
            state.quiet = nullcontext
            finish_graphs(module, finish_variant)
    fixed = {r.name for r in quantized.rows if r.kind == "linear" and not r.depends_on_image}
    for module in _still_called(quantized, fixed):
        remember(module)


def finish_variant(module: nn.Module, variant: Variant) -> Variant:
    """Last touch on a graph of a converted island: constants folded, float attention in one call, fused kernels."""
    if isinstance(variant.run, (LoweredAttention, LoweredCores)):
        return variant
    fused = fuse_attention(module, fold_variant(module, variant))
    return lower_attention(module, lower_cores(module, fused))


def _still_called(quantized: QuantizedModel, names: set[str]) -> list[nn.Module]:
    """Of the modules that compute constants, those that folding did not reach; whole sequences where all of them do."""
    if not names:
        return []
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, i, name=name: called.add(name))
        for name, module in quantized.model.named_modules()
        if name in names
    ]
    reference = next(quantized.model.parameters())
    try:
        with torch.no_grad():
            quantized(torch.rand(quantized.example_shapes[0]).to(reference.device))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, nn.Module] = {}
    for name in sorted(called):
        path = name.rpartition(".")[0]
        parent = quantized.model.get_submodule(path)
        linears = {f"{path}.{n}" for n, m in parent.named_modules() if type(m) is nn.Linear}
        module = parent if type(parent) is nn.Sequential and linears <= names else quantized.model.get_submodule(name)
        found[id(module)] = module
    return list(found.values())


def _detached_copy(prepared: PreparedModel) -> nn.Module:
    """A copy of the inner model without the observers' samples."""
    observers = []
    for module in prepared.sites():
        for quantizer in module.quantizers():
            observers.append((quantizer, quantizer.observer))
            quantizer.observer = None
    try:
        model = copy.deepcopy(prepared.model)
    finally:
        for quantizer, observer in observers:
            quantizer.observer = observer
    return model


def _release(model: nn.Module, weights: list[Tensor]) -> None:
    """Replace float weights that quantized functional calls shared with their owner by a shape without memory."""
    gone = {id(w) for w in weights}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in gone:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


# --- what a saved model can hold --------------------------------------------------------------------------------------


def round_float_state(model: nn.Module, storage: StorageDtype) -> None:
    """Round every float parameter of `model` in place to what is stored; buffers are stored exactly and stay."""
    stored = _rounding(storage)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.device.type != "meta":
                parameter.copy_(stored(parameter))


def _rounding(storage: StorageDtype) -> Callable[[Tensor], Tensor]:
    def stored(tensor: Tensor) -> Tensor:
        dtype = storage_dtype(tensor, storage)
        return tensor.to(dtype).to(tensor.dtype)

    return stored


def storage_dtype(tensor: Tensor, storage: StorageDtype) -> torch.dtype:
    """Type a float tensor is stored in: as configured; ``auto`` is float16 unless that would overflow."""
    if storage != "auto":
        dtype: torch.dtype = getattr(torch, storage)
        return dtype
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return torch.float16 if largest <= _FLOAT16_MAX else torch.bfloat16
