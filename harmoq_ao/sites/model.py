"""The prepared model: the author's model with a site at every contraction, and what is known about its images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.config import HarmoqConfig, SiteSettings
from harmoq_ao.images import check_image_tensor
from harmoq_ao.quant.fake_quant import HarmoqFakeQuantize
from harmoq_ao.quant.observers import OBSERVERS
from harmoq_ao.quant.quantizer import QuantizerSpec, Scheme
from harmoq_ao.sites.history import History
from harmoq_ao.sites.prepared import PreparedMatmul, PreparedSite
from harmoq_ao.sites.report import Report, prepared_report
from harmoq_ao.sites.site import FloatSite, Site


@dataclass(frozen=True)
class ModelTraits:
    """What is known about a model's images and how to build it.

    Args:
        scale: Output pixels per input pixel along each side.
        size_multiple: Sides of the input must be multiples of this (1: any size).
        size_minimum: Sides of the input must be at least this.
        architecture: Description from :func:`architecture_spec`, or None if spandrel does not know it.
    """

    scale: int = 1
    size_multiple: int = 1
    size_minimum: int = 0
    architecture: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelTraits:
        """Inverse of :meth:`to_dict`.

        Raises:
            SavedModelError: Unknown or ill-typed entries.
        """
        numbers = ("scale", "size_multiple", "size_minimum")
        valid = isinstance(data, dict) and set(data) == {*numbers, "architecture"}
        valid = valid and all(type(data[n]) is int and 0 <= data[n] <= 1024 for n in numbers)
        if not valid or not isinstance(data["architecture"], (dict, type(None))):
            raise SavedModelError("The traits of a saved model are not valid", found=repr(data)[:200])
        return cls(**data)


class PreparedModel(nn.Module):
    """A model with a site at every contraction; call it as the original.

    Attributes:
        model: The author's model, on whose modules the sites stand.
        config: The configuration.
        floats: Contractions that stay float, with the reason.
        example_shapes: Shapes of the image batches it was prepared on.
        traits: Scale, size requirements and architecture.
        order: Paths of the sites in execution order.
        history: How its sites were solved, once they are.
    """

    def __init__(self, model: nn.Module, config: HarmoqConfig, traits: ModelTraits) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.floats: list[FloatSite] = []
        self.example_shapes: list[tuple[int, ...]] = []
        self.order: list[str] = []
        self.traits = traits
        self.history: History | None = None

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model on an image batch `[B, C, H, W]` in 0..1.

        Raises:
            InputError: Not an image batch, or not finite.
        """
        check_image_tensor(image)
        return self.model(image, *args, **kwargs)

    def sites(self) -> list[PreparedSite]:
        """Site modules in execution order; sites met later, at other image sizes, come last."""
        found = {m.site.path: m for m in self.model.modules() if isinstance(m, PreparedSite)}
        known = [found.pop(path) for path in self.order if path in found]
        return known + list(found.values())

    def settings(self, site: Site) -> SiteSettings:
        """Quantizers of a site under the configuration."""
        return self.config.settings(site.name, site.kind)

    def report(self) -> Report:
        """One row per site: bits, bounds, joint scale, SQNR, and why a site stays float."""
        return prepared_report(self.sites(), self.settings, self.floats)


def attach_quantizers(module: PreparedSite, config: HarmoqConfig, device: torch.device) -> None:
    """Give a site the observers and fake-quantizers its settings ask for, observing, with rounding off.

    Args:
        module: The site.
        config: Whose settings hold.
        device: Where the model is.
    """
    site = module.site
    settings = config.settings(site.name, site.kind)
    site.reason = settings.reason
    joint = wants_joint_scale(site, settings)
    if isinstance(module, PreparedMatmul):
        module.relative = wants_relative_map(site, settings)
        scheme = Scheme.INTEGER_ZERO_POINT if module.relative else settings.act.scheme  # zero is a level
        left = _quantizer(site, replace(settings.act, scheme=scheme), config, -1, joint)
        right = _quantizer(site, settings.weight, config, -2, joint)
    else:
        left = _quantizer(site, settings.act, config, 1 if site.kind == "conv2d" else -1, site.kind == "linear")
        right = weight_quantizer(site, settings.weight)
    module.attach(left, right)
    module.to(device)


def wants_joint_scale(site: Site, settings: SiteSettings) -> bool:
    """Whether a vector joint scale is defined at a site: both operands quantized, contracted length fixed."""
    if settings.joint_scale == "none" or not (settings.act.enabled and settings.weight.enabled):
        return False
    return site.kind == "linear" or (site.kind == "matmul" and site.role == "query-key" and site.shape[0] > 0)


def wants_joint_shift(site: Site, settings: SiteSettings) -> bool:
    """Whether a joint shift is defined at a site: a linear with a joint scale, static bounds and under 8 bits.

    With 256 levels it changes nothing that could be seen, and its vectors would add one percent to a saved model.
    """
    linear = site.kind == "linear" and settings.joint_shift and not settings.act.dynamic and settings.act.bits < 8
    return linear and wants_joint_scale(site, settings)


def wants_relative_map(site: Site, settings: SiteSettings) -> bool:
    """Whether a site's left operand is an attention map to be quantized relative to its rows' largest entries."""
    both = settings.act.enabled and settings.weight.enabled
    return settings.relative_maps and site.role == "attention-value" and both and not settings.act.dynamic


def _quantizer(
    site: Site, spec: QuantizerSpec, config: HarmoqConfig, axis: int, channels: bool
) -> HarmoqFakeQuantize | None:
    if not spec.enabled:
        return None
    quantizer = HarmoqFakeQuantize(spec)
    quantizer.site_name = site.name
    quantizer.disable_fake_quant()
    if channels or not spec.dynamic:  # dynamic bounds alone need no statistics
        observer = OBSERVERS[config.observer](spec, contracted_axis=axis, track_channels=channels, seed=config.seed)
        observer.site_name = site.name
        quantizer.observer = observer
    return quantizer


def weight_quantizer(site: Site, spec: QuantizerSpec) -> HarmoqFakeQuantize | None:
    """Fake-quantizer of a weight, with rounding off, or None where the specification is off."""
    if not spec.enabled:
        return None
    quantizer = HarmoqFakeQuantize(spec, (site.shape[0],) + (1,) * (len(site.shape) - 1))
    quantizer.site_name = site.name
    quantizer.learnable = spec.scheme is not Scheme.INTEGER_ZERO_POINT  # signed codes need zero in the middle
    quantizer.disable_fake_quant()
    return quantizer
