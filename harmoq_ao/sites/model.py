"""The prepared model: the author's model with a site at every contraction, and the traits of its images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.config import HarmoqConfig, SiteSettings
from harmoq_ao.images import check_image_tensor
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.history import History
from harmoq_ao.sites.report import Report, float_rows
from harmoq_ao.sites.site import FloatSite, Site


@dataclass(frozen=True)
class ModelTraits:
    """Image requirements of a model, and how to build it.

    Args:
        scale: Output pixels per input pixel along each side.
        size_multiple: Sides of the input must be multiples of this (1: any size).
        size_minimum: Sides of the input must be at least this.
        square: The input must be square.
        architecture: Description from :func:`architecture_spec`, or None if spandrel does not know it.
    """

    scale: int = 1
    size_multiple: int = 1
    size_minimum: int = 0
    architecture: dict[str, Any] | None = None
    square: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``square`` only where it holds, since older readers do not know it."""
        return {name: value for name, value in asdict(self).items() if name != "square" or value}

    @classmethod
    def from_dict(cls, data: Any) -> ModelTraits:
        """Inverse of :meth:`to_dict`.

        Raises:
            SavedModelError: Unknown or ill-typed entries.
        """
        numbers = ("scale", "size_multiple", "size_minimum")
        valid = isinstance(data, dict) and set(data) - {"square"} == {*numbers, "architecture"}
        valid = valid and all(type(data[n]) is int and 0 <= data[n] <= 1024 for n in numbers)
        valid = valid and type(data.get("square", False)) is bool
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
        history: How its sites were solved, or None before.
        fingerprint: Of the float model (:func:`harmoq_ao.preparation.fingerprint.fingerprint`), or None.
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
        self.fingerprint: str | None = None

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
        """One row per site: bits, quantization range, joint scale, SQNR, and why a site stays float."""
        rows = [site.report_row(self.settings(site.site)) for site in self.sites()]
        return Report("prepared model", rows + float_rows(self.floats))
