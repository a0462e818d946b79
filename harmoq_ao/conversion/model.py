"""The converted model: the author's model, whose sites hold integer codes and compute with them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.calling import call_with_image
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.common.structure import image_of, map_tensors
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.passes import Exchanged, exchanged_in, finalize
from harmoq_ao.gpu_programs.program import GpuPrograms
from harmoq_ao.gpu_programs.survey import survey
from harmoq_ao.images import check_image_tensor
from harmoq_ao.kernels.select import check_backend
from harmoq_ao.programs.program import Programs
from harmoq_ao.sites.history import History
from harmoq_ao.sites.model import AuthorModel, ModelTraits
from harmoq_ao.sites.quantized import QuantizedSite
from harmoq_ao.sites.report import Lowering, Report, SiteRow, quantized_report

logger = logging.getLogger(__name__)
_FLOAT_DTYPES = (torch.float32, torch.bfloat16)


class QuantizedModel(AuthorModel):
    """A model whose sites compute on integers; call it as the original. It is for inference alone.

    It can be copied, pickled and sent to other processes, which import the author's classes as for any module. Its
    float type follows :meth:`bfloat16`, :meth:`float` and :meth:`to`; codes, scales and ranges do not.

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
        super().__init__(model, config, traits)
        self.rows = rows
        self.example_shapes = example_shapes
        self.float_dtype = torch.float32
        self.history: History | None = None
        self.programs = Programs()
        self.gpu_programs = GpuPrograms()
        self.fingerprint: str | None = None
        self.exchanged: Exchanged | None = None
        self._only_image: tuple[nn.Module, ...] = ()  # no submodule: it would be in the state twice

    def forward(self, image: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Upscale an image batch `[B, C, H, W]` in 0..1, given by position or by its author's name.

        Returns:
            What the original returns, its float tensors in the type of the input.

        Raises:
            InputError: No image, not an image batch, not finite, or of another number of channels.
        """
        image = self._checked(image, kwargs)
        if self.traits.output is None and not args and not kwargs:
            fused = self._fused(image)
            if fused is not None:
                return fused
        # Authors create float32 masks in forward; autocast brings the operands of each product to one type.
        mixed = self.float_dtype is not torch.float32
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=mixed):
            output = self._call(image.to(self.float_dtype), args, kwargs)
        return map_tensors(output, lambda t: t.to(image.dtype) if t.is_floating_point() else t)

    def image(self, image: Tensor) -> Tensor:
        """The image within the output, by the kernels that are fastest also where the output holds more than that."""
        if self.traits.output is not None:
            fused = self._fused(self._checked(image, {}))
            if fused is not None:
                return fused
        return super().image(image)

    def image_module(self) -> nn.Module:
        """The author's model as a module from image to image: itself, or one that calls it and takes out its image."""
        if self.traits.output is None and self.traits.keyword is None:
            return self.model
        if not self._only_image:
            self._only_image = (_OnlyImage(self.model, self.traits).eval(),)
        return self._only_image[0]

    def _checked(self, image: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        image = self._given(image, kwargs)
        check_image_tensor(image, channels=(self.example_shapes[0][1],), batched=True)
        if self.model.training:
            self.train()  # somebody told the author's model past us
        return image

    def _fused(self, image: Tensor) -> Tensor | None:
        """The image by fused kernels; None where the modules are to run."""
        if not self._quantizes() or torch.compiler.is_compiling():  # torch.compile is shown the modules
            return None
        model = self.image_module()
        # On a CPU the first answers unless Triton is asked for; looking at every tensor of the model twice is dear.
        fused = self.programs.run(model, image, self.float_dtype)
        if fused is None:
            fused = self.gpu_programs.run(model, self.float32_twin, image, self.float_dtype)
        return None if fused is None else fused.to(image.dtype)

    def _quantizes(self) -> bool:
        """Whether anything is quantized; else this is the float model, which is not to be computed in bfloat16."""
        return any(row.quantized for row in self.rows)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Stay in evaluation mode, and say so: statistics of norms and dropout would change what it computes."""
        if mode:
            logger.warning(
                "A quantized model cannot be trained and stays in evaluation mode; refine the prepared model "
                "(harmonize), or train the float model and quantize it anew"
            )
        super().train(False)
        return self

    def gpu_graph(self, image: Tensor) -> fx.GraphModule | None:
        """The graph of fused kernels that computes images like this one on its device, a GPU; None where modules do."""
        if not self._quantizes():
            return None
        return self.gpu_programs.graph(self.image_module(), self.float32_twin, image, self.float_dtype)

    def float32_twin(self) -> nn.Module:
        """A copy of the author's model on the CPU, whose float parts are float32, for kernels of its sites."""
        twin = copy.deepcopy(self)
        twin.exchanged = exchanged_in(self.model)  # what a run would find
        nn.Module.to(twin, "cpu")
        twin.use_backend("auto")
        return twin.set_float_dtype(torch.float32).image_module()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """``nn.Module._apply``, except for released weights, which have no memory on any device.

        Raises:
            ConfigError: It asks for a float type that there are no kernels for (``half()``, ``double()``).
        """
        wanted = fn(torch.empty(0, dtype=self.float_dtype, device=self._place())).dtype
        if wanted is not self.float_dtype:
            _check_float_dtype(wanted)
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        if wanted is not self.float_dtype:  # islands have forgotten what was folded in the former type
            self.float_dtype = wanted
            self.finalize()
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
            twin = self.float32_twin()
            known = {m.site.name: m for m in twin.modules() if isinstance(m, QuantizedSite)}
            return survey(twin, known, torch.empty(self.example_shapes[0], device="meta"), self.float_dtype)
        return {name: Lowering(module.kernel) for name, module in sites.items()}

    def _example_run(self) -> None:
        """Run the first example's size once."""
        self(torch.rand(self.example_shapes[0]).to(self._place()))

    def _place(self) -> torch.device:
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

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
        _check_float_dtype(dtype)
        return self.to(dtype)

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


def _check_float_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOAT_DTYPES:
        raise ConfigError(
            "A quantized model has no such float type",
            found=dtype,
            expected="torch.float32 or torch.bfloat16",
            remedy="call bfloat16(); images may be of any float type, and the result has that of the image",
        )


class _OnlyImage(nn.Module):
    """An author's model as a function from image to image."""

    def __init__(self, model: nn.Module, traits: ModelTraits) -> None:
        super().__init__()
        self.model = model
        self.traits = traits

    def forward(self, image: Tensor) -> Tensor:
        return image_of(call_with_image(self.model, self.traits.keyword, image), self.traits.output)
