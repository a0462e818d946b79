"""The converted model: the author's model, whose sites hold integer codes and compute with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.passes import Exchanged, exchanged_in, finalize
from harmoq_ao.gpu_programs.program import GpuPrograms
from harmoq_ao.gpu_programs.survey import survey
from harmoq_ao.images import check_image_tensor
from harmoq_ao.kernels.select import check_backend
from harmoq_ao.programs.program import Programs
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import ModelTraits
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.report import Lowering, Report, SiteRow, quantized_report

_FLOAT_DTYPES = (torch.float32, torch.bfloat16)


class QuantizedModel(nn.Module):
    """A model whose sites compute on integers; call it as the original.

    Attributes:
        model: The author's model, with quantized modules at its sites.
        config: The configuration it was made with.
        rows: One report row per contraction.
        example_shapes: Image shapes it was prepared on.
        traits: Scale, size requirements and architecture.
        float_dtype: Type of the parts that stay float.
        history: How it was calibrated and refined; None if unknown.
        programs: The fused kernels for CPUs, made for each image size when it first comes.
        gpu_programs: Likewise for GPUs.
        fingerprint: Of the float model it was prepared from; None if it has none.
        exchanged: Modules whose forward is known to be replaced; None to find them by a run.
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
        self.programs = Programs()
        self.gpu_programs = GpuPrograms()
        self.fingerprint: str | None = None
        self.exchanged: Exchanged | None = None

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Upscale an image batch `[B, C, H, W]` in 0..1; the result has the type of the input.

        Raises:
            InputError: Not an image batch, not finite, or of another number of channels.
        """
        check_image_tensor(image, channels=(self.example_shapes[0][1],), batched=True)
        # Where nothing is quantized this is the float model, which is not to be computed in bfloat16.
        modules = args or kwargs or not any(row.quantized for row in self.rows)
        fused = None if modules else self._fused(image)
        if fused is not None:
            return fused.to(image.dtype)
        # Authors create float32 masks in forward; autocast brings the operands of each product to one type.
        mixed = self.float_dtype is not torch.float32
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=mixed):
            output = self.model(image.to(self.float_dtype), *args, **kwargs)
        return output.to(image.dtype) if isinstance(output, Tensor) else output

    def _fused(self, image: Tensor) -> Tensor | None:
        """The output of fused kernels; None where the modules are to run."""
        found = self.gpu_programs.run(self.model, self._float32_twin, image, self.float_dtype)
        return self.programs.run(self.model, image, self.float_dtype) if found is None else found

    def gpu_graph(self, image: Tensor) -> fx.GraphModule | None:
        """The graph of fused kernels that computes images like this one on its device, a GPU; None where modules do."""
        if not any(row.quantized for row in self.rows):
            return None
        return self.gpu_programs.graph(self.model, self._float32_twin, image, self.float_dtype)

    def _float32_twin(self) -> nn.Module:
        """A copy of the author's model on the CPU, whose float parts are float32, for kernels of its sites."""
        twin = copy.deepcopy(self)
        twin.exchanged = exchanged_in(self.model)  # what a run would find
        nn.Module.to(twin, "cpu")
        twin.use_backend("auto")
        return twin.set_float_dtype(torch.float32).model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """``nn.Module._apply``, except for released weights, which have no memory on any device."""
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        return self

    def sites(self) -> dict[str, QuantizedSite]:
        """Quantized modules by site name."""
        return {m.site.name: m for m in self.model.modules() if isinstance(m, QuantizedSite)}

    def kernels(self) -> dict[str, str]:
        """Code path of each quantized site on its present device."""
        return {name: lowering.kernel for name, lowering in self.lowerings().items()}

    def lowerings(self, device: str | None = None) -> dict[str, Lowering]:
        """The kernel that computes each quantized site, and the reason where a fused kernel did not take it.

        Args:
            device: ``cpu`` or ``cuda``; by default where the model is. A GPU need not be there.

        Raises:
            ConfigError: Another device.
        """
        if device not in (None, "cpu", "cuda"):
            raise ConfigError("Kernels are for CPUs and GPUs", found=device, expected="cpu or cuda")
        sites = self.sites()
        if any(s.backend == "triton" for s in sites.values()) or (device or self._place().type) == "cuda":
            twin = self._float32_twin()
            known = {m.site.name: m for m in twin.modules() if isinstance(m, QuantizedSite)}
            return survey(twin, known, torch.empty(self.example_shapes[0], device="meta"), self.float_dtype)
        return {name: Lowering(module.kernel) for name, module in sites.items()}

    def _example_run(self) -> None:
        """Run the first example's size once."""
        self(torch.rand(self.example_shapes[0]).to(self._place()))

    def _place(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

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
        """Run the parts that stay float in float32 or bfloat16; codes and qparams are not touched.

        Raises:
            ConfigError: Another type.
        """
        if dtype not in _FLOAT_DTYPES:
            raise ConfigError("Unsupported float type", found=dtype, expected="torch.float32 or torch.bfloat16")
        self.model.to(dtype)  # islands forget what was folded in the former type
        self.float_dtype = dtype
        self.finalize()
        return self

    def finalize(self) -> None:
        """Fold constants and fuse kernels, once all tensors have their final values and types."""
        constants = {r.name for r in self.rows if r.kind == "linear" and not r.depends_on_image}
        finalize(self.model, constants, self._example_run, self.exchanged)

    def report(self, device: str | None = None) -> Report:
        """One row per site: bits, quantization range, joint scale, SQNR, kernel, and why a site stays float.

        Args:
            device: Whose kernels to name, as in :meth:`lowerings`.
        """
        report = quantized_report(self.rows, self.sites(), self.lowerings(device))
        measured = {} if self.history is None else self.history.sensitivities
        for row in report.rows:
            row.sensitivity_db = measured.get(row.name, row.sensitivity_db)
        if (device or self._place().type) == "cpu":
            report.notes.append(self.programs.sentence())
        else:
            report.notes.append(self.gpu_programs.sentence())
        return report
